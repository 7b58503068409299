"""The definition of `pydistill.causal_conv1d`: a causal convolution of each channel along the
tokens of its sequence.

Plain torch, differentiable by autograd, forward mode included. docs/ops/causal_conv1d.md has the
formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a call, as every kernel takes them; sequence n is the tokens
    [starts[n], starts[n + 1])."""

    x: Tensor  # [M, D], unit last stride
    weight: Tensor  # [D, W]
    bias: Tensor | None  # [D]
    state: Tensor | None  # [N, W - 1, D], the tokens before each sequence; None: zeros
    starts: Tensor  # int64 [N + 1]


def causal_conv1d_reference(inputs: Inputs, silu: bool) -> Tensor:
    """`[M, D]` in fp32, or fp64 for fp64 tensors."""
    pre = pre_activation(inputs)
    return pre * torch.sigmoid(pre) if silu else pre


def pre_activation(inputs: Inputs) -> Tensor:
    """The convolution, without the activation."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    # Widened first, so that gradients of several taps are summed wide, too.
    x, weight, bias, state = (None if t is None else t.to(dtype) for t in inputs[:4])
    assert x is not None and weight is not None
    wide, starts = Inputs(x, weight, bias, state, inputs.starts), inputs.starts
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(starts, token, right=True) - 1
    place, width = token - starts[sequence], weight.shape[1]
    total = x.new_zeros(x.shape) if bias is None else bias.expand(x.shape)
    for j in range(width):
        total = total + tokens_at(wide, sequence, place + (j - width + 1)) * weight[:, j]
    return total


def tokens_at(inputs: Inputs, sequence: Tensor, place: Tensor) -> Tensor:
    """The tokens `[..., D]` at places -(W - 1) and up of sequences `[...]`: those before 0 are the
    state's."""
    x, weight, _, state, starts = inputs
    inside = place >= 0
    at = torch.where(inside, starts[sequence] + place, 0)
    found = x[at] if x.shape[0] else x.new_zeros((*at.shape, x.shape[1]))
    before = weight.shape[1] - 1
    if state is None or not before:
        return torch.where(inside[..., None], found, 0)
    earlier = state[sequence, torch.where(inside, 0, place + before)]
    return torch.where(inside[..., None], found, earlier)
