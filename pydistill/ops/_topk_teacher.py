"""A teacher known on K tokens a row, as one value: what `cache_decode` returns and
`topk_divergence` accepts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopkTeacher(NamedTuple):
    """Top-k log-probabilities of a teacher, with what a loss must know to use them.

    `topk_logprobs` and `topk_ids` are `[..., K]` (-1 in empty slots), `tail_logprob [...]` is the
    log of the mass of all other tokens. `temperature` is the one they were recorded at;
    `vocab_size` that of the logits they were taken from, or None not to compare it.
    """

    topk_logprobs: Tensor
    topk_ids: Tensor
    tail_logprob: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None

    def reshape(self, *prefix: int) -> TopkTeacher:
        """The same rows under another prefix, as `Tensor.reshape`: `[B * T, K]` to `[B, T, K]`."""
        k = self.topk_ids.shape[-1]
        return self._replace(
            topk_logprobs=self.topk_logprobs.reshape(*prefix, k),
            topk_ids=self.topk_ids.reshape(*prefix, k),
            tail_logprob=self.tail_logprob.reshape(prefix),
        )

    def to(self, device: torch.device | str) -> TopkTeacher:
        """The same on `device`."""
        return self._replace(
            topk_logprobs=self.topk_logprobs.to(device),
            topk_ids=self.topk_ids.to(device),
            tail_logprob=self.tail_logprob.to(device),
        )
