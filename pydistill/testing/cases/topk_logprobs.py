"""The cases of `pydistill.topk_logprobs`.

`run` gives, for one case and backend, the four results, the ids as fp64 so that one comparison
serves all (they must be equal). `truth` is the reference in fp64 on the same, already rounded,
numbers.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.topk_logprobs import topk_logprobs
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

TOLERANCES = {
    "ids": Tolerance(0.0, 0.0),
    "logprobs": Tolerance(1e-6, 1e-6),
    "tail": Tolerance(1e-6, 1e-6),
    "lse": Tolerance(1e-6, 1e-6),
}


def _rows(pattern: str, rows: int, v: int, g: torch.Generator) -> Tensor:
    """fp32 logits [rows, v] of a named pattern."""
    x = 2 * torch.randn(rows, v, generator=g)
    if pattern == "peaked":  # log of the mass outside the top from about -9 to -200
        x[torch.arange(rows), torch.randint(v, (rows,), generator=g)] = torch.linspace(
            14, 210, rows
        )
    elif pattern == "ties":
        x = x.round()
    elif pattern == "equal":
        x[:] = torch.arange(rows)[:, None] - 1.0
    elif pattern == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif pattern == "rising":
        x = x.sort(-1).values
    elif pattern == "falling":
        x = x.sort(-1, descending=True).values
    elif pattern == "late":  # each block's maximum is far above those before
        x += torch.arange(v) // 700 * 40.0
    elif pattern == "wide":
        x *= 1e4
    elif pattern == "infinite":  # a padded vocabulary, and rows with few tokens or one
        x[:, -2:] = -torch.inf
        x[1, 3:] = -torch.inf
        x[2, torch.arange(v) != v // 2] = -torch.inf
    elif pattern == "poisoned":  # the first and last rows must not notice
        x[1, v // 2], x[2, 0], x[3], x[4, -1] = torch.nan, torch.inf, -torch.inf, torch.nan
    elif pattern != "normal":
        raise ValueError(f"pattern={pattern!r} is not known.")
    return x


def _case(
    name: str,
    rows: int,
    v: int,
    k: int,
    *,
    dtype: torch.dtype = FP32,
    pattern: str = "normal",
    prefix: tuple[int, ...] | None = None,
    strided: bool = False,
    temperature: float = 1.0,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
) -> Case:
    case_id = f"{name}-{_SHORT[dtype]}-{rows}x{v}-k{k}"
    shape = prefix or (rows,)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        x = _rows(pattern, rows, v, g).to(dtype).reshape(*shape, v).to(device)
        if strided:
            wide = torch.full((*shape, v + 3), torch.nan, dtype=dtype, device=device)
            wide[..., 1:-2] = x
            x = wide[..., 1:-2]
        return {"logits": x, "k": k, "temperature": temperature}

    return Case(
        op="topk_logprobs",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=(dtype,),
        options={"k": k, "temperature": temperature},
        tolerances=TOLERANCES,
        bytes={"forward": rows * (v * dtype.itemsize + 12 * k + 8)},
        flops={"forward": 4 * rows * v},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases: list[Case] = []

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    for dtype in (FP32, BF16, FP16):
        add("plain", 5, 1000, 16, dtype=dtype, marks=("ladder",))
        add("blocks", 4, 5000, 64, dtype=dtype)
        add("whole_blocks", 3, 4096, 100, dtype=dtype)
        add("long", 3, 30000, 20, dtype=dtype)  # candidates are picked on the way, and pushed out
        add("many", 3, 3000, 700, dtype=dtype)
        add("odd", 3, 31, 5, dtype=dtype, marks=("ladder",))
        add("one_token", 3, 1, 1, dtype=dtype)
        add("one_slot", 5, 2500, 1, dtype=dtype, marks=("ladder",))
        add("whole", 4, 1300, 1300, dtype=dtype)
        add("all_but_one", 4, 1300, 1299, dtype=dtype)
        add("peaked", 9, 3000, 8, dtype=dtype, pattern="peaked", marks=("ladder",))
        add("ties", 5, 3000, 300, dtype=dtype, pattern="ties", marks=("ladder",))
        add("equal", 3, 2100, 40, dtype=dtype, pattern="equal", marks=("ladder",))
        add("zeros", 3, 2100, 40, dtype=dtype, pattern="zeros")
        add("rising", 3, 5000, 40, dtype=dtype, pattern="rising")
        add("falling", 3, 5000, 40, dtype=dtype, pattern="falling")
        add("infinite", 5, 1067, 9, dtype=dtype, pattern="infinite", marks=("ladder",))
        add("poisoned", 6, 1067, 9, dtype=dtype, pattern="poisoned", marks=("ladder",))
        add("tempered", 5, 1200, 20, dtype=dtype, temperature=2.5)
        add("cold", 5, 1200, 20, dtype=dtype, temperature=0.05)
        add("strided", 5, 1100, 20, dtype=dtype, strided=True)
    for dtype in (FP32, BF16):
        add("late", 3, 5000, 40, dtype=dtype, pattern="late")
        add("wide", 3, 2000, 40, dtype=dtype, pattern="wide")
        add("prefix", 6, 90, 8, dtype=dtype, prefix=(2, 3))
        add("no_rows", 0, 90, 8, dtype=dtype)
        add("huge", 2, 151936, 64, dtype=dtype, marks=("slow",))
        gate = _case("bench", 8, 151936, 64, dtype=dtype)
        add("bench", 256, 151936, 64, dtype=dtype, marks=("bench", "slow"), gate=gate)
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    found = topk_logprobs(**inputs, impl=impl)
    return {
        "ids": found.ids.double(),
        "logprobs": found.logprobs,
        "tail": found.tail_logprob,
        "lse": found.lse,
    }


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    exact = {**inputs, "logits": inputs["logits"].double()}
    return {name: Expected(x) for name, x in run(case, exact, "reference", seed).items()}


CASES: list[Case] = _table()
