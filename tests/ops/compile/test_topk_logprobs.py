"""`topk_logprobs` under `torch.compile`."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import TopkLogprobs, topk_logprobs

OP = "topk_logprobs"


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, impl: str) -> None:
    def f(x: Tensor) -> TopkLogprobs:
        return topk_logprobs(2 * x, 5, temperature=1.5, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 19), (2, 3, 27)):
        x = torch.randn(shape, requires_grad=True)
        for got, want in zip(compiled(x), f(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
            assert not got.requires_grad


def test_a_tangent_is_never_dropped(impl: str) -> None:
    x = torch.randn(3, 19)
    for fullgraph in (False, True):
        f = torch.compile(
            lambda s: topk_logprobs(s, 4, impl=impl).logprobs, backend="aot_eager",
            fullgraph=fullgraph,
        )  # fmt: skip
        with forward_ad.dual_level(), pytest.raises(Exception, match="has no derivatives"):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
