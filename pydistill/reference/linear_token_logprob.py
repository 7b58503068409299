"""The definition of `pydistill.linear_token_logprob`: `token_logprob` of a head's logits."""

from __future__ import annotations

from torch import Tensor

from pydistill.reference.linear_head import Head, head_logits
from pydistill.reference.token_logprob import Inputs, Rows, token_logprob_reference


def linear_token_logprob_reference(
    head: Head, ids: Tensor, counted: Tensor | None, params: Tensor | None, temperature: float
) -> Rows:
    """Every statistic of the rows, differentiable in hidden states, weight and bias."""
    inputs = Inputs(head_logits(head, counted), ids, counted, params)
    return token_logprob_reference(inputs, temperature)
