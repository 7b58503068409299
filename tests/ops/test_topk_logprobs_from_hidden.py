"""`topk_logprobs` of a head's hidden states."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from pydistill import topk_logprobs
from pydistill.ops import _linear_head

OP = "topk_logprobs"
close = torch.testing.assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_that_of_the_logits(dtype: torch.dtype, each_cpu: str, monkeypatch: Any) -> None:
    hidden, weight = torch.randn(2, 7, 16).to(dtype), torch.randn(500, 16).to(dtype)
    bias = torch.randn(500).to(dtype)
    head: dict[str, Any] = {"weight": weight, "bias": bias, "logit_scale": 0.5, "softcap": 6.0}
    raw = (hidden.double() @ weight.double().T + bias.double()) * 0.5
    want = topk_logprobs(6 * torch.tanh(raw / 6), 9, temperature=1.5, impl="reference")
    for rows in (192, 3):
        monkeypatch.setattr(_linear_head, "BLOCK_ROWS", rows)
        got = topk_logprobs(hidden, 9, temperature=1.5, impl=each_cpu, **head)
        assert torch.equal(got.ids, want.ids)
        for a, b in zip(got[1:], want[1:], strict=True):
            close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_has_no_gradient_and_drops_no_tangent(impl: str) -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    assert not topk_logprobs(hidden, 4, weight=weight, impl=impl).logprobs.requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden.detach(), torch.ones(3, 8))
        with pytest.raises(RuntimeError, match="no derivatives"):
            topk_logprobs(dual, 4, weight=weight.detach(), impl=impl)


def test_wrong_arguments(impl: str) -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    with pytest.raises(ValueError, match="k=51 is outside 1 to 50"):
        topk_logprobs(hidden, 51, weight=weight, impl=impl)
    with pytest.raises(ValueError, match="hidden has 8 features and weight takes 7"):
        topk_logprobs(hidden, 4, weight=weight[:, 1:], impl=impl)
    with pytest.raises(ValueError, match="belong to a head; pass its weight"):
        topk_logprobs(hidden, 4, softcap=3.0, impl=impl)
