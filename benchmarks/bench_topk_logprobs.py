"""`pydistill.topk_logprobs` against what teacher servers do in eager PyTorch, and `torch.compile`
of it.

Every step takes the same logits and returns the K most likely tokens, their log-probabilities, the
log of the rest's mass and the normaliser. The floor is a sum over the same buffer, read as fp32:
one read, as no selection can avoid.
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
from pydistill import TopkLogprobs, _registry, topk_logprobs
from pydistill.testing.cases.topk_logprobs import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LIMITS = {"logprobs": 1e-5, "tail": 1e-5, "lse": 1e-5, "wrong logits": 0.0}
Found = TopkLogprobs | tuple[Tensor, Tensor, Tensor, Tensor]


def with_log_softmax(x: Tensor, k: int) -> Found:
    logprobs, ids = x.float().log_softmax(-1).topk(k)
    tail = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - 1e-7))
    return ids, logprobs, tail, x.gather(-1, ids[:, :1]).float()[:, 0] - logprobs[:, 0]


def with_logsumexp(x: Tensor, k: int) -> Found:
    values, ids = x.topk(k)
    lse = torch.logsumexp(x.float(), -1)
    logprobs = values.float() - lse[:, None]
    tail = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - 1e-7))
    return ids, logprobs, tail, lse


class Inputs:
    """The logits of a case, and on a few of its rows the truth in fp64."""

    def __init__(self, case: Any, rows: int) -> None:
        given = case.inputs("cpu", 0)
        self.logits, self.k = given["logits"][:rows], given["k"]
        self.sample = torch.linspace(0, rows - 1, min(rows, 8)).long()

    def gate(self, output: Found) -> Gate:
        """Errors on those rows. Peers may order equal logits as they like: logits are compared."""
        few = self.logits[self.sample].double()
        want = topk_logprobs(few, self.k, impl="reference")
        ids, *values = (x[self.sample] for x in output)
        errors = {
            name: float((x.double() - y).abs().max())
            for name, x, y in zip(("logprobs", "tail", "lse"), values, want[1:], strict=True)
        }
        errors["wrong logits"] = float((few.gather(-1, ids) != few.gather(-1, want.ids)).sum())
        return Gate(errors, LIMITS)


def step(x: Inputs, *, find: Callable[[Tensor, int], Found]) -> Step:
    return Step(partial(find, x.logits, x.k), check=x.gate)


def compiled_step(x: Inputs, *, find: Callable[[Tensor, int], Found]) -> Step:
    torch.compiler.reset()
    return step(x, find=torch.compile(find, dynamic=False))


def floor(x: Inputs) -> Step:
    return Step(partial(torch.sum, x.logits.flatten().view(torch.float32)))


PEERS = {"log_softmax + topk": with_log_softmax, "topk + logsumexp": with_logsumexp}
NAMES = tuple(f"{how} {name}" for name in PEERS for how in ("eager", "compiled"))
FLOOR = Contestant("floor: one read", floor, "floor")
CONTESTANTS = (
    Contestant("topk_logprobs", partial(step, find=topk_logprobs), against=NAMES),
    *(Contestant(f"eager {n}", partial(step, find=f), "peer") for n, f in PEERS.items()),
    *(
        Contestant(f"compiled {n}", partial(compiled_step, find=f), "peer")
        for n, f in PEERS.items()
    ),
    FLOOR,
)


def cases(quick: bool = False) -> list[Case]:
    """The shape and the dtypes of the case table."""
    out = []
    for table in CASES:
        if "bench" not in table.marks:
            continue
        (rows, vocab), dtype = table.shape, table.dtypes[0]
        count = min(rows, 32) if quick else rows
        chosen = _registry.explain(_registry.OPERATORS["topk_logprobs"], "cpu", dtype)
        out.append(
            Case(
                f"{DTYPES[dtype]} ({count}, {vocab}), K = {table.options['k']}",
                bytes=table.bytes["forward"] * count / rows,
                flops=table.flops["forward"] * count / rows,
                inputs=partial(Inputs, table, count),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                contestants=CONTESTANTS,
                claims=(
                    Claim("topk_logprobs", "eager log_softmax + topk", at_least=8.0),
                    Claim("topk_logprobs", FLOOR.name, at_most=2.5),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_topk_logprobs(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
