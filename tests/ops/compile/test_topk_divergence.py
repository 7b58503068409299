"""`topk_divergence` under `torch.compile`."""

import pytest
import torch
from torch import Tensor

from pydistill import topk_divergence, topk_divergence_jvp
from pydistill.reference.topk_divergence import TAILS

OP = "topk_divergence"
close = torch.testing.assert_close


def teacher(k: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.log_softmax(torch.randn(4, 19), -1).topk(k)
    return values, ids


@pytest.mark.parametrize("tail", TAILS)
def test_fullgraph(tail: str, impl: str) -> None:
    log_p, ids = teacher(5)

    def f(s: Tensor, p: Tensor, i: Tensor) -> Tensor:
        return topk_divergence(s, p, i, "jsd", tail=tail, impl=impl)

    student = torch.randn(4, 19, requires_grad=True)
    want, got = (
        g(student, log_p, ids) for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))
    )
    close(got, want)
    close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


def test_labels_and_z_loss(impl: str) -> None:
    log_p, ids = teacher(5)
    labels = torch.tensor([3, -100, 40, 11])  # not read under compile: its row is NaN
    options = {"label_weight": 0.3, "z_loss": 1e-2, "reduction": "none", "impl": impl}
    f = lambda s, y: topk_divergence(s, log_p, ids, labels=y, **options)
    student = torch.randn(4, 19, requires_grad=True)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(student, labels)
    (grad,) = torch.autograd.grad(got.sum(), student)
    want = f(student, torch.where(labels == 40, -100, labels))
    (slope,) = torch.autograd.grad(want.sum(), student)
    assert got.isnan().tolist() == grad.isnan().all(1).tolist() == [False, False, True, False]
    close(got[[0, 1, 3]], want[[0, 1, 3]]), close(grad[[0, 1, 3]], slope[[0, 1, 3]])


def test_wrong_ids_make_their_row_nan(impl: str) -> None:
    ids = torch.tensor([[0, 1], [2, 2], [3, 40], [4, 5]])
    f = lambda s: topk_divergence(
        s, torch.full((4, 2), -2.0), ids, tail="zero", reduction="none", impl=impl
    )
    student = torch.randn(4, 19, requires_grad=True)
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(student)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, True, False]


def test_tangents_need_the_explicit_form(kernel_impl: str) -> None:
    log_p, ids = teacher(5)
    student, tangent = torch.randn(4, 19), torch.randn(4, 19)
    f = lambda s, t: topk_divergence_jvp(s, t, log_p, ids, impl=kernel_impl)
    for x, y in zip(
        torch.compile(f, fullgraph=True, backend="aot_eager")(student, tangent),
        f(student, tangent),
        strict=True,
    ):
        close(x, y)
