"""The cases of `matmul`.

A sum of K products in fp32, in whatever order, is off by at most K u (|a| |b|) with u = 2^-24, to
first order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.5); adding it to
`out` costs one more rounding. That is the tolerance, element by element; nothing is loose in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.matmul import matmul
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
LAYOUTS = ("rows", "columns", "padded_rows", "padded_columns", "neither", "expanded")


def lay(x: Tensor, layout: str) -> Tensor:
    """`x` in memory as `layout` says; what lies between is NaN."""
    rows, columns = x.shape
    if layout == "rows":
        return x.contiguous()
    if layout == "padded_rows":
        return torch.cat([x, x.new_full((rows, 5), torch.nan)], 1)[:, :columns]
    if layout == "neither":
        wide = torch.full((2 * rows, 2 * columns), torch.nan, dtype=x.dtype, device=x.device)
        wide[::2, ::2] = x
        return wide[::2, ::2]
    if layout == "expanded":  # one row for all
        return x[:1].expand(rows, columns)
    if layout in ("columns", "padded_columns"):
        return lay(x.t(), layout.replace("columns", "rows")).t()
    raise ValueError(f"layout={layout!r} is not known.")


def _case(
    name: str,
    m: int,
    k: int,
    n: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    out_dtype: torch.dtype = FP32,
    *,
    layouts: tuple[str, str] = ("rows", "rows"),
    out_layout: str | None = None,
    accumulate: bool = False,
    special: bool = False,
    marks: tuple[str, ...] = (),
) -> Case:
    kinds = f"{_SHORT[dtypes[0]]}-{_SHORT[dtypes[1]]}-{_SHORT[out_dtype]}"
    case_id = f"{name}-{kinds}-{m}x{k}x{n}"

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
        if special:
            a[1, 2], a[2, 3], b[4, 5], b[6, 7] = torch.nan, torch.inf, -torch.inf, 0.0
            a[3, 4], a[5] = 0.0, -torch.inf
        kwargs: dict[str, Any] = {
            "a": lay(a.to(dtypes[0]).to(device), layouts[0]),
            "b": lay(b.to(dtypes[1]).to(device), layouts[1]),
        }
        if out_layout or accumulate:
            before = torch.randn(m, n, generator=g) if accumulate else torch.full((m, n), torch.nan)
            kwargs["out"] = lay(before.to(out_dtype).to(device), out_layout or "rows")
            kwargs["accumulate"] = accumulate
        else:
            kwargs["out_dtype"] = out_dtype
        return kwargs

    size = m * k * dtypes[0].itemsize + k * n * dtypes[1].itemsize + m * n * out_dtype.itemsize
    return Case(
        op="matmul",
        id=case_id,
        inputs=inputs,
        shape=(m, k, n),
        dtypes=(*dtypes, out_dtype),
        options={},
        tolerances={"product": Tolerance(0.0, 1.01 * (k + 2) * 2.0**-24)},
        bytes={"forward": size},
        flops={"forward": 2 * m * k * n},
        marks=frozenset(marks),
    )


def _table() -> Iterator[Case]:
    for dtypes in product(_SHORT, _SHORT):
        for out_dtype in (FP32, BF16, FP16):
            yield _case("plain", 23, 70, 53, dtypes, out_dtype)
        for layouts in product(LAYOUTS, LAYOUTS):
            name = "-".join(layouts)
            yield _case(name, 35, 41, 37, dtypes, layouts=layouts)
        for layouts in product(LAYOUTS[:2], LAYOUTS[:2]):
            name = "few-" + "-".join(layouts)
            yield _case(name, 3, 1100, 130, dtypes, layouts=layouts)
            yield _case(f"{name}-swapped", 130, 1100, 3, dtypes, layouts=layouts)
            yield _case(f"special-{name}", 9, 50, 33, dtypes, layouts=layouts, special=True)
            yield _case(f"blocks-{name}", 205, 600, 107, dtypes, layouts=layouts)
            yield _case(f"blocks-{name}", 107, 600, 205, dtypes, layouts=layouts, accumulate=True)
    for m, k, n in product((0, 1, 2, 17), repeat=3):
        yield _case("tiny", m, k, n)
        yield _case("tiny-accumulate", m, k, n, (BF16, BF16), accumulate=True)
    for out_layout in ("columns", "padded_rows", "padded_columns"):
        for out_dtype in (FP32, BF16, FP16):
            yield _case(f"out-{out_layout}", 31, 20, 45, (BF16, BF16), out_dtype,
                        out_layout=out_layout)  # fmt: skip
        yield _case(f"accumulate-{out_layout}", 31, 20, 45, out_layout=out_layout, accumulate=True)
    yield _case("deep", 7, 70000, 5, (BF16, BF16), layouts=("rows", "columns"))
    for h in (576, 2048):  # the shapes of the fused-linear losses
        for dtypes in ((FP32, FP32), (BF16, BF16)):
            bench, nt = ("bench", "slow"), ("rows", "columns")
            yield _case("logits", 1024, h, 49152, dtypes, layouts=nt, marks=bench)
            yield _case("grad_hidden", 1024, 4096, h, dtypes, accumulate=True, marks=bench)
            yield _case("grad_weight", 4096, 1024, h, dtypes, layouts=("columns", "rows"),
                        accumulate=True, marks=bench)  # fmt: skip
            for m in (1, 4, 16):
                yield _case("few_tokens", m, h, 49152, dtypes, layouts=nt, marks=bench)
    for dtypes in ((FP32, FP32), (BF16, BF16)):
        yield _case("wide", 256, 2048, 151936 // 8, dtypes, layouts=nt, marks=bench)


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """The product of the case on backend `impl`."""
    return {"product": matmul(impl=impl, **inputs)}


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give, in fp64, and the sum of its terms' sizes."""
    a, b = inputs["a"].double(), inputs["b"].double()
    value, size = a @ b, a.abs().nan_to_num(0, 0) @ b.abs().nan_to_num(0, 0)
    if inputs.get("accumulate"):
        value, size = value + inputs["out"].double(), size + inputs["out"].double().abs()
    return {"product": Expected(value, size)}


CASES: list[Case] = list(_table())
