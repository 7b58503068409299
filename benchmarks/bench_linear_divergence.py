"""`pydistill.linear_divergence`, forward and backward, against the same loss of materialised logits
in eager PyTorch, `torch.compile` of it, and the fused-linear losses of other projects.

Every step takes hidden states and weights of both heads and returns the mean forward KL and the
gradients of the student's hidden states and weight. The floor is the products alone, by `torch.mm`
into memory that is there: 6 N V H_s + 2 N V H_t flops; the logits are computed once.

`torch.nn.functional.linear_cross_entropy` has the same gradient and no teacher's entropy in its
value; the teacher's probabilities, which it takes, are computed inside its step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry, linear_divergence
from pydistill.testing.cases.linear_divergence import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Logits rounded to bf16, as `torch.mm` rounds them, cost the peers up to 1e-2 of the loss.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
THEIR_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(s: Tensor, w: Tensor, t: Tensor, v: Tensor, **options: Any) -> Tensor:
    return linear_divergence(s, w, t, v, **options)


def eager(s: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
    log_p = (t @ v.T).float().log_softmax(-1)
    log_q = (s @ w.T).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def trl(s: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(s, w, None, t, v, None, 0.0, 1.0)[0].mean()


def liger(s: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0, compiled=False
    )
    found = loss(s, w, t, v, torch.zeros(len(s), dtype=torch.int64))
    return found[0] if isinstance(found, tuple) else found


def linear_cross_entropy(s: Tensor, w: Tensor, t: Tensor, v: Tensor) -> Tensor:
    return F.linear_cross_entropy(s, w, (t @ v.T).float().softmax(-1).to(s.dtype))


class Inputs:
    """Heads and hidden states of a case."""

    def __init__(self, case: Any, rows: int) -> None:
        given = case.inputs("cpu", 0)
        self.tensors: tuple[Tensor, ...] = (
            given["student_hidden"][:rows], given["student_weight"],
            given["teacher_hidden"][:rows], given["teacher_weight"],
        )  # fmt: skip

    def gate(
        self, loss: Loss, limit: float, has_value: bool, output: tuple[Tensor, Tensor, Tensor]
    ) -> Gate:
        """The timed call's gradient of a few hidden states, and the loss and the weight's gradient
        of a call on those rows alone, against fp64."""
        s, w, t, v = self.tensors
        at = torch.linspace(0, len(s) - 1, min(len(s), 8)).long()
        exact = partial(ours, impl="reference")
        want, *slopes = forward_backward(
            exact, s[at].double(), w.double(), t[at].double(), v.double()
        )
        value, _, weight = forward_backward(loss, s[at], w, t[at], v)
        hidden = output[1][at].double() * (len(s) / len(at))
        errors = {
            "loss": float(abs(value - want) / want),
            "hidden": float((hidden - slopes[0]).norm() / slopes[0].norm()),
            "weight": float((weight.double() - slopes[1]).norm() / slopes[1].norm()),
        }
        if not has_value:
            del errors["loss"]
        return Gate(errors, dict.fromkeys(errors, limit))


def forward_backward(
    loss: Loss, s: Tensor, w: Tensor, t: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = (s.detach().requires_grad_(), w.detach().requires_grad_())
    value = loss(*leaves, t, v)
    return value.detach(), *torch.autograd.grad(value, leaves)


def step(x: Inputs, *, loss: Loss, limits: dict[torch.dtype, float], value: bool = True) -> Step:
    limit = limits[x.tensors[0].dtype]
    return Step(
        partial(forward_backward, loss, *x.tensors),
        check=partial(x.gate, loss, limit, value),
    )


def compiled_step(x: Inputs, **arguments: Any) -> Step:
    torch.compiler.reset()
    return step(x, loss=torch.compile(eager, dynamic=False), **arguments)


def products(x: Inputs) -> Step:
    """Every product of the loss and its gradients, and nothing else."""
    s, w, t, v = x.tensors
    logits, hidden, weight = s.new_empty(len(s), len(w)), torch.empty_like(s), torch.empty_like(w)

    def run() -> None:
        torch.mm(t, v.T, out=logits)
        torch.mm(s, w.T, out=logits)
        torch.mm(logits, w, out=hidden)
        torch.mm(logits.T, s, out=weight)

    return Step(run)


FLOOR = Contestant("floor: torch.mm", products, "floor")
PEERS = {"TRL": trl, "Liger": liger}


def contestants() -> tuple[Contestant, ...]:
    names = ("eager", "compiled", *PEERS, "linear_cross_entropy")
    out = [
        Contestant(
            mode, partial(step, loss=partial(ours, gradient=mode), limits=LIMITS), against=names
        )
        for mode in ("in_forward", "recompute")
    ]
    their = partial(step, limits=THEIR_LIMITS)
    out += [
        Contestant("eager", partial(their, loss=eager), "peer"),
        Contestant("compiled", partial(compiled_step, limits=THEIR_LIMITS), "peer"),
        *(Contestant(name, partial(their, loss=loss), "peer") for name, loss in PEERS.items()),
        Contestant(
            "linear_cross_entropy", partial(their, loss=linear_cross_entropy, value=False), "peer"
        ),
        FLOOR,
    ]
    return tuple(out)


def claims(rows: int) -> tuple[Claim, ...]:
    if rows < 64:
        return (Claim("in_forward", "eager", at_most=1.05),)
    fused = (*PEERS, "linear_cross_entropy")
    return (
        Claim("in_forward", FLOOR.name, at_most=1.3),
        Claim("recompute", FLOOR.name, at_most=1.8),
        Claim("in_forward", "compiled", at_least=1.15),
        Claim("in_forward", "eager", at_least=1.6),
        *(Claim("in_forward", peer, at_least=1.0) for peer in fused),
    )


def cases(quick: bool = False) -> list[Case]:
    """Forward KL at the shapes and the dtypes of the case table."""
    out = []
    for table in CASES:
        if "bench" not in table.marks or (quick and table.shape[1] > 50000):
            continue
        (rows, vocab), dtype = table.shape, table.dtypes[0]
        h = int(table.id.split("x")[-2])
        count = min(rows, 32) if quick else rows
        chosen = _registry.explain(_registry.OPERATORS["linear_divergence"], "cpu")
        out.append(
            Case(
                f"forward_kl {DTYPES[dtype]} N = {count}, H = {h} and 2048, V = {vocab}",
                bytes=0,
                flops=table.flops["in_forward"] * count / rows,
                inputs=partial(Inputs, table, count),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                contestants=contestants(),
                claims=claims(rows),
                roof="mm_fp32" if dtype == torch.float32 else "mm_bf16",
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_linear_divergence(
    entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]
) -> None:
    record(entry)
