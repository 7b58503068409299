"""`pydistill.linear_topk_divergence`, forward and backward, against the same loss of materialised
logits in eager PyTorch, and `torch.compile` of it.

Every step takes hidden states and weight of the student's head and recorded top-k of a teacher, and
returns the mean forward KL with the tail as one cell and the gradients of hidden states and weight.
The floor is the products alone, by `torch.mm` into memory that is there: 6 N V H flops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from benchmarks import linear
from benchmarks.bench_topk_divergence import bucket
from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim
from pydistill import linear_topk_divergence
from pydistill.testing.cases.linear_topk_divergence import CASES


def ours(s: Tensor, w: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor, **options: Any) -> Tensor:
    return linear_topk_divergence(s, w, log_p, ids, tail_logprob=tail, **options)


def eager(s: Tensor, w: Tensor, log_p: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
    return bucket(s @ w.T, log_p, ids, tail)


OURS = {mode: partial(ours, gradient=mode) for mode in ("in_forward", "recompute")}


def inputs(case: Any, rows: int) -> linear.Inputs:
    given = case.inputs("cpu", 0)
    teacher = tuple(given[name][:rows] for name in ("topk_logprobs", "topk_ids", "tail_logprob"))
    hidden, weight = given["student_hidden"][:rows], given["student_weight"]
    return linear.Inputs(hidden, weight, teacher, exact=partial(ours, impl="reference"))


def cases(quick: bool = False) -> list[Case]:
    """The shapes of the case table, the smaller head alone with --quick."""
    out = []
    for table in CASES:
        h = int(table.id.split("x")[-2]) if "bench" in table.marks else 0
        if not h or (quick and h > 576):
            continue
        dtype, k = linear.DTYPES[table.dtypes[0]], table.id.rpartition("-k")[2]
        rows, vocab = linear.rows(table, quick), table.shape[1]
        out.append(
            linear.case(
                table,
                f"forward_kl bucket {dtype} N = {rows}, H = {h}, V = {vocab}, K = {k}",
                quick,
                inputs,
                table.flops["in_forward"],
                contestants=linear.contestants(OURS, eager),
                claims=(
                    Claim("in_forward", linear.FLOOR.name, at_most=1.3),
                    Claim("recompute", linear.FLOOR.name, at_most=1.8),
                    Claim("in_forward", "compiled", at_least=1.15),
                    Claim("in_forward", "eager", at_least=1.6),
                    *(Claim(mode, "eager", at_most=0.1, of="memory") for mode in OURS),
                ),
            )
        )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_linear_topk_divergence(
    entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]
) -> None:
    record(entry)
