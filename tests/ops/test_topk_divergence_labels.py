"""Labels and z-loss of `topk_divergence` and `linear_topk_divergence`: the reference against the
formula, and what the tables of cases, which hold the kernels to the reference, do not reach."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from pydistill import (
    divergence,
    linear_topk_divergence,
    topk_divergence,
    topk_divergence_jvp,
)

OP = "topk_divergence"
close = torch.testing.assert_close
HARD: dict[str, dict[str, Any]] = {
    "labels": {"label_weight": 0.3},
    "both": {"label_weight": 0.3, "z_loss": 1e-2},
    "labels alone": {"label_weight": 1.0},
    "z-loss alone": {"z_loss": 1e-2},
    "only ignored": {},
}
LABELS = torch.tensor([3, -100, 0, 11, 7])
hards = pytest.mark.parametrize("hard", HARD.values(), ids=HARD)


def teacher(k: int, v: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(5, v)
    return (*torch.log_softmax(logits, -1).topk(k), logits)


def formula(
    student: Tensor, log_p: Tensor, ids: Tensor, label_weight: float = 0, z_loss: float = 0
) -> Tensor:
    """Rows with the forward KL at T = 2, T^2, and a renormalised support."""
    p = torch.softmax(log_p.double() / 2, -1)
    log_q = torch.log_softmax(student.gather(1, ids) / 2, -1)
    soft = 4 * (p * (p.log() - log_q)).sum(-1)
    rows = (1 - label_weight) * soft + z_loss * torch.logsumexp(student, -1) ** 2
    rows = rows + label_weight * F.cross_entropy(student, LABELS, reduction="none")
    return torch.where(LABELS == -100, 0, rows)


@hards
def test_reference_against_the_formula(hard: dict[str, Any]) -> None:
    log_p, ids, _ = teacher(4)
    student = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"tail": "renormalize", "temperature": 2.0, "scale_t2": True}
    options |= {"labels": LABELS, "impl": "reference", **hard}
    want, upstream = formula(student, log_p, ids, **hard), torch.randn(5, dtype=torch.float64)
    got = topk_divergence(student, log_p, ids, reduction="none", **options)
    close(got, want, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(x, student, upstream, retain_graph=True)[0] for x in (got, want)]
    close(*slopes, rtol=1e-8, atol=1e-11)
    for reduction, size in (({}, 4), ({"reduction": "sum"}, 1), ({"denominator": 7.0}, 7)):
        found = topk_divergence(student, log_p, ids, **options, **reduction)
        close(found, want.sum() / size, rtol=1e-9, atol=1e-12)


@hards
def test_whole_vocabulary_is_divergence(hard: dict[str, Any], impl: str) -> None:
    """Also where rows do not count: no gradient there at all."""
    log_p, ids, logits = teacher(12)
    student = torch.randn(5, 12, requires_grad=True)
    options: dict[str, Any] = {"labels": LABELS, "reduction": "none", "impl": impl, **hard}
    options["mask"] = torch.tensor([True, True, True, True, False])
    options["weight"] = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    want = divergence(student, logits, "jsd", **options)
    got = topk_divergence(student, log_p, ids, "jsd", tail="truncate", **options)
    close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.rand(5)
    grads = [torch.autograd.grad(x, student, upstream)[0] for x in (got, want)]
    close(*grads, rtol=1e-4, atol=1e-6)
    assert not grads[0][[1, 2, 4]].any() and grads[0][[0, 3]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [12, 5000])
def test_z_loss_has_its_own_gradient_alone(v: int, dtype: torch.dtype, each_cpu: str) -> None:
    """That of the divergence of a row from itself, which carries it, is 0 in every bit."""
    student = (3 * torch.randn(5, v)).to(dtype).requires_grad_()
    log_p, ids = torch.log_softmax(student.detach().double(), -1).topk(12)
    exact = student.detach().double().requires_grad_()
    want = torch.logsumexp(exact, -1).square()
    upstream = torch.zeros(5)
    upstream[1], upstream[3] = 1.0, -2.0
    got = topk_divergence(
        student, log_p, ids, "tvd", tail="truncate", z_loss=1.0, reduction="none", impl=each_cpu
    )
    soft = topk_divergence(
        student, log_p, ids, "tvd", tail="truncate", reduction="none", impl=each_cpu
    )
    close((got - soft).double(), want, rtol=2e-6, atol=1e-5)
    (slope,) = torch.autograd.grad(want, exact, upstream.double())
    (both,), (one,) = (torch.autograd.grad(x, student, upstream) for x in (got, soft))
    off = torch.ones_like(exact, dtype=torch.bool).scatter(1, ids, False)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    close((both.double() - one.double())[off], slope[off], rtol=rounding, atol=1e-6)


def test_tokens_of_no_probability(impl: str) -> None:
    """A padded vocabulary adds nothing; a label of probability 0 is +inf, as in `divergence`."""
    log_p, ids, logits = teacher(12)
    logits[:, -2:] = -math.inf
    log_p, ids = torch.log_softmax(logits, -1).topk(12)
    student = torch.randn(5, 12)
    student[:, -2:] = -math.inf
    student.requires_grad_()
    options: dict[str, Any] = {"labels": LABELS, "reduction": "none", "impl": impl, **HARD["both"]}
    want = divergence(student, logits, **options)
    got = topk_divergence(student, log_p, ids, **options)
    assert got[3] == math.inf
    close(got, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x.nan_to_num(0, 0, 0).sum(), student)[0] for x in (got, want)]
    close(*grads, rtol=1e-4, atol=1e-6, equal_nan=True)


@hards
def test_every_way_to_a_derivative(hard: dict[str, Any], impl: str) -> None:
    log_p, ids, _ = teacher(4)
    options: dict[str, Any] = {"labels": LABELS, "impl": impl, **hard}
    f = lambda s: topk_divergence(s, log_p, ids, "jsd", **options)
    student, tangent = torch.randn(5, 12, requires_grad=True), torch.randn(5, 12)
    loss = f(student)
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    close(torch.autograd.grad(3 * loss, student)[0], 3 * grad)
    close(torch.func.grad(f)(student.detach()), grad)
    want = (grad * tangent).sum()
    value, along = torch.func.jvp(f, (student.detach(),), (tangent,))
    close(along, want, rtol=1e-4, atol=1e-6), close(value, f(student).detach())
    value, along = topk_divergence_jvp(student, tangent, log_p, ids, "jsd", **options)
    close(along, want, rtol=1e-4, atol=1e-6), close(value, f(student).detach())
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(student.detach(), tangent))
        close(forward_ad.unpack_dual(dual).tangent, want, rtol=1e-4, atol=1e-6)
    batch = torch.randn(3, 5, 12)
    close(torch.vmap(f)(batch), torch.stack([f(x) for x in batch]))
    slopes = torch.vmap(torch.func.grad(f))(batch)
    close(slopes, torch.stack([torch.func.grad(f)(x) for x in batch]))


@pytest.mark.parametrize("hard", [HARD["both"], HARD["z-loss alone"]], ids=["both", "z-loss"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_second_derivatives(kind: str, hard: dict[str, Any]) -> None:
    log_p, ids, _ = teacher(4)
    student = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"labels": LABELS, "impl": "reference", **hard}
    f = lambda s: topk_divergence(s, log_p, ids, kind, reduction="none", **options)
    assert torch.autograd.gradcheck(f, student)
    assert torch.autograd.gradgradcheck(f, student)


def test_second_derivatives_raise_in_kernels(kernel_impl: str) -> None:
    log_p, ids, _ = teacher(4)
    student = torch.randn(5, 12, requires_grad=True)
    loss = topk_divergence(student, log_p, ids, z_loss=0.1, impl=kernel_impl)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@hards
def test_linear_reference_is_that_of_the_logits(hard: dict[str, Any]) -> None:
    head = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (12, 8), (12,))]
    hidden, weight, bias = (x.requires_grad_() for x in head)
    teacher_and_kind = (*teacher(4)[:2], "jsd")
    options: dict[str, Any] = {"labels": LABELS, "weight": torch.rand(5), "impl": "reference"}
    options |= hard
    got = linear_topk_divergence(
        hidden, weight, *teacher_and_kind, student_bias=bias, student_softcap=5.0, **options
    )
    capped = 5 * torch.tanh((hidden @ weight.T + bias) / 5)
    want = topk_divergence(capped, *teacher_and_kind, **options)
    close(got, want)
    close(*(torch.autograd.grad(x, head) for x in (got, want)))


@pytest.mark.parametrize("gradient", ["recompute", "in_forward"])
def test_tiles_of_the_head_do_not_matter(gradient: str, each_cpu: str, monkeypatch: Any) -> None:
    from pydistill.ops import _linear_head

    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    log_p, ids, _ = teacher(4)
    outcomes = []
    for rows, tile_rows, columns in ((192, 1024, 2048), (2, 3, 5)):
        monkeypatch.setattr(_linear_head, "BLOCK_ROWS", rows)
        monkeypatch.setattr(_linear_head, "TILE_ROWS", tile_rows)
        monkeypatch.setattr(_linear_head, "TILE_COLUMNS", columns)
        loss = linear_topk_divergence(
            hidden, weight, log_p, ids, labels=LABELS, gradient=gradient, impl=each_cpu,
            **HARD["both"],
        )  # fmt: skip
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    close(*outcomes, rtol=1e-5, atol=1e-6)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"label_weight": 0.5}, ValueError, "label_weight=0.5 needs labels"),
    ({"label_weight": 1.5, "labels": LABELS}, ValueError, r"label_weight=1.5 is outside \[0, 1\]"),
    ({"labels": LABELS + 1}, ValueError, "labels holds -99, which is neither a token"),
    ({"labels": LABELS.int()}, TypeError, "labels is torch.int32"),
    ({"z_loss": math.inf}, TypeError, "z_loss is inf"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_wrong_arguments(
    given: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    log_p, ids, _ = teacher(4)
    calls: list[Callable[..., Tensor]] = [
        lambda **more: topk_divergence(torch.randn(5, 12), log_p, ids, **more),
        lambda **more: linear_topk_divergence(
            torch.randn(5, 8), torch.randn(12, 8), log_p, ids, **more
        ),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call(impl=impl, **given)


def test_overwritten_logits_cannot_be_read_again(impl: str) -> None:
    log_p, ids, _ = teacher(4)
    student = torch.randn(5, 12, requires_grad=True)
    options: dict[str, Any] = {"labels": LABELS, "overwrite_logits": True, "impl": impl}
    with pytest.raises(ValueError, match=r"label_weight=0.3 and z_loss=0.01.*overwrite_logits=F"):
        topk_divergence(student * 1, log_p, ids, **options, **HARD["both"])
    loss = topk_divergence(student * 1, log_p, ids, **options)  # which rows count is no hard term
    (grad,) = torch.autograd.grad(loss, student)
    want = topk_divergence(student, log_p, ids, labels=LABELS, impl=impl)
    close(loss, want), close(grad, torch.autograd.grad(want, student)[0], rtol=1e-5, atol=1e-7)
