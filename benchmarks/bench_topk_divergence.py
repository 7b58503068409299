"""`pydistill.topk_divergence`, forward and backward, against what other projects compute in eager
PyTorch, and `torch.compile` of it.

Every step takes the same student logits and recorded top-k and returns the loss and a gradient;
`overwrite_logits=True` writes it over logits that are restored outside the timed region. The floor
is `s *= 1` over the same buffer: one read and one write, as no loss with a gradient can avoid.

The peers are written out here after the formulas of docs/ops/topk_divergence.md: the tail bucket
by 1 - Q; verl's truncated sum, in which a row below 0 counts 0; axolotl's KL of both sides
renormalized over the support. Each of ours is compared with the peer of the same objective.
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
from pydistill import _registry, topk_divergence
from pydistill.testing.cases.topk_divergence import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LIMITS = {torch.float32: {"loss": 1e-5, "grad": 1e-5}, torch.bfloat16: {"loss": 1e-5, "grad": 4e-3}}
EAGER_LIMITS = {
    torch.float32: {"loss": 1e-3, "grad": 1e-3},
    torch.bfloat16: {"loss": 1e-3, "grad": 4e-3},
}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bucket(s: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
    log_q = s.float().log_softmax(-1).gather(-1, ids)
    log_qt = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) + tail.exp() * (tail - log_qt)
    return rows.mean()


def verl(s: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
    log_q = s.float().log_softmax(-1).gather(-1, ids)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).mean()


def axolotl(s: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
    log_q = s.float().log_softmax(-1).gather(-1, ids)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


PEERS = {
    "bucket": ("eager bucket", bucket),
    "truncate": ("eager verl (truncate)", verl),
    "renormalize": ("eager axolotl (renormalize)", axolotl),
}


def ours(
    s: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor, *, kind: str = "bucket", **more: Any
) -> Tensor:
    given = {"tail_logprob": tail} if kind == "bucket" else {}
    return topk_divergence(s, log_p, ids, tail=kind, **given, **more)


class Inputs:
    """The logits and the teacher of a case, and on a few of its rows the truth in fp64."""

    def __init__(self, case: Any, rows: int) -> None:
        given = case.inputs("cpu", 0)
        self.student = given["student_logits"][:rows]
        names = ("topk_logprobs", "topk_ids", "tail_logprob")
        self.teacher = tuple(given[name][:rows] for name in names)
        self.sample = torch.linspace(0, rows - 1, min(rows, 8)).long()

    def gate(
        self, tail: str, loss: Loss, limits: dict[str, float], output: tuple[Tensor, Tensor]
    ) -> Gate:
        """The gradient of the timed call on those rows, and the loss of a call on them alone."""
        few, teacher = self.student[self.sample], tuple(x[self.sample] for x in self.teacher)
        log_p, ids, mass = teacher
        exact = partial(ours, kind=tail, impl="reference")
        want, slope = forward_backward(
            exact, few.double().requires_grad_(), (log_p.double(), ids, mass.double())
        )
        found, _ = forward_backward(loss, few.clone().requires_grad_(), teacher)
        slope *= len(few) / len(self.student)  # both are means, over few rows and over all
        off = output[1][self.sample].double() - slope
        return Gate(
            {"loss": float(abs(found - want) / want), "grad": float(off.norm() / slope.norm())},
            limits,
        )


def forward_backward(
    loss: Loss, leaf: Tensor, teacher: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    value = loss(leaf, *teacher)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def step(
    x: Inputs, *, loss: Loss, tail: str, limits: dict[str, float], overwrite: bool = False
) -> Step:
    leaf = (x.student.clone() if overwrite else x.student.detach()).requires_grad_()
    restore = partial(leaf.detach().copy_, x.student) if overwrite else lambda: None
    return Step(
        partial(forward_backward, loss, leaf, x.teacher),
        restore,
        partial(x.gate, tail, loss, limits),
    )


def compiled_step(x: Inputs, *, loss: Loss, **arguments: Any) -> Step:
    torch.compiler.reset()
    return step(x, loss=torch.compile(loss, dynamic=False), **arguments)


def floor(x: Inputs) -> Step:
    s = x.student.clone()
    return Step(partial(s.mul_, 1.0), partial(s.copy_, x.student))


FLOOR = Contestant("floor: s *= 1", floor, "floor")


def contestants(ours_at: dict[str, float], theirs: dict[str, float]) -> tuple[Contestant, ...]:
    def against(tail: str) -> tuple[str, ...]:
        return (PEERS[tail][0], "compiled bucket") if tail == "bucket" else (PEERS[tail][0],)

    def over(tail: str) -> Callable[[Inputs], Step]:
        loss = partial(ours, kind=tail, overwrite_logits=True)
        return partial(step, loss=loss, tail=tail, limits=ours_at, overwrite=True)

    eager = partial(step, limits=theirs)
    return (
        Contestant(
            "bucket",
            partial(step, loss=ours, tail="bucket", limits=ours_at),
            against=against("bucket"),
        ),
        *(Contestant(f"{t}, overwrite_logits", over(t), against=against(t)) for t in PEERS),
        *(
            Contestant(name, partial(eager, loss=loss, tail=tail), "peer")
            for tail, (name, loss) in PEERS.items()
        ),
        Contestant(
            "compiled bucket",
            partial(compiled_step, loss=bucket, tail="bucket", limits=theirs),
            "peer",
        ),
        FLOOR,
    )


def cases(quick: bool = False) -> list[Case]:
    """Forward KL at the shape and the dtypes of the case table."""
    out = []
    for table in CASES:
        if "bench" not in table.marks:
            continue
        (rows, vocab), dtype = table.shape, table.dtypes[0]
        count = min(rows, 32) if quick else rows
        chosen = _registry.explain(_registry.OPERATORS["topk_divergence"], "cpu", dtype)
        subject, slots = "bucket, overwrite_logits", table.id.rpartition("-k")[2]
        out.append(
            Case(
                f"forward_kl {DTYPES[dtype]} ({count}, {vocab}), K = {slots}",
                bytes=table.bytes["overwrite"] * count / rows,
                flops=table.flops["overwrite"] * count / rows,
                inputs=partial(Inputs, table, count),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                contestants=contestants(LIMITS[dtype], EAGER_LIMITS[dtype]),
                claims=(
                    Claim(subject, "eager bucket", at_least=8.0),
                    Claim(subject, FLOOR.name, at_most=2.5),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_topk_divergence(
    entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]
) -> None:
    record(entry)
