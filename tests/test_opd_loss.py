"""`opd_loss`: its mean gradient is the reverse KL's, by enumeration of every token and of every
sequence of two; and its arguments."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import divergence, token_logprob
from pydistill.losses import opd_loss

close = torch.testing.assert_close


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    """A student's, with gradient, and a teacher's."""
    z = 2 * torch.randn(2, *shape, dtype=torch.float64)
    return z[0].requires_grad_(), z[1]


def chosen(z: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    return token_logprob(z.expand(*ids.shape, -1), ids, temperature=temperature).logprob


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_mean_gradient_over_every_token(temperature: float) -> None:
    student, teacher = logits(7)
    tokens = torch.arange(7)
    q = torch.softmax(student / temperature, -1).detach()
    ours = chosen(student, tokens, temperature), chosen(teacher, tokens)
    loss = opd_loss(*ours, weight=q, reduction="sum")  # the mean over draws from q
    want = reverse_kl(student / temperature, teacher)
    (grad,), (slope,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (loss, want))
    close(grad, slope, rtol=1e-10, atol=1e-12)
    dense = divergence(student[None] / temperature, teacher[None], "reverse_kl", impl="reference")
    close(grad, torch.autograd.grad(dense, student)[0], rtol=1e-10, atol=1e-12)
    assert (torch.softmax(student.detach() - 0.1 * grad, -1) > 0).all()
    assert reverse_kl((student - 0.1 * grad) / temperature, teacher) < want  # a step goes down


def test_mean_gradient_over_every_sequence_of_two() -> None:
    """Per position, given its prefix: the prefix's probability is held fixed. Not the gradient of
    the sequences' KL, which also moves the first token towards prefixes that the teacher
    continues better."""
    v = 4
    first, first_teacher = logits(v)
    second, second_teacher = logits(v, v)  # [token before, token]
    a, b = torch.arange(v).repeat_interleave(v), torch.arange(v).repeat(v)
    student = torch.stack([chosen(first, a), token_logprob(second[a], b).logprob], 1)
    teacher = torch.stack(
        [chosen(first_teacher, a), token_logprob(second_teacher[a], b).logprob], 1
    )
    probability = student.sum(1).exp().detach()
    close(probability.sum(), torch.ones((), dtype=torch.float64))
    loss = opd_loss(student, teacher, weight=probability[:, None].expand(-1, 2), reduction="sum")
    prefix = torch.softmax(first, -1)
    now, then = reverse_kl(first, first_teacher), reverse_kl(second, second_teacher)
    want = now + (prefix.detach() * then).sum()
    got = torch.autograd.grad(loss, (first, second))
    close(
        got, torch.autograd.grad(want, (first, second), retain_graph=True), rtol=1e-10, atol=1e-12
    )
    whole = torch.autograd.grad(now + (prefix * then).sum(), first)[0]
    assert (got[0] - whole).abs().max() > 1e-3


def test_mean_of_draws_estimates_it() -> None:
    student, teacher = logits(5)
    tokens = torch.multinomial(torch.softmax(student.detach(), -1), 200_000, replacement=True)
    loss = opd_loss(chosen(student, tokens), chosen(teacher, tokens))
    (grad,), (slope,) = (
        torch.autograd.grad(x, student) for x in (loss, reverse_kl(student, teacher))
    )
    assert (grad - slope).abs().max() < 0.02  # standard error about 0.005


def test_value_and_gradient() -> None:
    student = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    teacher = torch.tensor([-2.0, -0.5, -3.0])
    rows = opd_loss(student, teacher, reduction="none")
    close(rows, torch.tensor([-1.0, 3.0, 0.0]))
    close(torch.autograd.grad(rows.sum(), student)[0], torch.tensor([1.0, -1.5, 0.0]))
    clipped = opd_loss(student, teacher, clip=1.25, reduction="none")
    close(torch.autograd.grad(clipped.sum(), student)[0], torch.tensor([1.0, -1.25, 0.0]))
    weight = torch.tensor([1.0, 3.0, 0.0])
    close(opd_loss(student, teacher), torch.tensor(2 / 3))
    close(opd_loss(student, teacher, weight=weight), torch.tensor(8 / 4))
    close(opd_loss(student, teacher, weight=weight, denominator=16.0), torch.tensor(0.5))
    close(opd_loss(student, teacher, mask=weight > 1), torch.tensor(3.0))
    close(opd_loss(student, teacher, mask=weight > 9), torch.tensor(0.0))
    assert opd_loss(student[:0], teacher[:0]) == 0


def test_tokens_that_do_not_count() -> None:
    student = torch.tensor([[-1.0, math.nan], [-math.inf, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-2.0, -1.0], [math.nan, -1.0]])
    mask = torch.tensor([[True, False], [False, True]])
    for given in ({"mask": mask}, {"weight": mask.float()}):
        loss = opd_loss(student, teacher, **given)
        close(loss, torch.tensor((-1.0 + 6.0) / 2))
        (grad,) = torch.autograd.grad(loss, student)
        close(grad, torch.tensor([[0.5, 0.0], [0.0, -1.0]]))


def test_a_token_that_the_teacher_excludes() -> None:
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    teacher = torch.tensor([-math.inf, -2.5])
    assert opd_loss(student, teacher, reduction="none")[0].isinf()
    loss = opd_loss(student, teacher, clip=5.0, reduction="sum")
    close(torch.autograd.grad(loss, student)[0], torch.tensor([5.0, 0.5]))


def test_importance_ratio_as_a_weight() -> None:
    """The mean over another sampler's draws, each weighed by q / sampler, is still the reverse
    KL's gradient, and that of the ratio form -advantage * ratio."""
    student, teacher = logits(6)
    sampler = torch.log_softmax(torch.randn(6, dtype=torch.float64), -1)
    tokens = torch.arange(6)
    ours, theirs = chosen(student, tokens), chosen(teacher, tokens)
    ratio = (ours - sampler).exp()
    per_draw = sampler.exp()
    loss = opd_loss(ours, theirs, weight=(per_draw * ratio).detach(), reduction="sum")
    other = (per_draw * ratio * -(theirs - ours).detach()).sum()
    want = torch.autograd.grad(reverse_kl(student, teacher), student)[0]
    for x in (loss, other):
        close(torch.autograd.grad(x, student, retain_graph=True)[0], want)


