"""The definition of what labels and normalisers add to a divergence of rows of logits:

    loss = (1 - label_weight) * D + label_weight * CE + z_loss * lse^2

with lse = logsumexp(logits) and CE = lse - logits[label], both at temperature 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Hard(NamedTuple):
    """The hard part of a call."""

    labels: Tensor | None  # int64 [R], only when label_weight > 0
    label_weight: float
    z_loss: float


def add_hard_terms(
    divergence: Tensor, logits: Tensor, counted: Tensor | None, hard: Hard
) -> Tensor:
    """Row losses `[R]` from the rows' divergences. Rows that are not counted are 0; a label out of
    range makes its row NaN."""
    logits = logits.to(divergence.dtype)
    if counted is None:
        counted = torch.ones_like(divergence, dtype=torch.bool)
    logits = torch.where(counted[:, None], logits, 0)
    lse = torch.logsumexp(logits, -1)
    found = hard.z_loss * lse**2
    if hard.labels is not None:
        labels = torch.where(counted, hard.labels, 0)
        wrong = (labels < 0) | (labels >= logits.shape[1])
        at_label = logits.gather(1, torch.where(wrong, 0, labels)[:, None]).squeeze(1)
        found = found + hard.label_weight * (lse - at_label)
        found = found * torch.where(wrong, math.nan, 1.0)
    return (1 - hard.label_weight) * divergence + torch.where(counted, found, 0)
