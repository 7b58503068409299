"""`matmul` at the shapes of fused-linear losses against `torch.mm` on fp32 operands.

`fp32` and `bf16` are the kernel on operands of that dtype, with an fp32 result, which is written to
(or added to) memory that is there already. `torch.mm fp32` is the floor: it is given what the bf16
kernel must first widen. The peers start from bf16: widened copies and `torch.mm`, and, for few
tokens, `torch.mm` as it is, whose result is bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry
from pydistill.ops.matmul import matmul
from pydistill.testing.cases.matmul import CASES

FLOOR = "torch.mm fp32"
FEW = 16


class Inputs:
    """The operands of a case in fp32 and bf16, one result for all contestants, and a few rows."""

    def __init__(self, table: Any, m: int, n: int) -> None:
        given = table.inputs("cpu", 0)
        a, b = given["a"][:m], given["b"][:, :n]
        self.operands = {
            torch.float32: (a, b),
            torch.bfloat16: (a.bfloat16(), b.bfloat16()),  # in the same order
        }
        self.accumulate = given.get("accumulate", False)
        self.out = torch.zeros(m, n)
        self.sample = torch.linspace(0, m - 1, min(m, 4)).long()

    def refresh(self) -> None:
        if self.accumulate:
            self.out.zero_()

    def gate(self, dtype: torch.dtype, limit: float, out: Tensor) -> Gate:
        a, b = self.operands[dtype]
        want = a[self.sample].double() @ b.double()
        error = (out[self.sample].double() - want).norm() / want.norm()
        return Gate({"product": float(error)}, {"product": limit})


def mm(x: Inputs, a: Tensor, b: Tensor) -> Tensor:
    if x.accumulate:
        return torch.addmm(x.out, a, b, out=x.out)
    return torch.mm(a, b, out=x.out)


def step(x: Inputs, *, dtype: torch.dtype) -> Step:
    a, b = x.operands[dtype]
    run = partial(matmul, a, b, out=x.out, accumulate=x.accumulate)
    return Step(run, x.refresh, partial(x.gate, dtype, 2e-6))


def floor(x: Inputs) -> Step:
    run = partial(mm, x, *x.operands[torch.float32])
    return Step(run, x.refresh, partial(x.gate, torch.float32, 2e-6))


def widened(x: Inputs) -> Step:
    a, b = x.operands[torch.bfloat16]

    def run() -> Tensor:
        return mm(x, a.float(), b.float())

    return Step(run, x.refresh, partial(x.gate, torch.bfloat16, 2e-6))


def narrow(x: Inputs) -> Step:
    run = partial(torch.mm, *x.operands[torch.bfloat16])
    return Step(run, x.refresh, partial(x.gate, torch.bfloat16, 4e-3))


def contestants(m: int) -> tuple[Contestant, ...]:
    peers = ("widened copies, torch.mm",) + (("torch.mm bf16",) if m <= FEW else ())
    found = (
        Contestant("fp32", partial(step, dtype=torch.float32), against=(FLOOR,)),
        Contestant("bf16", partial(step, dtype=torch.bfloat16), against=(FLOOR, *peers)),
        Contestant(FLOOR, floor, "floor"),
        Contestant(peers[0], widened, "peer"),
    )
    return (*found, Contestant("torch.mm bf16", narrow, "peer")) if m <= FEW else found


def cases(quick: bool = False) -> list[Case]:
    """The table's shapes; its fp32 entries stand for both dtypes."""
    out = []
    chosen = _registry.explain(_registry.OPERATORS["matmul"], "cpu")
    for table in CASES:
        if "bench" not in table.marks or table.dtypes[0] != torch.float32:
            continue
        m, k, n = table.shape
        if quick:
            m, n = min(m, 96), min(n, 1024)
        out.append(
            Case(
                f"{table.id.partition('-')[0]} [{m}, {k}] x [{k}, {n}]",
                bytes=2.0 * (m * k + k * n) + 4.0 * m * n,
                flops=2.0 * m * k * n,
                inputs=partial(Inputs, table, m, n),
                contestants=contestants(m),
                roof="mm_fp32" if m > FEW else "copy",
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                claims=(
                    Claim("fp32", FLOOR, at_least=1.0),
                    Claim("bf16", FLOOR, at_most=1 / 0.95),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_matmul(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
