"""`overwrite_logits=True`: the same gradient, in the logits' own memory, used once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import KINDS, divergence

OP = "divergence"
close = torch.testing.assert_close


def spent(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf, and a non-leaf over a copy of its numbers whose memory may be overwritten."""
    leaf = logits.detach().clone().requires_grad_()
    return leaf, leaf * 1


def both(student: Tensor, teacher: Tensor, kind: str, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradient in the default mode, then with overwriting."""
    leaf = student.detach().clone().requires_grad_()
    loss = divergence(leaf, teacher, kind, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    leaf, logits = spent(student)
    over = divergence(logits, teacher, kind, overwrite_logits=True, **options)
    (over_grad,) = torch.autograd.grad(over, leaf)
    return loss.detach(), grad, over.detach(), over_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_default_mode(kind: str, dtype: torch.dtype, impl: str) -> None:
    student, teacher = torch.randn(6, 37, dtype=dtype), torch.randn(6, 37)
    mask = torch.tensor([True, True, False, True, True, True])
    student[2] = math.nan
    weight, labels = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0]), torch.randint(0, 37, (6,))
    for options in (
        {"reduction": "sum", "temperature": 1.5},
        {"weight": weight, "labels": labels, "label_weight": 0.3, "z_loss": 0.1},
        {"denominator": 9.0, "temperature": torch.rand(6) + 0.5, "scale_t2": True},
    ):
        loss, grad, over, over_grad = both(student, teacher, kind, mask=mask, impl=impl, **options)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        close(over, loss, rtol=1e-5, atol=1e-7)
        close(over_grad, grad, rtol=tolerance, atol=1e-6)
        assert (over_grad[2] == 0).all() and grad.abs().sum() > 0


def test_memory_is_the_logits_own(impl: str) -> None:
    leaf, logits = spent(torch.randn(4, 9))
    address = logits.data_ptr()
    grads: list[Tensor] = []
    logits.register_hook(grads.append)
    loss = divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    loss.backward()
    assert grads[0].data_ptr() == address
    close(leaf.grad, grads[0])
    close(logits.detach(), grads[0])


@pytest.mark.parametrize("upstream", [3.0, -0.5, 0.0])
def test_upstream_other_than_one(upstream: float, impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    _, grad, *_ = both(student, teacher, "jsd", impl=impl)
    leaf, logits = spent(student)
    (upstream * divergence(logits, teacher, "jsd", overwrite_logits=True, impl=impl)).backward()
    close(leaf.grad, upstream * grad)


def test_second_backward_raises(impl: str) -> None:
    leaf, logits = spent(torch.randn(4, 9))
    loss = divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps one gradient, and backward has used it"):
        torch.autograd.grad(loss, leaf)


def test_second_derivatives_raise(impl: str) -> None:
    leaf, logits = spent(torch.randn(4, 9))
    loss = divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_whoever_saved_the_logits_gets_torch_s_error(impl: str) -> None:
    leaf, logits = spent(torch.randn(4, 9))
    z = torch.logsumexp(logits, -1).sum()  # saves the logits
    loss = divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss + z, leaf)


def test_version_counter_moves(impl: str) -> None:
    _, logits = spent(torch.randn(4, 9))
    before = logits._version
    divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    assert logits._version > before


def test_gradient_overwritten_by_the_user_is_noticed(impl: str) -> None:
    leaf, logits = spent(torch.randn(4, 9))
    loss = divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_row_indices(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 9), torch.randn(4, 9)
    rows = {"student_rows": torch.tensor([5, 0, 2]), "teacher_rows": torch.tensor([1, 1, 3])}
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss, grad, over, over_grad = both(
        student, teacher, "reverse_kl", weight=weight, impl=impl, **rows
    )
    close(over, loss), close(over_grad, grad)
    assert (over_grad.reshape(6, 9)[[0, 1, 3, 4]] == 0).all()
    rows["student_rows"] = torch.tensor([5, 0, 5])
    with pytest.raises(ValueError, match="student_rows has duplicates"):
        both(student, teacher, "reverse_kl", impl=impl, **rows)


def test_smaller_vocabulary(impl: str) -> None:
    loss, grad, over, over_grad = both(
        torch.randn(4, 9), torch.randn(4, 6), "tvd", vocab="min", impl=impl
    )
    close(over, loss), close(over_grad, grad)
    assert (over_grad[:, 6:] == 0).all()


def test_padded_rows_keep_what_lies_between(impl: str) -> None:
    buffer = torch.full((4, 12), 7.0)
    buffer[:, :9] = torch.randn(4, 9)
    logits = buffer[:, :9].detach().requires_grad_()
    view = logits.view_as(logits)
    loss = divergence(view, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (buffer[:, 9:] == 7).all()
    close(buffer[:, :9], grad)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_counted(rows: int, impl: str) -> None:
    student = torch.full((rows, 9), math.nan)
    *_, loss, grad = both(
        student, torch.randn(rows, 9), "jsd", mask=torch.zeros(rows).bool(), impl=impl
    )
    assert loss == 0 and (grad == 0).all()


def test_flagged_rows_stay_in_their_row(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 9).unbind()
    student[1, 2] = math.nan
    *_, loss, grad = both(student, teacher, "jsd", impl=impl)
    assert torch.isnan(loss) and torch.isnan(grad[1]).all()
    assert torch.isfinite(grad[[0, 2]]).all()


def test_without_grad_the_logits_stay(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    before = student.clone()
    got = divergence(student, teacher, overwrite_logits=True, impl=impl)
    with torch.no_grad():
        again = divergence(student.requires_grad_(), teacher, overwrite_logits=True, impl=impl)
    assert torch.equal(student.detach(), before) and got == again


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"reduction": "none"}, "reduction='mean' or 'sum', not 'none'"),
    "learned weight": (
        {"weight": torch.ones(4, requires_grad=True)},
        "gives no gradient to weight",
    ),
    "convention": ({"convention": "torchtune"}, "not offered under this convention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, impl: str) -> None:
    options, message = REFUSED[name]
    _, logits = spent(torch.randn(4, 9))
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl, **options)
    assert torch.equal(logits.detach(), before)


def test_refused_layout(impl: str) -> None:
    logits = torch.randn(9, 4, requires_grad=True).t() * 1
    assert logits.stride(-1) != 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=r"strides \(1, 4\); pass student_logits.contiguous"):
        divergence(logits, torch.randn(4, 9), overwrite_logits=True, impl=impl)
    assert torch.equal(logits.detach(), before)


def test_a_leaf_that_requires_grad(impl: str) -> None:
    """Torch forbids in-place writes to a leaf; the logits must still say so or stay right."""
    leaf, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    want = divergence(leaf.detach().clone().requires_grad_(), teacher, impl=impl)
    loss = divergence(leaf, teacher, overwrite_logits=True, impl=impl)
    assert loss == want
    loss.backward()
    close(leaf.grad, leaf.detach())
