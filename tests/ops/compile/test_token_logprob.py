"""`token_logprob` under `torch.compile`."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import token_logprob, token_logprob_jvp

OP = "token_logprob"
close = torch.testing.assert_close
IDS = torch.tensor([3, 18, 0, 7])


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, impl: str) -> None:
    def f(z: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        out = token_logprob(z, ids, temperature=0.8, mask=mask, impl=impl)
        return (out.logprob * torch.arange(1.0, 5.0)).sum() + (out.entropy**2).sum()

    logits = torch.randn(4, 19, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (g(logits, IDS, mask) for g in (f, compiled))
    close(got, want)
    close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))


def test_wrong_ids_make_their_row_nan(impl: str) -> None:
    ids = torch.tensor([0, 19, -1, 5])
    logits = torch.randn(4, 19, requires_grad=True)
    f = lambda z: tuple(token_logprob(z, ids, impl=impl))
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(logits)
    for x in out:
        assert x.isnan().tolist() == [False, True, True, False]
        (grad,) = torch.autograd.grad(x.sum(), logits, retain_graph=True)
        assert grad.isnan().all(1).tolist() == [False, True, True, False]
        assert not grad[[0, 3]].isnan().any()


def test_tangents_need_the_explicit_form(kernel_impl: str) -> None:
    logits, tangent = torch.randn(4, 19), torch.randn(4, 19)

    def f(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        values, tangents = token_logprob_jvp(z, t, IDS, impl=kernel_impl)
        return *values, *tangents

    close(
        torch.compile(f, fullgraph=True, backend="aot_eager")(logits, tangent), f(logits, tangent)
    )
    g = torch.compile(
        lambda z: token_logprob(z, IDS, impl=kernel_impl).logprob,
        fullgraph=True,
        backend="aot_eager",
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, tangent)
        with pytest.raises(Exception, match="token_logprob_jvp"):
            g(dual)
