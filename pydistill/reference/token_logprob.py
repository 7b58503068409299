"""The definition of `pydistill.token_logprob`: the log-probability of one token of each row of
logits, and the row's entropy.

Plain torch, differentiable by autograd. Everything is taken about the row's maximum, so that the
normaliser is log1p of what the other tokens add: `-log1p(1e-9)` keeps its digits, `log(1 + 1e-9)`
has none. docs/ops/token_logprob.md has the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Columns of the [R, SAVED] fp32 tensor that forward leaves for backward, in every backend.
SAVED = 5
MAX, LOG_Z, DEPTH, LOGPROB, STATUS = range(SAVED)
# STATUS of a row; every other than SOUND has outputs and a gradient of NaN.
SOUND, ID_OUT_OF_RANGE = range(2)


class Inputs(NamedTuple):
    """The tensors of a call, as every kernel takes them."""

    logits: Tensor  # [R, V], unit last stride
    ids: Tensor  # int64 [R]
    counted: Tensor | None  # bool [R]
    params: Tensor | None  # [R], a temperature a row, in place of the scalar


class Rows(NamedTuple):
    """What forward finds, one of each a row."""

    logprob: Tensor  # k (z_id - m) - log_z
    entropy: Tensor  # log_z + depth
    maximum: Tensor  # m
    log_z: Tensor  # log sum exp(k (z - m))
    depth: Tensor  # mean of k (m - z) under q


def token_logprob_reference(inputs: Inputs, temperature: float) -> Rows:
    """Every statistic of the rows.

    fp32 for half logits, else in their own precision. Raises nothing: rows that are not counted
    are 0; rows with an id or a temperature out of range are NaN.
    """
    logits, ids = inputs.logits, inputs.ids
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows, vocab = logits.shape
    t = torch.full((rows,), temperature, dtype=dtype, device=logits.device)
    t = t if inputs.params is None else inputs.params.to(dtype)
    inside = (ids >= 0) & (ids < vocab)
    counted = inputs.counted if inputs.counted is not None else torch.ones_like(inside)
    z = torch.where(counted[:, None], logits.to(dtype), 0)
    given = z.detach().amax(-1)
    sound = inside & (t > 0) & torch.isfinite(t) & torch.isfinite(given) | ~counted
    t = torch.where(sound, torch.where(counted, t, 1), math.nan)
    z = z / t[:, None]
    top, at = z.max(-1, keepdim=True)
    d = z - top
    others = d.scatter(1, at, -math.inf)
    e = others.exp()
    rest = e.sum(-1)
    undefined = torch.where(sound, 0, math.nan)  # for V = 1, where no NaN is left
    log_z = torch.log1p(rest) + undefined
    depth = -(e * torch.where(others == -math.inf, 0, others)).sum(-1) / (1 + rest)
    at_id = torch.where(inside, ids, 0)[:, None]
    # The maximum's is 0 and has no slope: one that cancels would cost the digits of small ones.
    token = torch.where(at_id == at, 0, d.gather(1, at_id)).squeeze(1)
    found = (token - log_z, log_z + depth, given, log_z, depth)
    return Rows(*(torch.where(counted, x, 0) for x in found))
