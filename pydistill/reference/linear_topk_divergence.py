"""The definition of `pydistill.linear_topk_divergence`: `topk_divergence` of a head's logits."""

from __future__ import annotations

from torch import Tensor

from pydistill.reference.hard_terms import Hard, add_hard_terms
from pydistill.reference.linear_head import Head, head_logits
from pydistill.reference.topk_divergence import Inputs, Options, topk_divergence_reference


def linear_topk_divergence_reference(
    head: Head,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    counted: Tensor | None,
    params: Tensor | None,
    options: Options,
    hard: Hard | None = None,
) -> tuple[Tensor, Tensor]:
    """Row losses `[R]`, differentiable in hidden states, weight and bias, and the rows' STATUS."""
    logits = head_logits(head, counted)
    inputs = Inputs(logits, ids, log_p, log_tail, counted, params)
    loss, status = topk_divergence_reference(inputs, options)
    return loss if hard is None else add_hard_terms(loss, logits, counted, hard), status
