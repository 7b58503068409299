"""The cases of `pydistill.causal_conv1d`.

`run` gives, for one case and backend, the outputs, the gradients of every tensor under random
upstreams of each output alone (autograd adds the two in the tensors' dtype), and the tangent along
a random direction of all of them. `truth` is the reference in fp64 on the same, already rounded,
numbers.

The size of an output is that of its terms, sum |weight x| + |bias|; of a gradient or a tangent, the
largest of all: each is a sum over taps or tokens.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill.ops.causal_conv1d import causal_conv1d
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
TENSORS = ("x", "weight", "bias", "initial_state")

TOLERANCES = {
    "out": Tolerance(2e-6, 1e-6),
    "final_state": Tolerance(0, 0),
    "grad": Tolerance(5e-6, 5e-6),
    "tangent": Tolerance(5e-6, 5e-6),
}


def conv_case(
    name: str,
    batch: int,
    length: int,
    channels: int,
    width: int = 4,
    *,
    dtype: torch.dtype = FP32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    silu: bool = True,
    state: bool = False,
    ends: tuple[int, ...] | None = None,
    strided: bool = False,
    large: bool = False,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
) -> Case:
    case_id = f"{name}-{_SHORT[dtype]}-{batch}x{length}x{channels}x{width}"

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        wide = 2 * channels + 3 if strided else channels
        x = torch.randn(batch, length, wide, generator=g) * (30 if large else 1)
        given: dict[str, Any] = {"x": x.to(dtype).to(device)[..., wide - channels :]}
        taps = torch.randn(channels, width, generator=g) / width**0.5
        given["weight"] = taps.to(weight_dtype or dtype).to(device)
        if bias:
            made = torch.randn(channels, generator=g)
            given["bias"] = made.to(weight_dtype or dtype).to(device)
        if state:
            count = batch if ends is None else len(ends)
            made = torch.randn(count, width - 1, channels, generator=g)
            given["initial_state"] = made.to(dtype).to(device)
        if ends is not None:
            given["cu_seqlens"] = torch.tensor([0, *ends], device=device)
        given["activation"] = "silu" if silu else None
        return given

    moved = batch * length * channels * dtype.itemsize
    products = 2 * width * batch * length * channels
    return Case(
        op="causal_conv1d",
        id=case_id,
        inputs=inputs,
        shape=(batch, length, channels),
        dtypes=(dtype,),
        options={"width": width},
        tolerances=TOLERANCES,
        bytes={"forward": 2 * moved, "backward": 3 * moved},
        flops={"forward": products, "backward": 2 * products},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases = []
    for dtype in (FP32, BF16, FP16):
        cases += [
            conv_case("plain", 2, 40, 96, dtype=dtype),
            conv_case("linear", 2, 19, 64, silu=False, bias=False, dtype=dtype),
            conv_case("odd", 2, 17, 37, 3, state=True, dtype=dtype),
            conv_case("chunks", 1, 600, 33, state=True, dtype=dtype),
            conv_case("blocks_of_channels", 2, 9, 1100, dtype=dtype),
            conv_case("packed", 1, 530, 48, state=True, ends=(1, 1, 3, 250, 300, 530), dtype=dtype),
            conv_case("token", 3, 1, 80, state=True, dtype=dtype),
            conv_case("fewer_than_taps", 2, 2, 24, 7, state=True, dtype=dtype),
            conv_case("strided", 2, 21, 50, strided=True, state=True, dtype=dtype),
            conv_case("one_tap", 2, 5, 16, 1, state=True, dtype=dtype),
            conv_case("saturated", 1, 30, 32, large=True, dtype=dtype),
        ]  # fmt: skip
    cases += [
        conv_case("mixed", 2, 33, 40, dtype=BF16, weight_dtype=FP32, state=True),
        conv_case("one_channel", 1, 70, 1, 2),
        conv_case("wide", 1, 60, 20, 31, state=True),
        conv_case("packed_without_state", 1, 30, 20, ends=(0, 2, 7, 30)),
        conv_case("ends_at_a_chunk", 1, 512, 20, ends=(256, 512), state=True),
        conv_case("no_tokens", 2, 0, 20, state=True),
        conv_case("no_rows", 0, 5, 20),
    ]
    for dtype in (FP32, BF16):
        gate = conv_case("bench", 1, 300, 6144, dtype=dtype)
        cases.append(
            conv_case("bench", 1, 2048, 6144, dtype=dtype, marks=("bench", "slow"), gate=gate)
        )
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if k in TENSORS}
    rest = {k: v for k, v in inputs.items() if k not in TENSORS}
    out, state = causal_conv1d(**leaves, **rest, output_final_state=True, impl=impl)
    assert state is not None
    directions = _directions(case, [out, state, *leaves.values()], seed)
    grads = {
        f"grad.{name}_of_{output}": grad
        for output, value, up in zip(("out", "state"), (out, state), directions, strict=False)
        for name, grad in zip(leaves, _pull(value, up, leaves), strict=True)
    }
    with forward_ad.dual_level():
        duals = {
            k: forward_ad.make_dual(v.detach(), d)
            for (k, v), d in zip(leaves.items(), directions[2:], strict=True)
        }
        moved = causal_conv1d(**duals, **rest, impl=impl)[0]
        tangent = forward_ad.unpack_dual(moved).tangent
    assert tangent is not None
    found = {"out": out.detach(), "final_state": state.detach(), "tangent": tangent}
    return found | grads


def _pull(value: Tensor, up: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, tuple(leaves.values()), up, retain_graph=True, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    exact = {k: v.double() if k in TENSORS else v for k, v in inputs.items()}
    found = run(case, exact, "reference", seed)
    absolute = {k: v.abs() if k in TENSORS else v for k, v in exact.items()}
    size = causal_conv1d(**{**absolute, "activation": None}, impl="reference")[0]
    sizes: dict[str, Tensor | float] = {"out": size, "final_state": 1.0}
    return {
        name: Expected(value, sizes.get(name, float(value.abs().max()) if value.numel() else 0.0))
        for name, value in found.items()
    }


def _directions(case: Case, like: list[Tensor], seed: int) -> list[Tensor]:
    """Random, of those shapes and dtypes, rounded to the table's dtype."""
    g = torch.Generator().manual_seed(seed + 1 + zlib.crc32(case.id.encode()))
    return [
        torch.randn(x.shape, generator=g).to(case.dtypes[0]).to(x.device, x.dtype) for x in like
    ]


CASES: list[Case] = _table()
