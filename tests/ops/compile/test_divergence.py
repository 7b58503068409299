"""`divergence` under `torch.compile`, and its kernels' ops under opcheck.

Compiled code cannot read values for free, so what eager mode raises for becomes a row of NaN here.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import KINDS, _registry, divergence, divergence_jvp, divergence_with_stats
from pydistill.ops import _rows
from pydistill.ops.divergence import _backward_out, _forward_out, _overwrite_out
from pydistill.reference.divergence import SAVED, STATS

OP = "divergence"
close = torch.testing.assert_close


def compiled(
    f: Callable[..., Any], backend: str = "aot_eager", **options: Any
) -> Callable[..., Any]:
    compiled_f: Callable[..., Any] = torch.compile(f, fullgraph=True, backend=backend, **options)
    return compiled_f


def same_as_eager(f: Callable[..., Tensor], student: Tensor, *others: Tensor, backend: str) -> None:
    for x in (student, student.flip(0)):
        eager_leaf, leaf = (x.detach().clone().requires_grad_() for _ in range(2))
        eager, got = f(eager_leaf, *others), compiled(f, backend)(leaf, *others)
        close(got, eager)
        upstream = torch.randn(eager.shape)
        close(
            *(torch.autograd.grad(y, z, upstream)[0] for y, z in ((got, leaf), (eager, eager_leaf)))
        )


@pytest.mark.parametrize("kind", ["jsd", "adaptive_kl"])
def test_fullgraph(kind: str, impl: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 19).unbind()
    weight, mask = torch.rand(2, 3), torch.tensor([[True, False, True], [True, True, True]])
    labels = torch.randint(0, 19, (2, 3))

    def mean(s: Tensor, t: Tensor) -> Tensor:
        return divergence(s, t, kind, temperature=2.0, impl=impl)

    def rows(s: Tensor, t: Tensor, w: Tensor, m: Tensor, y: Tensor) -> Tensor:
        return divergence(
            s, t, kind, weight=w, mask=m, labels=y, label_weight=0.3, z_loss=0.01,
            temperature=w + 1, reduction="none", impl=impl,
        )  # fmt: skip

    same_as_eager(mean, student, teacher, backend="aot_eager")
    same_as_eager(rows, student, teacher, weight, mask, labels, backend="aot_eager")


def test_fullgraph_with_row_indices_and_convention(impl: str) -> None:
    student, teacher = torch.randn(6, 19), torch.randn(4, 19)
    i, j = torch.tensor([0, 5, 5]), torch.tensor([3, 1, 1])

    def f(s: Tensor, t: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return divergence(s, t, convention="torchtune", student_rows=i, teacher_rows=j, impl=impl)

    same_as_eager(f, student, teacher, i, j, backend="aot_eager")


@pytest.mark.slow
def test_inductor(kernel_impl: str) -> None:
    head, teacher = torch.randn(8, 33), torch.randn(6, 33)

    def f(hidden: Tensor, head: Tensor, t: Tensor) -> Tensor:
        student = hidden @ head  # the logits are the graph's own
        return divergence(student, t, "jsd", reduction="none", impl=kernel_impl) * 2

    same_as_eager(f, torch.randn(6, 8), head, teacher, backend="inductor")


def test_dynamic_rows(impl: str) -> None:
    f = compiled(lambda s, t: divergence(s, t, impl=impl), dynamic=True)
    for rows in (3, 5, 8):
        student, teacher = torch.randn(2, rows, 19).unbind()
        close(f(student, teacher), divergence(student, teacher, impl=impl))


def test_statistics_compile(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 19).unbind()
    f = compiled(lambda s, t: tuple(divergence_with_stats(s, t, "tvd", impl=impl)))
    close(f(student, teacher), tuple(divergence_with_stats(student, teacher, "tvd", impl=impl)))


def test_jvp_compiles(kernel_impl: str) -> None:
    student, tangent, teacher = torch.randn(3, 4, 19).unbind()
    f = lambda s, v, t: divergence_jvp(s, v, t, "jsd", impl=kernel_impl)
    got, want = compiled(f)(student, tangent, teacher), f(student, tangent, teacher)
    close(got, want)
    assert want[1] != 0


def test_tangents_are_not_dropped_by_compile(kernel_impl: str) -> None:
    student, tangent, teacher = torch.randn(3, 4, 19).unbind()
    f = lambda s: divergence(s, teacher, impl=kernel_impl)
    want = torch.func.jvp(f, (student,), (tangent,))[1]
    try:
        got = compiled(lambda s, v: torch.func.jvp(f, (s,), (v,))[1])(student, tangent)
    except Exception as error:
        assert "tangent" in str(error) or "jvp" in str(error)
    else:
        close(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, tangent)
        with pytest.raises(Exception, match="divergence_jvp"):
            compiled(f)(dual)


def test_second_derivatives_are_not_dropped_by_compile(kernel_impl: str) -> None:
    student, teacher = torch.randn(4, 19, requires_grad=True), torch.randn(4, 19)
    loss = compiled(lambda s: divergence(s, teacher, impl=kernel_impl))(student)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        torch.autograd.grad(grad.square().sum(), student)


def test_overwriting_is_refused(impl: str) -> None:
    f = compiled(lambda s, t: divergence(s * 1, t, overwrite_logits=True, impl=impl))
    with pytest.raises(Exception, match="overwrite_logits=True is for eager mode"):
        f(torch.randn(4, 9, requires_grad=True), torch.randn(4, 9))


FLAGGED: dict[str, tuple[str, Tensor]] = {
    "temperature": ("forward_kl", torch.tensor([1.0, -1.0, 0.0, math.inf])),
    "beta": ("jsd", torch.tensor([0.5, 0.0, 1.0, math.nan])),
    "alpha": ("skew_reverse_kl", torch.tensor([0.5, -0.1, 1.1, math.nan])),
    "labels": ("forward_kl", torch.tensor([3, 19, -1, 1 << 40])),
    "student_rows": ("forward_kl", torch.tensor([2, 4, -1, 1 << 40])),
    "teacher_rows": ("forward_kl", torch.tensor([2, 4, -1, 1 << 40])),
}


@pytest.mark.parametrize("name", FLAGGED)
def test_wrong_values_flag_their_row(name: str, impl: str) -> None:
    kind, values = FLAGGED[name]
    student, teacher = torch.randn(4, 19, requires_grad=True), torch.randn(4, 19)
    rows = torch.tensor([2, 0, 1, 3])
    options: dict[str, Any] = {"label_weight": 0.5} if name == "labels" else {}
    if name.endswith("rows"):
        options = {"student_rows": rows, "teacher_rows": rows}

    def f(s: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return divergence(s, t, kind, reduction="none", impl=impl, **{**options, name: x})

    with pytest.raises(ValueError, match=name):
        f(student, teacher, values)
    loss = compiled(f)(student, teacher, values)
    assert torch.isnan(loss).tolist() == [False, True, True, True]
    close(loss[0], f(student, teacher, values[:1].expand(4).clone())[0])
    (grad,) = torch.autograd.grad(loss, student, torch.ones(4))
    bad = torch.isnan(grad).any(-1).tolist()
    if name == "student_rows":  # no row of the student is theirs
        assert bad == [False] * 4 and grad[2].abs().sum() > 0
    elif name == "teacher_rows":
        assert bad == [True, True, False, True]
    else:
        assert bad == [False, True, True, True]


def arguments(kernel: str, *, pairs: bool) -> tuple[Any, ...]:
    """Arguments of the op `kernel`, by its schema."""
    student, teacher = torch.randn(5, 12), torch.randn(5, 12)
    rows = torch.tensor([0, 4, 2, 2, 1]) if pairs else None
    grouped = _rows.group_by_row(rows, 5) if rows is not None else (None, None)
    labels, params = torch.tensor([1, 2, 3, 4, 5]), torch.rand(5, 3) / 2 + 0.25
    options = (KINDS["jsd"].id, 1.5, 0.0, 0.5, True, 0.25, 0.01, 11)
    inputs = (student, teacher, rows, rows)
    counted = torch.tensor([True, False, True, True, True])
    loss, saved, stats = torch.zeros(5), torch.zeros(5, SAVED), torch.zeros(5, STATS)
    if kernel == "divergence_fwd":
        return (*inputs, counted, labels, params, *options, loss, saved, stats)
    if kernel == "divergence_bwd":
        _registry.overload("divergence_fwd", "cpu")(
            *inputs, counted, labels, params, *options, loss, saved, stats
        )
        upstream = torch.rand(5) * counted
        return (*inputs, *grouped, labels, params, saved, upstream, *options, torch.zeros(5, 12))
    once = torch.tensor([0, 4, 2, 3, 1]) if pairs else None
    scale = torch.rand(5) * counted
    return (student, teacher, once, rows, counted, labels, params, scale, *options, loss)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kernel", ["divergence_fwd", "divergence_bwd", "divergence_overwrite"])
def test_opcheck(kernel: str, pairs: bool) -> None:
    """The op as dispatched here: native where it is built, else the reference under its name."""
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    op = _registry.overload(kernel, "cpu")
    torch.library.opcheck(op, arguments(kernel, pairs=pairs), test_utils=tests)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kernel", ["divergence_fwd", "divergence_bwd", "divergence_overwrite"])
def test_native_op_means_the_reference_op(kernel: str, pairs: bool) -> None:
    """Same arguments, same outputs, through the dispatcher; `saved` is each backend's own."""
    ours, reference = arguments(kernel, pairs=pairs), arguments(kernel, pairs=pairs)
    reference = tuple(
        x.copy_(y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x
        for x, y in zip(reference, ours, strict=True)
    )
    op = _registry.overload(kernel, "cpu")
    op(*ours)
    {
        "divergence_fwd": _forward_out,
        "divergence_bwd": _backward_out,
        "divergence_overwrite": _overwrite_out,
    }[kernel](*reference)
    for x, y in zip(ours, reference, strict=True):
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape != (5, SAVED):
            close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)
