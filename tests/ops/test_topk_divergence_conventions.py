"""`convention=...` of a teacher known on K tokens against each project's formula, written out here
from probabilities.

Value and gradient; the gradient by autograd through the formula in fp64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import TOPK_CONVENTIONS, linear_topk_divergence, topk_divergence, topk_divergence_jvp

OP = "topk_divergence"
close = torch.testing.assert_close
T = 2.0
Cells = tuple[Tensor, Tensor]  # the teacher's and the student's numbers, `[R, cells]`


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)


def reverse(p: Tensor, q: Tensor) -> Tensor:
    return kl(q, p)


def jsd(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def value(p: Tensor, q: Tensor) -> Tensor:
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def tvd(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def support(student: Tensor, log_p: Tensor, ids: Tensor, t: float) -> Cells:
    """p as recorded at t, and q under the full softmax."""
    return log_p.exp(), torch.softmax(student / t, -1).gather(1, ids)


def both_normalised(student: Tensor, log_p: Tensor, ids: Tensor, t: float) -> Cells:
    return torch.softmax(log_p, -1), torch.softmax(student.gather(1, ids) / t, -1)


def with_rest(p: Tensor, q: Tensor) -> Cells:
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return p, q


def bucket(*given: Any) -> Cells:
    return with_rest(*support(*given))


def missing_are_zero(student: Tensor, log_p: Tensor, ids: Tensor, t: float) -> Cells:
    """The teacher over the whole vocabulary: normalised on what was recorded, and 0 elsewhere."""
    p = torch.zeros_like(student).scatter(1, ids, torch.softmax(log_p, -1))
    return p, torch.softmax(student / t, -1)


def uniform_rest(student: Tensor, log_p: Tensor, ids: Tensor, t: float) -> Cells:
    """What was not recorded shares the rest evenly, on either side."""
    p, q = support(student, log_p, ids, t)
    rest = student.shape[1] - ids.shape[1]
    tails = ((1 - x.sum(-1, keepdim=True)).expand(-1, rest) / rest for x in (p, q))
    p, q = (torch.cat([x, tail], -1) for x, tail in zip((p, q), tails, strict=True))
    return p, q


# (convention, kind, tail): arguments, the cells, D, and what multiplies it.
FORMULAS: dict[tuple[str, str, str], tuple[dict[str, Any], Callable[..., Cells], Any, float]] = {
    ("axolotl", "forward_kl", "renormalize"): ({}, both_normalised, kl, 1),
    ("axolotl", "forward_kl", "truncate"): ({}, support, kl, 1),
    ("distillkit", "forward_kl", "zero"): ({"temperature": T}, missing_are_zero, kl, T**2),
    ("distillkit", "jsd", "zero"): ({"temperature": T}, missing_are_zero, jsd(0.5), T**2),
    ("distillkit", "tvd", "zero"): ({"temperature": T}, missing_are_zero, tvd, T**2),
    ("distillkit", "forward_kl", "bucket"): ({"temperature": T}, uniform_rest, kl, T**2),
    ("distillkit", "jsd", "bucket"): ({"temperature": T}, uniform_rest, jsd(0.5), T**2),
    ("distillkit", "tvd", "bucket"): ({"temperature": T}, uniform_rest, tvd, T**2),
    ("megatron", "forward_kl", "bucket"): ({}, bucket, kl, 1),
    ("nemo_rl", "forward_kl", "renormalize"): ({}, both_normalised, kl, 1),
    ("nemo_rl", "reverse_kl", "renormalize"): ({}, both_normalised, reverse, 1),
    ("trl", "forward_kl", "bucket"): ({"temperature": T}, bucket, kl, 1),
    ("trl", "reverse_kl", "bucket"): ({"temperature": T}, bucket, reverse, 1),
    ("trl", "jsd", "bucket"): ({"temperature": T, "beta": 0.3}, bucket, jsd(0.3), 1),
    ("trl", "forward_kl", "renormalize"): ({"temperature": T}, both_normalised, kl, 1),
    ("trl", "reverse_kl", "renormalize"): ({"temperature": T}, both_normalised, reverse, 1),
    ("trl", "jsd", "renormalize"): ({"beta": 0.3}, both_normalised, jsd(0.3), 1),
}
pinned = pytest.mark.parametrize(("convention", "kind", "tail"), FORMULAS)


def teacher(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Recorded at the call's temperature."""
    t = options.get("temperature", 1.0)
    return torch.log_softmax(2 * torch.randn(5, 12).double() / t, -1).topk(4)


