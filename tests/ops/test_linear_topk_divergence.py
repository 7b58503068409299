"""`linear_topk_divergence`: the table of cases, and its arguments. What the fused-linear
operators share is in test_linear_head.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pydistill import TopkTeacher, linear_topk_divergence, topk_divergence
from pydistill.testing import Case, load

OP = "linear_topk_divergence"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))


def test_is_the_divergence_of_the_logits(impl: str) -> None:
    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    log_p, ids = torch.log_softmax(torch.randn(2, 3, 40), -1).topk(6)
    options: dict[str, Any] = {"kind": "jsd", "beta": 0.3}
    got = linear_topk_divergence(hidden, weight, log_p, ids, impl=impl, **options)
    want = topk_divergence(hidden @ weight.T, log_p, ids, impl=impl, **options)
    close(got, want, rtol=2e-5, atol=1e-6)


def test_takes_a_topk_teacher(impl: str) -> None:
    hidden, weight = torch.randn(6, 8), torch.randn(40, 8)
    log_p, ids = torch.log_softmax(torch.randn(6, 40), -1).topk(6)
    tail = torch.log1p(-log_p.exp().sum(-1))
    want = linear_topk_divergence(hidden, weight, log_p, ids, tail_logprob=tail, impl=impl)
    teacher = TopkTeacher(log_p, ids, tail, vocab_size=40)
    assert torch.equal(linear_topk_divergence(hidden, weight, teacher, impl=impl), want)
    with pytest.raises(ValueError, match="recorded over 41 tokens, but student_weight has 40"):
        linear_topk_divergence(hidden, weight, teacher._replace(vocab_size=41), impl=impl)


def test_wrong_ids(impl: str) -> None:
    hidden, weight = torch.randn(2, 8), torch.randn(40, 8)
    log_p = torch.full((2, 2), -2.0)
    for mode in ("recompute", "in_forward"):
        with pytest.raises(ValueError, match="token 7 twice in row 1"):
            ids = torch.tensor([[0, 1], [7, 7]])
            linear_topk_divergence(
                hidden.clone().requires_grad_(), weight, log_p, ids, gradient=mode, impl=impl
            )
        with pytest.raises(ValueError, match="topk_ids holds 40, but student_weight has 40"):
            linear_topk_divergence(
                hidden, weight, log_p, torch.tensor([[0, 1], [7, 40]]), gradient=mode, impl=impl
            )


def test_messages_name_what_was_passed(impl: str) -> None:
    hidden, weight = torch.randn(2, 8), torch.randn(40, 8)
    log_p, ids = torch.log_softmax(torch.randn(2, 40), -1).topk(39)
    with pytest.raises(ValueError, match=r"shape \(1, 39\), student_hidden the prefix \(2,\)"):
        linear_topk_divergence(hidden, weight, log_p[:1], ids[:1], impl=impl)
    log_p = log_p - torch.logsumexp(log_p, 1, keepdim=True)  # no tail that is more than rounding
    with pytest.warns(UserWarning, match=r"pydistill\.linear_topk_divergence: 1 minus") as caught:
        linear_topk_divergence(hidden, weight, log_p, ids, impl=impl)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_peaked_rows_keep_their_tail(kind: str, each_cpu: str) -> None:
    """A student's tail of about e^-17, through the head."""
    weight = torch.randn(4000, 32)
    hidden = torch.randn(6, 32) / 32**0.5
    hidden += torch.linspace(16, 20, 6)[:, None] * weight[7] / weight[7].square().sum()
    log_p, ids = torch.log_softmax(2 * torch.randn(6, 4000).double(), -1).topk(4)
    ids[:, 0] = torch.where((ids == 7).any(1), ids[:, 0], 7)
    tail = torch.log1p(-log_p.exp().sum(-1)).float()
    options: dict[str, Any] = {"tail_logprob": tail, "kind": kind, "reduction": "none"}
    exact = hidden.double().requires_grad_()
    want = linear_topk_divergence(
        exact, weight.double(), log_p.float(), ids, impl="reference", **options
    )
    (slope,) = torch.autograd.grad(want.sum(), exact)
    leaf = hidden.clone().requires_grad_()
    got = linear_topk_divergence(leaf, weight, log_p.float(), ids, impl=each_cpu, **options)
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    close(got.double(), want.detach(), rtol=1e-5, atol=0)
    error = (grad.double() - slope).norm(dim=1)
    assert (error <= 1e-5 * slope.norm(dim=1)).all()
