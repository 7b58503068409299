"""A composed kernel where the kernels that it is made of are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import _native, _registry, linear_token_logprob
from pydistill.reference.token_logprob import SAVED


def arguments() -> tuple[Any, ...]:
    head = (torch.randn(3, 4), torch.randn(7, 4), None)
    outputs = (torch.zeros(3), torch.zeros(3), torch.zeros(3, SAVED))
    return (*head, None, torch.tensor([0, 6, 2]), None, 1.0, 0.0, 1.0, *outputs)


def wanted(call: tuple[Any, ...]) -> Tensor:
    return linear_token_logprob(*call[:2], call[4], impl="reference").logprob


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_an_explicit_choice_of_a_missing_kernel_raises(backend: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(_registry, "has_kernel", lambda name, backend: False)
    monkeypatch.setattr(_native, "available", lambda: True)  # a library without that kernel
    call = arguments()
    with pytest.raises(RuntimeError, match=f"of token_logprob_fwd, of which impl='{backend}'"):
        _registry.overload("linear_token_logprob_fwd", backend)(*call)
    assert not any(out.any() for out in call[-3:])


def test_without_native_code_the_namespace_is_the_references(monkeypatch: Any) -> None:
    monkeypatch.setattr(_native, "available", lambda: False)
    call = arguments()
    _registry.overload("linear_token_logprob_fwd", "reference")(*call)
    torch.testing.assert_close(call[-3], wanted(call))
    with pytest.raises(ValueError, match="impl='cpu' cannot run linear_token_logprob here"):
        linear_token_logprob(*call[:2], call[4], impl="cpu")


@pytest.mark.skipif(not _native.available(), reason="the native library is not built")
def test_with_native_code_its_kernels_run() -> None:
    call = arguments()
    _registry.overload("linear_token_logprob_fwd", "cpu")(*call)
    torch.testing.assert_close(call[-3], wanted(call), rtol=1e-5, atol=1e-5)
    assert call[-1].any()  # the reference leaves 0 there
