"""`convention=...` against each project's formula, written out here from probabilities.

Value and gradient; the gradient by autograd through the formula in fp64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pydistill import CONVENTIONS, divergence, divergence_jvp, divergence_with_stats

OP = "divergence"
close = torch.testing.assert_close
T = 2.0
Formula = Callable[[Tensor, Tensor], Tensor]  # of student and teacher logits, mean over rows


def pq(s: Tensor, t: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def mean(f: Callable[[Tensor, Tensor], Tensor], t: float = 1.0, factor: float = 1.0) -> Formula:
    return lambda student, teacher: factor * f(*pq(student, teacher, t)).mean()


def jsd(teacher_share: float, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """beta weighs KL(p || M); `teacher_share` is p's part of M."""

    def value(p: Tensor, q: Tensor) -> Tensor:
        m = teacher_share * p + (1 - teacher_share) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def soft_cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(p * q.log()).sum(-1)


FORMULAS: dict[tuple[str, str, str], tuple[dict[str, Any], Formula]] = {
    # Hinton et al. 2015: T^2 KL(p_T || q_T), here as torch users write it.
    ("hinton", "forward_kl", ""): (
        {"temperature": T},
        lambda s, t: T**2 * F.kl_div(
            F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean"
        ),
    ),
    # TRL's generalised JSD: no T^2; M = (1 - beta) q + beta p; the ends are the two KLs.
    ("trl", "jsd", "middle"): ({"beta": 0.3, "temperature": T}, mean(jsd(0.3, 0.3), T)),
    ("trl", "jsd", "beta 0"): ({"beta": 0, "temperature": T}, mean(kl, T)),
    ("trl", "jsd", "beta 1"): ({"beta": 1.0}, mean(lambda p, q: kl(q, p))),
    ("trl", "forward_kl", ""): ({"temperature": T}, mean(kl, T)),
    ("trl", "reverse_kl", ""): ({}, mean(lambda p, q: kl(q, p))),
    # Liger's JSD has TRL's meaning of beta; its TVD is half the L1 distance.
    ("liger", "jsd", "middle"): ({"beta": 0.1}, mean(jsd(0.1, 0.1))),
    ("liger", "jsd", "beta 0"): ({"beta": 0.0}, mean(kl)),
    ("liger", "jsd", "beta 1"): ({"beta": 1}, mean(lambda p, q: kl(q, p))),
    ("liger", "forward_kl", ""): ({}, mean(kl)),
    ("liger", "reverse_kl", ""): ({}, mean(lambda p, q: kl(q, p))),
    ("liger", "tvd", ""): ({}, mean(lambda p, q: (p - q).abs().sum(-1) / 2)),
    # DistillKit multiplies by T^2 whatever the divergence; its JSD is the symmetric one.
    ("distillkit", "forward_kl", ""): ({"temperature": T}, mean(kl, T, T**2)),
    ("distillkit", "jsd", ""): ({"temperature": T}, mean(jsd(0.5, 0.5), T, T**2)),
    ("distillkit", "tvd", ""): (
        {"temperature": T},
        mean(lambda p, q: (p - q).abs().sum(-1) / 2, T, T**2),
    ),
    # DistiLLM: lambda is the student's share of the JSD's mixture and weighs KL(q || M); the losses
    # from the teacher's side leave out the teacher's entropy.
    ("distillm", "jsd", "0.1"): ({"beta": 0.1}, mean(jsd(0.9, 0.9))),
    ("distillm", "jsd", "0.9"): ({"beta": 0.9}, mean(jsd(0.1, 0.1))),
    ("distillm", "forward_kl", ""): ({}, mean(soft_cross_entropy)),
    ("distillm", "reverse_kl", ""): ({}, mean(lambda p, q: kl(q, p))),
    ("distillm", "tvd", ""): ({}, mean(lambda p, q: (p - q).abs().sum(-1) / 2)),
    ("distillm", "skew_forward_kl", ""): (
        {"alpha": 0.1},
        mean(lambda p, q: soft_cross_entropy(p, 0.1 * p + 0.9 * q)),
    ),
    ("distillm", "skew_reverse_kl", ""): (
        {"alpha": 0.1},
        mean(lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    ),
    # torchtune's forward KL is a cross-entropy with soft targets.
    ("torchtune", "forward_kl", ""): ({}, mean(soft_cross_entropy)),
    ("torchtune", "reverse_kl", ""): ({}, mean(lambda p, q: kl(q, p))),
}  # fmt: skip


@pytest.mark.parametrize(("convention", "kind", "which"), FORMULAS)
def test_value_and_gradient(convention: str, kind: str, which: str, impl: str) -> None:
    options, formula = FORMULAS[convention, kind, which]
    student, teacher = torch.randn(2, 5, 12).unbind()
    exact = student.double().requires_grad_()
    want = formula(exact, teacher.double())
    (want_grad,) = torch.autograd.grad(want, exact)
    leaf = student.clone().requires_grad_()
    got = divergence(leaf, teacher, kind, convention=convention, impl=impl, **options)
    (grad,) = torch.autograd.grad(got, leaf)
    close(got.double(), want, rtol=1e-5, atol=1e-7)
    close(grad.double(), want_grad, rtol=1e-4, atol=1e-7)

    options = {**options, "convention": convention, "impl": impl}
    close(divergence_with_stats(student, teacher, kind, **options).loss, got.detach())
    tangent = torch.randn(5, 12)
    value, along = divergence_jvp(student, tangent, teacher, kind, **options)
    close(value, got.detach()), close(along, (grad * tangent).sum(), rtol=1e-4, atol=1e-6)


def test_every_convention_and_kind_is_pinned() -> None:
    assert {(c, k) for c, k, _ in FORMULAS} == {
        (name, kind) for name, rule in CONVENTIONS.items() for kind in rule.kinds
    }


def test_beta_per_row(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 12).unbind()
    beta = torch.tensor([0.2, 0.5, 0.9])
    rows = {"reduction": "none", "impl": impl}
    got = divergence(student, teacher, "jsd", beta=beta, convention="distillm", **rows)
    close(got, divergence(student, teacher, "jsd", beta=1 - beta, **rows))


def test_the_teacher_s_entropy_is_scaled_with_the_divergence(impl: str) -> None:
    """T^2 and the label's share reach the whole of the soft cross-entropy, row by row."""
    student, teacher = torch.randn(2, 4, 12).unbind()
    temperature, labels = torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.tensor([1, -100, 3, 4])
    got = divergence(
        student, teacher, convention="torchtune", temperature=temperature, scale_t2=True,
        labels=labels, label_weight=0.25, reduction="none", impl=impl,
    )  # fmt: skip
    k = temperature[:, None]
    soft = -(torch.softmax(teacher / k, -1) * torch.log_softmax(student / k, -1)).sum(-1)
    hard = F.cross_entropy(student, labels, reduction="none")
    want = torch.where(labels == -100, 0, 0.75 * temperature**2 * soft + 0.25 * hard)
    close(got, want)
    masked = divergence(student, teacher, convention="torchtune", labels=labels, impl=impl)
    kept = labels != -100
    plain = -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1)
    close(masked, plain[kept].mean())
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0])
    weighted = divergence(student, teacher, convention="torchtune", weight=weight, impl=impl)
    close(weighted, (plain * weight).sum() / 4)


def test_without_a_convention_the_ends_of_beta_raise() -> None:
    student, teacher = torch.randn(2, 3, 12).unbind()
    for convention in (None, "distillkit", "distillm"):
        for beta in (0.0, 1.0):
            with pytest.raises(ValueError, match="is outside"):
                divergence(student, teacher, "jsd", beta=beta, convention=convention)


def test_two_factors_of_t2_are_one() -> None:
    student, teacher = torch.randn(2, 3, 12).unbind()
    once = divergence(student, teacher, temperature=T, scale_t2=True)
    assert once == divergence(student, teacher, temperature=T, scale_t2=True, convention="hinton")
