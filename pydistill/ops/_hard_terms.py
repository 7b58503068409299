"""Hard-label cross-entropy and z-loss for operators whose kernels have neither:

    loss = (1 - label_weight) * D + label_weight * CE + z_loss * lse^2

The last two terms are the row loss of `divergence` of a row from itself: its D, and D's gradient,
are 0. So its kernels serve, on every backend and on sharded vocabularies, for one more read of the
row in each direction. That has first derivatives only; second ones are the definition's
(pydistill/reference/hard_terms.py), since the second derivative of D is not 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops._vocab_parallel import Shard
from pydistill.ops._vocab_parallel_divergence import divergence_backward, divergence_forward
from pydistill.ops.divergence import divergence, divergence_jvp
from pydistill.reference import divergence as dense
from pydistill.reference.hard_terms import Hard

SAVED = dense.SAVED


def refuse(hard: Hard | None, option: str, instead: str) -> None:
    """Raises for an `option` that reads the logits once."""
    if hard is not None:
        raise ValueError(
            f"{option} is not offered with label_weight={hard.label_weight:g} and"
            f" z_loss={hard.z_loss:g}, which read the logits once more; pass {instead}."
        )


def _arguments(hard: Hard, counted: Tensor | None, backend: str) -> dict[str, Any]:
    labels = hard.labels
    if labels is not None and counted is not None:  # whatever the caller's ignore_index is
        labels = torch.where(counted, labels, -100)
    return {
        "labels": labels,
        "label_weight": hard.label_weight,
        "z_loss": hard.z_loss,
        "mask": counted,
        "reduction": "none",
        "impl": backend,
    }


def hard_rows(
    logits: Tensor, counted: Tensor | None, hard: Hard, backend: str, shard: Shard | None
) -> Tensor:
    """label_weight * CE + z_loss * lse^2 of each row `[R]`, differentiable in `logits [R, V]`."""
    group = None if shard is None else shard.group
    arguments = _arguments(hard, counted, backend)
    return divergence(logits, logits.detach(), group=group, **arguments)


def hard_rows_jvp(
    logits: Tensor, tangent: Tensor, counted: Tensor | None, hard: Hard, backend: str
) -> Tensor:
    """The tangent of `hard_rows` along `tangent [R, V]`."""
    return divergence_jvp(logits, tangent, logits, **_arguments(hard, counted, backend))[1]


class HardRows:
    """`hard_rows` as the driver of the fused-linear operators calls it: on rows that count, in
    tiles of fp32 logits, without autograd."""

    def __init__(self, hard: Hard, backend: str, shard: Shard | None) -> None:
        self.hard, self.backend, self.shard = hard, backend, shard

    def forward(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Row losses and `saved [n, SAVED]` of whole rows."""
        if self.shard is not None:
            inputs = dense.Inputs(logits, logits, None, None, None, labels, None)
            found = divergence_forward(self.shard, inputs, self._options(self.shard.total))
            return found[0], found[1]
        loss = logits.new_empty(logits.shape[0])
        saved = logits.new_empty((logits.shape[0], SAVED))
        _registry.overload("divergence_fwd", self.backend)(
            logits, logits, None, None, None, labels, None, *self._options(logits.shape[1]), loss,
            saved, loss.new_empty((0, dense.STATS)),
        )  # fmt: skip
        return loss, saved

    def backward(
        self, logits: Tensor, labels: Tensor | None, saved: Tensor, upstream: Tensor, columns: slice
    ) -> Tensor:
        """The gradient of a tile of `columns`, in memory of its own."""
        if labels is not None:  # outside the tile, it is nobody's token
            labels = labels - columns.start - (0 if self.shard is None else self.shard.offset)
        grad, options = torch.empty_like(logits), self._options(logits.shape[1])
        if self.backend == "reference":
            inputs = dense.Inputs(logits, logits, None, None, None, labels, None)
            divergence_backward(inputs, options, saved, upstream, grad)
            return grad
        _registry.overload("divergence_bwd", self.backend)(
            logits, logits, None, None, None, None, labels, None, saved, upstream, *options, grad
        )
        return grad

    def _options(self, vocab: int) -> dense.Options:
        kind = dense.KINDS["forward_kl"].id
        hard = self.hard
        return dense.Options(kind, 1.0, 0.0, 0.0, False, hard.label_weight, hard.z_loss, vocab)
