"""`pydistill.token_logprob`, forward and backward, against eager PyTorch, `torch.compile` of it,
and TRL's function of the same outputs.

Every step takes the same logits and returns both outputs (or the log-probability alone) and the
gradient of their sum under fixed random upstreams. The floor is `z *= 1` over the same buffer: one
read and one write, as nothing with a gradient can avoid; forward and backward in two steps read
twice.
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
from pydistill import _registry, token_logprob
from pydistill.testing.cases.token_logprob import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Allowed relative error (2-norms) of the outputs and the gradient. TRL takes bf16's log-softmax in
# bf16.
LIMITS = {
    torch.float32: {"outputs": 1e-5, "grad": 1e-5},
    torch.bfloat16: {"outputs": 1e-5, "grad": 4e-3},
}
EAGER_LIMITS = {
    torch.float32: {"outputs": 1e-3, "grad": 1e-3},
    torch.bfloat16: {"outputs": 0.1, "grad": 0.1},
}
Outputs = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def eager(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    log_q = z.float().log_softmax(-1)
    return log_q.gather(-1, ids[:, None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


def eager_alone(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return (z.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1),)


def trl(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    found: tuple[Tensor, ...] = selective_log_softmax_and_entropy(z, ids)
    return found


def ours_alone(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return token_logprob(z, ids)[:1]


class Inputs:
    """The logits, tokens and upstreams of a case."""

    def __init__(self, case: Any, rows: int) -> None:
        given = case.inputs("cpu", 0)
        self.logits, self.ids = given["logits"][:rows], given["ids"][:rows]
        self.ups = tuple(torch.randn(2, rows))
        self.sample = torch.linspace(0, rows - 1, min(rows, 8)).long()

    def gate(
        self, count: int, limits: dict[str, float], output: tuple[tuple[Tensor, ...], Tensor]
    ) -> Gate:
        """The outputs and the gradient of the timed call on a few rows, against fp64."""
        few = self.logits[self.sample].double().requires_grad_()
        exact = token_logprob(few, self.ids[self.sample], impl="reference")[:count]
        ups = [up[self.sample].double() for up in self.ups[:count]]
        (slope,) = torch.autograd.grad(exact, few, ups)
        want, got = torch.stack(exact), torch.stack(output[0])[:, self.sample].double()
        off = output[1][self.sample].double() - slope
        errors = {
            "outputs": float(((got - want).norm() / want.norm()).detach()),
            "grad": float(off.norm() / slope.norm()),
        }
        return Gate(errors, limits)


def forward_backward(
    outputs: Outputs, leaf: Tensor, x: Inputs
) -> tuple[tuple[Tensor, ...], Tensor]:
    found = outputs(leaf, x.ids)
    ups = [up.to(out.dtype) for up, out in zip(x.ups, found, strict=False)]
    return tuple(out.detach() for out in found), torch.autograd.grad(found, leaf, ups)[0]


def step(x: Inputs, *, outputs: Outputs, limits: dict[str, float], count: int = 2) -> Step:
    leaf = x.logits.detach().requires_grad_()
    return Step(partial(forward_backward, outputs, leaf, x), check=partial(x.gate, count, limits))


def compiled_step(x: Inputs, *, outputs: Outputs, **arguments: Any) -> Step:
    torch.compiler.reset()
    return step(x, outputs=torch.compile(outputs, dynamic=False), **arguments)


def floor(x: Inputs) -> Step:
    z = x.logits.clone()
    return Step(partial(z.mul_, 1.0), partial(z.copy_, x.logits))


FLOOR = Contestant("floor: z *= 1", floor, "floor")
BOTH, ALONE = "logprob and entropy", "logprob alone"


def contestants(ours_at: dict[str, float], theirs: dict[str, float]) -> tuple[Contestant, ...]:
    peer = partial(step, limits=theirs)
    compiled = partial(compiled_step, outputs=eager, limits=theirs)
    return (
        Contestant(
            BOTH,
            partial(step, outputs=token_logprob, limits=ours_at),
            against=("eager both", "compiled both", "TRL both"),
        ),
        Contestant(
            ALONE,
            partial(step, outputs=ours_alone, limits=ours_at, count=1),
            against=("eager alone",),
        ),
        Contestant("eager both", partial(peer, outputs=eager), "peer"),
        Contestant("compiled both", compiled, "peer"),
        Contestant("TRL both", partial(peer, outputs=trl), "peer"),
        Contestant("eager alone", partial(peer, outputs=eager_alone, count=1), "peer"),
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
        chosen = _registry.explain(_registry.OPERATORS["token_logprob"], "cpu", dtype)
        out.append(
            Case(
                f"{DTYPES[dtype]} ({count}, {vocab})",
                bytes=table.bytes["backward"] * count / rows,
                flops=(table.flops["forward"] + table.flops["backward"]) * count / rows,
                inputs=partial(Inputs, table, count),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                contestants=contestants(LIMITS[dtype], EAGER_LIMITS[dtype]),
                claims=(
                    Claim(BOTH, "eager both", at_least=8.0),
                    Claim(BOTH, "compiled both", at_least=1.5),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_token_logprob(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
