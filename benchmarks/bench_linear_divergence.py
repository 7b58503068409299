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

from benchmarks import linear
from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim
from pydistill import linear_divergence
from pydistill.testing.cases.linear_divergence import CASES


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


OURS = {mode: partial(ours, gradient=mode) for mode in ("in_forward", "recompute")}
PEERS = {
    "TRL": (trl, True),
    "Liger": (liger, True),
    "linear_cross_entropy": (linear_cross_entropy, False),
}


class Inputs(linear.Inputs):
    """Heads and hidden states of a case."""

    def __init__(self, case: Any, rows: int) -> None:
        given = case.inputs("cpu", 0)
        super().__init__(
            given["student_hidden"][:rows],
            given["student_weight"],
            (given["teacher_hidden"][:rows], given["teacher_weight"]),
            exact=partial(ours, impl="reference"),
            wholes=(1,),
        )

    def products(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.others[0], self.others[1])]


def claims(rows: int) -> tuple[Claim, ...]:
    if rows < 64:
        return (Claim("in_forward", "eager", at_most=1.05),)
    floor = linear.FLOOR.name
    return (
        Claim("in_forward", floor, at_most=1.3),
        Claim("recompute", floor, at_most=1.8),
        Claim("in_forward", "compiled", at_least=1.15),
        Claim("in_forward", "eager", at_least=1.6),
        *(Claim("in_forward", peer, at_least=1.0) for peer in PEERS),
        *(Claim(mode, "eager", at_most=0.1, of="memory") for mode in OURS),
    )


def cases(quick: bool = False) -> list[Case]:
    """Forward KL at the shapes and the dtypes of the case table."""
    out = []
    for table in CASES:
        if "bench" not in table.marks or (quick and table.shape[1] > 50000):
            continue
        dtype, h = linear.DTYPES[table.dtypes[0]], int(table.id.split("x")[-2])
        rows, vocab = linear.rows(table, quick), table.shape[1]
        out.append(
            linear.case(
                table,
                f"forward_kl {dtype} N = {rows}, H = {h} and 2048, V = {vocab}",
                quick,
                Inputs,
                table.flops["in_forward"],
                contestants=linear.contestants(OURS, eager, PEERS),
                claims=claims(table.shape[0]),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_linear_divergence(
    entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]
) -> None:
    record(entry)
