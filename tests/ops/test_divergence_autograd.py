"""Derivatives of `divergence` as torch asks for them: backward, func, vmap, forward mode.

What is dropped silently is what these tests are after: a zero tangent, a zero second derivative, a
second backward that reuses spent memory.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import KINDS, divergence, divergence_jvp

OP = "divergence"
close = torch.testing.assert_close
SOME = ("forward_kl", "jsd", "adaptive_kl")
DETACHED = ("adaptive_kl", "todi")  # their weights have no gradient: not the slope of the value


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DETACHED])
def test_gradcheck(kind: str) -> None:
    student, teacher = logits(3, 7, dtype=torch.float64)
    labels, weight = torch.tensor([1, -100, 4]), torch.tensor([0.5, 1.0, 2.0]).double()

    def f(s: Tensor, w: Tensor) -> Tensor:
        return divergence(
            s, teacher, kind, temperature=1.5, scale_t2=True, labels=labels, label_weight=0.2,
            z_loss=0.1, weight=w, reduction="none", impl="reference",
        )  # fmt: skip

    check = (student, weight.requires_grad_())
    assert torch.autograd.gradcheck(f, check, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, check, fast_mode=True)


@pytest.mark.parametrize("kind", SOME)
def test_any_upstream_of_rows(kind: str, impl: str) -> None:
    student, teacher = logits(4, 3, 19)
    rows = divergence(student, teacher, kind, reduction="none", impl=impl)
    each = [torch.autograd.grad(r, student, retain_graph=True)[0] for r in rows.flatten()]
    upstream = torch.randn(3, 4).t()  # not contiguous
    upstream[1, 2] = 0
    (got,) = torch.autograd.grad(rows, student, upstream, retain_graph=True)
    want = sum(u * g for u, g in zip(upstream.flatten(), each, strict=True))
    close(got, want, rtol=1e-5, atol=1e-7)
    (got,) = torch.autograd.grad(rows, student, torch.tensor(2.0).expand(4, 3))
    close(got, 2 * sum(each), rtol=1e-5, atol=1e-7)


def test_repeated_backward(impl: str) -> None:
    student, teacher = logits(5, 19)
    loss = divergence(student, teacher, "jsd", impl=impl)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    scaled = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
    close(scaled, 3 * first)
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_gradient_accumulates(impl: str) -> None:
    student, teacher = logits(5, 19)
    for _ in range(3):
        divergence(student, teacher, impl=impl).backward()
    (once,) = torch.autograd.grad(divergence(student, teacher, impl=impl), student)
    close(student.grad, 3 * once)


def test_student_used_twice(impl: str) -> None:
    student, teacher = logits(5, 19)
    both = divergence(student, teacher, impl=impl) + divergence(student * 2, teacher, impl=impl)
    (got,) = torch.autograd.grad(both, student)
    want = torch.softmax(student, -1) + 2 * torch.softmax(2 * student, -1)
    close(got, (want - 3 * torch.softmax(teacher, -1)) / 5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_learned_weight(reduction: str, impl: str) -> None:
    student, teacher = logits(4, 19)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    options: dict[str, Any] = {"mask": mask, "impl": impl}
    got = divergence(student, teacher, weight=weight, reduction=reduction, **options)
    rows = divergence(student.detach(), teacher, reduction="none", **options)
    upstream = torch.randn(got.shape)
    grad, grad_weight = torch.autograd.grad(got, (student, weight), upstream)
    w = weight.detach().requires_grad_()
    plain = w * rows
    if reduction != "none":
        plain = plain.sum() / ((w * mask).sum() if reduction == "mean" else 1)
    close(got, plain)
    close(grad_weight, torch.autograd.grad(plain, w, upstream)[0])
    assert grad_weight[1] != 0  # a weight of 0 that learns still counts
    assert torch.isfinite(grad).all() and (grad[3] == 0).all()


def test_no_gradient_asked_for(impl: str) -> None:
    student, teacher = logits(4, 19)
    with torch.no_grad():
        assert not divergence(student, teacher, impl=impl).requires_grad
    assert not divergence(student.detach(), teacher, impl=impl).requires_grad
    with torch.inference_mode():
        a = divergence(student, teacher, impl=impl)
    assert a == divergence(student, teacher, impl=impl)


def test_non_leaf_and_inference_teacher(impl: str) -> None:
    hidden, head = torch.randn(4, 6, requires_grad=True), torch.randn(6, 19)
    with torch.inference_mode():
        teacher = torch.randn(4, 19)
    teacher = teacher.clone()
    (grad,) = torch.autograd.grad(divergence(hidden @ head, teacher, impl=impl), hidden)
    want = (torch.softmax(hidden @ head, -1) - torch.softmax(teacher, -1)) @ head.t() / 4
    close(grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, impl: str) -> None:
    student, teacher = torch.randn(4, 19, dtype=dtype, requires_grad=True), torch.randn(4, 19)
    loss = divergence(student, teacher, impl=impl)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32 and grad.dtype == dtype


def test_autocast_changes_nothing(impl: str) -> None:
    """The loss is fp32 whatever autocast says; half logits of an autocast matmul stay half."""
    hidden, head, teacher = (
        torch.randn(4, 6),
        torch.randn(6, 19, requires_grad=True),
        torch.randn(4, 19),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = hidden @ head
        loss = divergence(student, teacher, "jsd", impl=impl)
        full = divergence(student.float(), teacher, "jsd", impl=impl)
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    close(loss, full)
    close(loss, divergence(student, teacher, "jsd", impl=impl))
    (grad,) = torch.autograd.grad(loss, head)
    assert grad.dtype == torch.float32 and grad.abs().sum() > 0


@pytest.mark.parametrize("kind", SOME)
def test_func_grad(kind: str, impl: str) -> None:
    student, teacher = logits(4, 19)
    f = lambda s, t: divergence(s, t, kind, temperature=2.0, impl=impl)
    (want,) = torch.autograd.grad(f(student, teacher), student)
    close(torch.func.grad(f)(student.detach(), teacher), want)
    grad, value = torch.func.grad_and_value(f)(student.detach(), teacher)
    close(grad, want), close(value, f(student, teacher))
    _, pull = torch.func.vjp(
        lambda s: divergence(s, teacher, kind, reduction="none", impl=impl), student.detach()
    )
    upstream = torch.randn(4)
    rows = divergence(student, teacher, kind, reduction="none", impl=impl)
    close(pull(upstream)[0], torch.autograd.grad(rows, student, upstream)[0])


IN_DIMS = [(0, 0), (0, None), (None, 0), (1, 0), (-1, 2)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(in_dims: tuple[int | None, int | None], reduction: str, impl: str) -> None:
    batch, rows, v = 3, 4, 19

    def make(dim: int | None) -> Tensor:
        return torch.randn(rows, v) if dim is None else torch.randn(batch, rows, v).movedim(0, dim)

    student, teacher = (make(dim) for dim in in_dims)
    f = lambda s, t: divergence(s, t, "jsd", reduction=reduction, impl=impl)
    at = lambda x, dim, i: x if dim is None else x.select(dim, i)
    pairs = [(at(student, in_dims[0], i), at(teacher, in_dims[1], i)) for i in range(batch)]
    close(torch.vmap(f, in_dims)(student, teacher), torch.stack([f(*pair) for pair in pairs]))
    if reduction == "mean":
        got = torch.vmap(torch.func.grad(f), in_dims)(student, teacher)
        close(got, torch.stack([torch.func.grad(f)(*pair) for pair in pairs]))
    got = torch.func.vjp(lambda s: torch.vmap(f, in_dims)(s, teacher), student)[1]
    whole = torch.vmap(f, in_dims)(student, teacher)
    leaf = student.clone().requires_grad_()
    loop = torch.stack([f(at(leaf, in_dims[0], i), pairs[i][1]) for i in range(batch)])
    upstream = torch.randn(whole.shape)
    close(got(upstream)[0], torch.autograd.grad(loop, leaf, upstream)[0])


def test_vmap_over_row_arguments(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 19).unbind()
    per_row = {
        "temperature": torch.rand(3, 4) + 0.5,
        "weight": torch.rand(3, 4),
        "beta": 0.1 + 0.8 * torch.rand(3, 4),
        "mask": torch.rand(3, 4) > 0.3,
        "labels": torch.randint(0, 19, (3, 4)),
    }
    names = list(per_row)

    def f(s: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        row = dict(zip(names, values, strict=True))
        return divergence(s, t, "jsd", label_weight=0.5, z_loss=0.1, impl=impl, **row)

    loop = torch.stack(
        [f(student[i], teacher[i], *(v[i] for v in per_row.values())) for i in range(3)]
    )
    close(torch.vmap(f)(student, teacher, *per_row.values()), loop)
    unbatched = [v[0] for v in per_row.values()]
    got = torch.vmap(f, (0, None, *[None] * 5))(student, teacher[0], *unbatched)
    close(got, torch.stack([f(student[i], teacher[0], *unbatched) for i in range(3)]))
    only = torch.vmap(lambda t: divergence(student[0], teacher[0], temperature=t, impl=impl))
    temperatures = torch.tensor([0.5, 1.0, 4.0])
    want = [
        divergence(student[0], teacher[0], temperature=float(t), impl=impl) for t in temperatures
    ]
    close(only(temperatures), torch.stack(want))


def test_vmap_over_row_indices(impl: str) -> None:
    student, teacher = torch.randn(3, 4, 19), torch.randn(5, 19)
    rows_s, rows_t = torch.randint(0, 4, (3, 6)), torch.randint(0, 5, (3, 6))
    f = lambda s, i, j: divergence(s, teacher, student_rows=i, teacher_rows=j, impl=impl)
    loop = [torch.func.grad(f)(student[i], rows_s[i], rows_t[i]) for i in range(3)]
    close(torch.vmap(torch.func.grad(f))(student, rows_s, rows_t), torch.stack(loop))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_the_gradient(kind: str, impl: str) -> None:
    """Every way to a tangent gives <gradient, tangent>; none drops it."""
    student, teacher = logits(4, 19)
    tangent = torch.randn(4, 19)
    f = lambda s: divergence(s, teacher, kind, temperature=1.5, impl=impl, reduction="sum")
    (grad,) = torch.autograd.grad(f(student), student)
    want = (grad * tangent).sum()
    assert want.abs() > 1e-4
    value, along = torch.func.jvp(f, (student.detach(),), (tangent,))
    close(along, want, rtol=1e-4, atol=1e-6), close(value, f(student).detach())
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(student.detach(), tangent))
        along = forward_ad.unpack_dual(dual).tangent
    assert along is not None
    close(along, want, rtol=1e-4, atol=1e-6)
    options: dict[str, Any] = {"temperature": 1.5, "reduction": "sum", "impl": impl}
    value, along = divergence_jvp(student, tangent, teacher, kind, **options)
    close(along, want, rtol=1e-4, atol=1e-6), close(value, f(student).detach())
    assert not along.requires_grad and not value.requires_grad


def test_forward_mode_with_rows_and_prefix(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 19), torch.randn(4, 19)
    tangent = torch.randn(2, 3, 19)
    rows = {"student_rows": torch.tensor([5, 0, 0]), "teacher_rows": torch.tensor([1, 2, 3])}
    f = lambda s: divergence(s, teacher, "jsd", reduction="none", impl=impl, **rows)
    jacobian = torch.autograd.functional.jacobian(f, student)
    want = (jacobian * tangent).sum((1, 2, 3))
    close(torch.func.jvp(f, (student,), (tangent,))[1], want)
    got = divergence_jvp(student, tangent, teacher, "jsd", reduction="none", impl=impl, **rows)[1]
    close(got, want)
    vmapped = torch.vmap(lambda v: torch.func.jvp(f, (student,), (v,))[1])
    close(vmapped(torch.stack([tangent, -tangent])), torch.stack([want, -want]))


def test_tangent_of_the_teacher_is_never_dropped(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 19).unbind()
    f = lambda s, t: divergence(s, t, impl=impl)
    if impl == "reference":
        along = torch.func.jvp(f, (student, teacher), (0 * student, torch.randn(4, 19)))[1]
        assert along != 0
    else:
        with pytest.raises(RuntimeError, match="teacher_logits has a tangent"):
            torch.func.jvp(f, (student, teacher), (student, teacher))


def test_jvp_shapes_must_agree(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 19).unbind()
    with pytest.raises(ValueError, match=r"student_tangent has shape \(4, 18\)"):
        divergence_jvp(student, torch.randn(4, 18), teacher, impl=impl)


def test_second_derivatives_of_kernels_raise(kernel_impl: str) -> None:
    student, teacher = logits(4, 19)
    f = lambda s: divergence(s, teacher, impl=kernel_impl)
    (grad,) = torch.autograd.grad(f(student), student, create_graph=True)
    assert grad.requires_grad  # so that what follows is not silently constant
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()
    s, v = student.detach(), torch.randn(4, 19)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.jvp(torch.func.grad(f), (s,), (v,))  # forward over reverse
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(s)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.jvp(f, (x,), (v,))[1])(s)  # reverse over forward
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.hessian(f)(s)


def test_second_derivatives_of_the_reference() -> None:
    student, teacher = logits(1, 9, dtype=torch.float64)
    f = lambda s: divergence(s, teacher, impl="reference")
    hessian = torch.func.hessian(f)(student.detach())[0, :, 0, :]
    q = torch.softmax(student.detach()[0], -1)
    close(hessian, torch.diag(q) - q[:, None] * q)
    (grad,) = torch.autograd.grad(f(student), student, create_graph=True)
    (second,) = torch.autograd.grad(grad[0, 2], student)
    close(second[0], hessian[2])


@pytest.mark.parametrize("name", ["temperature", "beta"])
def test_tangents_of_parameters_are_never_dropped(name: str, impl: str) -> None:
    student, teacher = torch.randn(2, 4, 19).unbind()
    f = lambda x: divergence(student, teacher, "jsd", impl=impl, **{name: x})
    value = torch.full((4,), 0.5)
    message = f"{name} requires grad, but no gradient flows to it"
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(f, (value,), (value,))
    with pytest.raises(ValueError, match=message):
        torch.func.grad(f)(value)
    with pytest.raises(ValueError, match=message), forward_ad.dual_level():
        f(forward_ad.make_dual(value, value))
    with pytest.raises(ValueError, match=message):
        f(value.clone().requires_grad_())
