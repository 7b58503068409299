"""The definition of `pydistill.topk_logprobs`: the K most likely tokens of a row of logits, their
log-probabilities, and the mass of the rest.

Plain torch. docs/ops/topk_logprobs.md has the formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def topk_logprobs_reference(
    logits: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits `[R, V]`: ids `[R, K]`, log-probabilities `[R, K]`, log of the tail's mass `[R]`
    and the normaliser `[R]`.

    fp32 for half inputs, else in the logits' own precision. Raises nothing: a row without a softmax
    (NaN or +inf in it, only -inf in it) has ids -1 and is NaN elsewhere.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bad = (torch.isnan(x) | (x == math.inf)).any(-1) | (x == -math.inf).all(-1)
    x = torch.where(bad[:, None], 0, x)
    values, order = torch.sort(x, dim=-1, descending=True, stable=True)
    z = (values - values[:, :1]) / temperature
    log_z = torch.logsumexp(z, -1)
    tail = torch.full_like(log_z, -math.inf)
    if k < logits.shape[-1]:
        tail = torch.logsumexp(z[:, k:], -1) - log_z
    ids = torch.where(bad[:, None] | (values == -math.inf), -1, order)[:, :k]
    logprobs = torch.where(bad[:, None], math.nan, z - log_z[:, None])[:, :k]
    lse = values[:, 0] / temperature + log_z
    return ids, logprobs, torch.where(bad, math.nan, tail), torch.where(bad, math.nan, lse)


def topk_logprobs_fwd(
    logits: Tensor,
    k: int,
    temperature: float,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    lse: Tensor,
) -> None:
    """The same as an `out` kernel, for torch's dispatcher."""
    found = topk_logprobs_reference(logits, k, temperature)
    for out, value in zip((ids, logprobs, tail, lse), found, strict=True):
        out.copy_(value)