@pinned
def test_value_and_gradient(convention: str, kind: str, tail: str, impl: str) -> None:
    options, cells, d, factor = FORMULAS[convention, kind, tail]
    log_p, ids = teacher(options)
    t = options.get("temperature", 1.0)
    student = torch.randn(5, 12)
    exact = student.double().requires_grad_()
    want = factor * d(*cells(exact, log_p, ids, t)).mean()
    (slope,) = torch.autograd.grad(want, exact)
    given: dict[str, Any] = {"convention": convention, "teacher_temperature": t, "impl": impl}
    given |= options
    if tail != TOPK_CONVENTIONS[convention].tails[0]:
        given["tail"] = tail
    leaf = student.clone().requires_grad_()
    got = topk_divergence(leaf, log_p.float(), ids, kind, **given)
    (grad,) = torch.autograd.grad(got, leaf)
    close(got.double(), want, rtol=1e-5, atol=1e-7)
    close(grad.double(), slope, rtol=1e-4, atol=1e-7)
    tangent = torch.randn(5, 12)
    along = topk_divergence_jvp(student, tangent, log_p.float(), ids, kind, **given)[1]
    close(along, (grad * tangent).sum(), rtol=1e-4, atol=1e-6)
    linear = linear_topk_divergence(leaf, torch.eye(12), log_p.float(), ids, kind, **given)
    close(linear, got, rtol=1e-5, atol=1e-7)
    close(torch.autograd.grad(linear, leaf)[0], grad, rtol=1e-4, atol=1e-6)


def test_every_convention_kind_and_tail_is_pinned() -> None:
    assert set(FORMULAS) == {
        (name, kind, tail)
        for name, rule in TOPK_CONVENTIONS.items()
        for kind in rule.kinds
        for tail in rule.tails
    }


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_ends_of_beta(tail: str, impl: str) -> None:
    student, (log_p, ids) = torch.randn(5, 12), teacher({})
    given: dict[str, Any] = {"tail": tail, "impl": impl}
    for beta, kind in ((0, "forward_kl"), (1.0, "reverse_kl")):
        want = topk_divergence(student, log_p, ids, kind, **given)
        given |= {"convention": "trl"}
        assert topk_divergence(student, log_p, ids, "jsd", beta=beta, **given) == want


def test_two_factors_of_t2_are_one(impl: str) -> None:
    given: dict[str, Any] = {"temperature": T, "scale_t2": True, "impl": impl}
    student, (log_p, ids) = torch.randn(5, 12), teacher({})
    want = topk_divergence(student, log_p, ids, tail="zero", **given)
    assert topk_divergence(student, log_p, ids, convention="distillkit", **given) == want


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"convention": "verl"}, "convention='verl' is not known; use one of axolotl, distillkit"),
    ({"convention": "megatron", "kind": "jsd"}, "does not define kind='jsd'; it has forward_kl"),
    ({"convention": "trl", "tail": "zero"}, "tail='zero'; it has bucket, renormalize"),
    ({"convention": "distillkit", "kind": "jsd", "beta": 0.3}, "beta is 0.3, but convention='dis"),
    ({"convention": "distillkit", "kind": "jsd", "beta": torch.ones(5) / 2}, "beta is a tensor"),
    ({"convention": "axolotl", "temperature": 2.0}, "temperature is 2.0, but convention='axolotl'"),
    ({"convention": "nemo_rl", "temperature": torch.ones(5)}, "temperature is a tensor"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_a_project_does_not_have(given: dict[str, Any], message: str, impl: str) -> None:
    log_p, ids = teacher({})
    with pytest.raises(ValueError, match=message):
        topk_divergence(torch.randn(5, 12), log_p, ids, impl=impl, **given)
    with pytest.raises(ValueError, match=message):
        linear_topk_divergence(
            torch.randn(5, 8), torch.randn(12, 8), log_p, ids, impl=impl, **given
        )
