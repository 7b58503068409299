"""The fused-linear operators under `torch.compile`."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pydistill import linear_divergence, linear_token_logprob, linear_topk_divergence

OP = "linear_divergence"
close = torch.testing.assert_close


def heads() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)


def dense(impl: str, gradient: str = "recompute") -> partial[Tensor]:
    options = {"kind": "jsd", "labels": torch.arange(6), "label_weight": 0.3, "impl": impl}
    return partial(
        linear_divergence, teacher_hidden=torch.randn(6, 5), teacher_weight=torch.randn(50, 5),
        gradient=gradient, **options,
    )  # fmt: skip


def sparse(impl: str, gradient: str = "recompute") -> partial[Tensor]:
    log_p, ids = torch.log_softmax(torch.randn(6, 50), -1).topk(5)
    return partial(
        linear_topk_divergence, topk_logprobs=log_p, topk_ids=ids, gradient=gradient, impl=impl
    )


def sparse_with_labels(impl: str) -> partial[Tensor]:
    return partial(sparse(impl), labels=torch.arange(6), label_weight=0.3, z_loss=1e-2)


def token(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    ids = torch.arange(6)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_token_logprob(hidden, weight, ids, impl=impl)
        return (0.3 * found.entropy - found.logprob).mean()

    return loss


@pytest.mark.parametrize("make", [dense, sparse, sparse_with_labels, token])
def test_fullgraph(make: type, impl: str) -> None:
    f, (hidden, weight) = make(impl), heads()
    outcomes = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        loss = g(hidden, weight)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*outcomes, strict=True):
        close(a, b)


@pytest.mark.parametrize("make", [dense, sparse])
def test_gradients_in_forward_are_for_eager_mode(make: type, kernel_impl: str) -> None:
    f = torch.compile(make(kernel_impl, "in_forward"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="in_forward"):
        f(*heads())