def test_dtypes_and_strides() -> None:
    student = torch.randn(3, 4).bfloat16().T.requires_grad_()
    teacher = torch.randn(4, 3).double()
    loss = opd_loss(student, teacher)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, student)[0].dtype == (
        torch.bfloat16
    )
    want = -(teacher.float() - student.float()) * student.float()
    close(opd_loss(student, teacher, reduction="none"), want)
    assert opd_loss(student.double(), teacher).dtype == torch.float64
    compiled = torch.compile(opd_loss, fullgraph=True, backend="aot_eager")
    close(compiled(student, teacher, clip=0.5), opd_loss(student, teacher, clip=0.5))


X = -torch.rand(3)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shapes": ({"teacher_logprob": X[:2]}, ValueError, r"teacher_logprob has shape \(2,\)"),
    "teacher with gradient": (
        {"teacher_logprob": X.clone().requires_grad_()},
        ValueError,
        "teacher_logprob requires grad",
    ),
    "weight with gradient": (
        {"weight": X.clone().requires_grad_()},
        ValueError,
        "weight requires grad",
    ),
    "integers": ({"student_logprob": X.long()}, TypeError, "student_logprob is torch.int64"),
    "list": ({"teacher_logprob": [0.0]}, TypeError, "teacher_logprob is list"),
    "clip": ({"clip": 0.0}, ValueError, "clip=0 is outside"),
    "clip negative": ({"clip": -1.0}, ValueError, "clip=-1 is outside"),
    "mask": ({"mask": X}, TypeError, "mask is torch.float32"),
    "weight shape": ({"weight": X[:2]}, ValueError, "weight has shape"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction='avg' is not known"),
    "denominator": ({"denominator": 0.0}, ValueError, "denominator=0 is outside"),
    "denominator of a sum": (
        {"denominator": 2.0, "reduction": "sum"},
        ValueError,
        "belongs to reduction='mean'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    given, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        opd_loss(**{"student_logprob": X, "teacher_logprob": X, **given})
