"""The definition of `pydistill.linear_topk_divergence`: `topk_divergence` of a head's logits."""

from __future__ import annotations

from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    """Row losses `[R]`, differentiable in hidden states, weight and bias, and the rows' STATUS."""
    inputs = Inputs(head_logits(head, counted), ids, log_p, log_tail, counted, params)
    return topk_divergence_reference(inputs, options)
