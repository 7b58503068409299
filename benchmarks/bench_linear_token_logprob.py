"""`pydistill.linear_token_logprob`, forward and backward, against the same outputs of materialised
logits in eager PyTorch, and `torch.compile` of it.

Every step takes hidden states and weight of a head and returns the mean of both outputs under fixed
random upstreams, positive for the entropy and negative for the log-probability, so that nothing
cancels, and the gradients of hidden states and weight. The operator has one mode: it recomputes the
logits in backward. The floor is the products alone, by `torch.mm` into memory that is there, each
once: 6 N V H flops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import linear
from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim
from pydistill import linear_token_logprob
from pydistill.testing.cases.linear_token_logprob import CASES


def both(logprob: Tensor, entropy: Tensor, ups: Tensor) -> Tensor:
    return (ups[:, 1] * entropy - ups[:, 0] * logprob).mean()


def ours(h: Tensor, w: Tensor, ids: Tensor, ups: Tensor, **options: Any) -> Tensor:
    return both(*linear_token_logprob(h, w, ids, **options), ups)


def eager(h: Tensor, w: Tensor, ids: Tensor, ups: Tensor) -> Tensor:
    log_q = (h @ w.T).float().log_softmax(-1)
    logprob = log_q.gather(-1, ids[:, None]).squeeze(-1)
    return both(logprob, -(log_q.exp() * log_q).sum(-1), ups)


OURS = {"recompute": ours}


def inputs(case: Any, rows: int) -> linear.Inputs:
    given = case.inputs("cpu", 0)
    ups = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0))
    hidden, ids = given["hidden"][:rows], given["ids"][:rows]
    exact = partial(ours, impl="reference")
    return linear.Inputs(hidden, given["weight"], (ids, ups), exact=exact)


def cases(quick: bool = False) -> list[Case]:
    """The shapes of the case table."""
    out = []
    for table in CASES:
        if "bench" not in table.marks:
            continue
        dtype, h = linear.DTYPES[table.dtypes[0]], int(table.id.split("x")[-2])
        rows, vocab = linear.rows(table, quick), table.shape[1]
        out.append(
            linear.case(
                table,
                f"logprob and entropy {dtype} N = {rows}, H = {h}, V = {vocab}",
                quick,
                inputs,
                6.0 * table.shape[0] * vocab * h,
                contestants=linear.contestants(OURS, eager),
                claims=(
                    Claim("recompute", linear.FLOOR.name, at_most=1.8),
                    Claim("recompute", "compiled", at_least=1.0),
                    Claim("recompute", "eager", at_least=1.0),
                    Claim("recompute", "eager", at_most=0.1, of="memory"),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_linear_token_logprob(
    entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]
) -> None:
    record(entry)
