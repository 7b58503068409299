"""A language model's head: logits from hidden states, as every fused-linear operator defines them.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

without the tanh where there is no softcap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Hidden states and the head that they go through."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    softcap: float = 0.0  # 0: none


def head_logits(head: Head, counted: Tensor | None = None) -> Tensor:
    """`[R, V]`; fp32 for half tensors, else in the widest of the tensors' precisions. Rows that do
    not count are not read."""
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    hidden = head.hidden.to(dtype)
    if counted is not None:
        hidden = torch.where(counted[:, None], hidden, 0)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the product
        logits = hidden @ head.weight.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
