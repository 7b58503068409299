"""`verify` under `torch.compile`."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import VerifyGradient, VerifyResult, verify, verify_with_gradient

OP = "verify"


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, impl: str) -> None:
    method = "block" if dynamic else "token"

    def f(t: Tensor, d: Tensor, ids: Tensor, position: Tensor, top_p: Tensor) -> VerifyResult:
        return verify(
            t.sin(), d.sin(), ids, method=method, temperature=0.7, top_k=9, top_p=top_p, seed=3,
            position=position, impl=impl,
        )  # fmt: skip

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, slots, vocab in ((3, 2, 19), (5, 3, 27)):
        t, d = torch.randn(batch, slots + 1, vocab), torch.randn(batch, slots, vocab)
        ids, top_p = torch.randint(vocab, (batch, slots)), torch.linspace(0.5, 1, batch)
        arguments = (t, d, ids, torch.arange(batch), top_p)
        for got, want in zip(compiled(*arguments), f(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
            assert not got.requires_grad


def test_one_hot_draft_and_an_id_out_of_range(impl: str) -> None:
    """Values are not read under compile: such an id ends the block, and raises its row's flag."""
    f = torch.compile(
        lambda t, ids: verify(t, None, ids, seed=0, position=0, impl=impl),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    found = f(torch.randn(2, 3, 11), torch.tensor([[11, 0], [-1, 0]]))
    assert found.num_accepted.tolist() == [0, 0] and (found.tokens[:, 0] >= 0).all()
    assert found.flags.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_a_tangent_is_never_dropped(impl: str) -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    t, d = torch.randn(2, 2, 9), torch.randn(2, 1, 9)
    for fullgraph in (False, True):
        f = torch.compile(
            lambda t: verify(t, d, ids, seed=0, position=0, impl=impl).logprobs,
            backend="aot_eager", fullgraph=fullgraph,
        )  # fmt: skip
        with forward_ad.dual_level(), pytest.raises(Exception, match="has no derivatives"):
            f(forward_ad.make_dual(t, torch.ones_like(t)))


def test_gradient(impl: str) -> None:
    t, d, ids = torch.randn(2, 3, 9), torch.randn(2, 2, 9), torch.tensor([[1, 2], [3, 4]])

    def f(t: Tensor, d: Tensor) -> VerifyGradient:
        return verify_with_gradient(t, d * 1, ids, "tvd", seed=1, position=2, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    if impl == "reference":
        with pytest.raises(Exception, match="cannot trace; call it outside of compiled code"):
            compiled(t, d)
        return
    got, want = compiled(t, d), f(t, d)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=0, atol=1e-7)
    torch.testing.assert_close(got.divergence, want.divergence, rtol=0, atol=1e-7, equal_nan=True)
