"""The cases of `decoder_layer`: heads of every kind, padding, windows, biases, norms of heads.

The truth is computed in fp64 and rounded to the dtype where the definition says. Products of 16-bit
numbers with fp32 sums then decide now and then another way at a rounding, one ulp of a number that
the next product takes among many: the tolerance allows two ulps of the output's size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.decoder_layer import decoder_layer
from pydistill.reference.decoder_layer import LayerWeights, decoder_layer_reference
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
# fp32 sums of up to some hundred products, over a size that the residual gives; two ulps.
_ERROR = {FP32: 4e-6, BF16: 2 * 2.0**-8, FP16: 2 * 2.0**-11}


def layer_case(
    name: str,
    batch: int,
    tokens: int,
    columns: int,
    dtype: torch.dtype,
    *,
    width: int = 48,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    inner: int = 80,
    bias: bool = False,
    norms: bool = False,
    window: int = 0,
    padded: bool = False,
    spare: int = 0,
    marks: tuple[str, ...] = (),
) -> Case:
    case_id = f"{name}-{_SHORT[dtype]}-{batch}x{tokens}-behind-{columns}"
    n, g = heads
    shapes = [(n * size, width), (g * size, width), (g * size, width), (width, n * size),
              (inner, width), (inner, width), (width, inner)]  # fmt: skip
    weights = sum(out * by for out, by in shapes)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))

        def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            x = torch.randn(*shape, generator=random) * std + mean
            return x.to(dtype).to(device)

        q, k, v, o, gate, up, down = (normal(*x, std=x[1] ** -0.5) for x in shapes)
        more: dict[str, Tensor] = {}
        if bias:
            sizes = {"q_bias": n * size, "k_bias": g * size, "v_bias": g * size, "o_bias": width}
            more |= {key: normal(count) for key, count in sizes.items()}
        if norms:
            more |= {key: normal(size, mean=1.0, std=0.2) for key in ("q_norm", "k_norm")}
        starts = torch.zeros(batch, dtype=torch.int64)
        if padded:
            starts = torch.randint(0, columns + tokens + 1, (batch,), generator=random)
        # What nobody may read: columns not yet written, and those before a request's first one.
        cache = [normal(batch, g, columns + tokens + spare, size) for _ in range(2)]
        for x in cache:
            x[:, :, columns:] = torch.nan
            for row, start in enumerate(starts.tolist()):
                x[row, :, : min(start, columns)] = torch.nan
        angles = torch.rand(batch, tokens, size // 2, generator=random) * 6.0
        angles = torch.cat([angles, angles], -1)
        return {
            "hidden": normal(batch, tokens, width, std=2.0),
            "weights": LayerWeights(
                normal(width, mean=1.0, std=0.2), q, k, v, o, normal(width, mean=1.0, std=0.2),
                gate, up, down, **more,
            ),
            "cos": angles.cos().to(dtype).to(device),
            "sin": angles.sin().to(dtype).to(device),
            "keys": cache[0],
            "values": cache[1],
            "starts": starts.to(device),
            "columns": columns,
            "eps": 1e-5,
            "scale": size**-0.5,
            "window": window,
        }  # fmt: skip

    seen = columns + tokens
    return Case(
        op="decoder_layer",
        id=case_id,
        inputs=inputs,
        shape=(batch, tokens, width),
        dtypes=(dtype,),
        options={},
        tolerances={key: Tolerance(0.0, _ERROR[dtype]) for key in ("hidden", "keys", "values")},
        bytes={"forward": dtype.itemsize * (weights + 2 * batch * g * seen * size)},
        flops={"forward": 2 * batch * tokens * (weights + 2 * n * seen * size)},
        marks=frozenset(marks),
    )


def _table() -> Iterator[Case]:
    for dtype in (FP32, BF16, FP16):
        yield layer_case("one", 1, 1, 37, dtype)
        yield layer_case("first", 1, 3, 0, dtype)
        yield layer_case("few", 1, 5, 64, dtype, spare=7)
        yield layer_case("batch", 3, 2, 21, dtype, padded=True, spare=1)
        yield layer_case("window", 2, 4, 30, dtype, window=6, padded=True)
        yield layer_case("window-of-one", 1, 3, 9, dtype, window=1)
        yield layer_case("biased", 2, 3, 10, dtype, bias=True)
        yield layer_case("head-norms", 1, 4, 18, dtype, norms=True, bias=True)
        yield layer_case("one-group", 1, 2, 13, dtype, heads=(5, 1), size=10, width=35, inner=51)
        yield layer_case("ungrouped", 2, 1, 16, dtype, heads=(3, 3), size=6, width=18, inner=7)
        yield layer_case(
            "real-heads", 1, 6, 129, dtype, width=192, heads=(3, 1), size=64, inner=384
        )
        yield layer_case(
            "wide-heads", 1, 2, 50, dtype, width=130, heads=(2, 2), size=144, inner=200
        )
        yield layer_case("narrow", 3, 5, 4, dtype, heads=(2, 1), size=2, width=5, inner=3)
        yield layer_case("many", 4, 16, 33, dtype, width=64, padded=True)
        yield layer_case("no-tokens", 2, 0, 5, dtype)
        for tokens in (1, 5, 16):  # SmolLM2-135M
            yield layer_case("bench", 1, tokens, 256, dtype, width=576, heads=(9, 3), size=64,
                        inner=1536, marks=("bench",))  # fmt: skip


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """The states, and the cache where it was written."""
    return _outputs(inputs, decoder_layer(**inputs, impl=impl))


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give, in fp64, of which a number's size is its row's largest: of states
    with what the layer adds to, which may cancel them (5e-4 of terms near 1, off by 24 times what
    its own size allows)."""
    found = _outputs(inputs, decoder_layer_reference(**inputs, exact=torch.float64))
    sizes = {name: x.double().abs().amax(-1, keepdim=True) for name, x in found.items()}
    before = inputs["hidden"].double().abs().amax(-1, keepdim=True)
    sizes["hidden"] = torch.maximum(sizes["hidden"], before)
    return {name: Expected(x.double(), sizes[name]) for name, x in found.items()}


def _outputs(inputs: dict[str, Any], hidden: Tensor) -> dict[str, Tensor]:
    new = slice(inputs["columns"], inputs["columns"] + hidden.shape[1])
    return {
        "hidden": hidden,
        "keys": inputs["keys"][:, :, new],
        "values": inputs["values"][:, :, new],
    }


CASES: list[Case] = list(_table())
