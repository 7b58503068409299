"""`causal_conv1d` under `torch.compile`."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import causal_conv1d

OP = "causal_conv1d"
close = torch.testing.assert_close


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, packed: bool, impl: str) -> None:
    ends = torch.tensor([0, 4, 9]) if packed else None

    def f(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        out, last = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True,
            cu_seqlens=ends, impl=impl,
        )  # fmt: skip
        assert last is not None
        return (out**2).sum() + last.sum()

    shapes = ((1 if packed else 2, 9, 6), (6, 4), (6,), (2, 3, 6))
    leaves = tuple(torch.randn(s, requires_grad=True) for s in shapes)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (g(*leaves) for g in (f, compiled))
    close(got, want)
    close(*(torch.autograd.grad(x, leaves) for x in (got, want)))


def test_tangents_are_refused_by_name(kernel_impl: str) -> None:
    weight = torch.randn(6, 4)
    f = torch.compile(
        lambda x: causal_conv1d(x, weight, impl=kernel_impl)[0], fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(1, 5, 6), torch.randn(1, 5, 6))
        with pytest.raises(Exception, match="pass impl='reference' inside compiled code"):
            f(dual)
