"""`token_logprob` of rows of which this process has some columns of the vocabulary: forward.
pydistill/ops/_vocab_parallel.py says what is exchanged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydistill.ops._vocab_parallel import Shard, or_zero, row_tiles, spread, stack
from pydistill.reference import token_logprob as token


def token_forward(
    shard: Shard, inputs: token.Inputs, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob `[R]`, entropy `[R]` and `saved [R, SAVED]`; `inputs.ids` are global."""
    logits, ids = inputs.logits, inputs.ids
    count, device = logits.shape[0], logits.device
    t = inputs.params
    if t is None:
        t = torch.tensor([temperature], dtype=torch.float32, device=device)
    t = t.float().expand(count)[:, None]
    inside = (ids >= 0) & (ids < shard.total)
    counted = torch.ones_like(inside) if inputs.counted is None else inputs.counted
    valid = ((t > 0) & torch.isfinite(t)).squeeze(1)
    chosen = (counted & valid).nonzero().squeeze(1)
    n, k = chosen.shape[0], t[chosen].double().reciprocal()
    local = ids[chosen, None] - shard.offset
    here = (local >= 0) & (local < shard.width)
    own, labelled = [], []
    for part in row_tiles(n, shard.width):
        x = logits[chosen[part], : shard.width].double()
        top, at = x.max(1, keepdim=True)
        d = k[part] * (x - or_zero(top))
        d = d.scatter(1, at, -math.inf)  # the others: after adding 1 they would be gone
        e = d.exp()
        depth = -(e * torch.where(d == -math.inf, 0, d)).sum(1, keepdim=True)
        own.append(torch.cat([top, e.sum(1, keepdim=True), depth], 1))
        labelled.append(torch.where(here[part], x.gather(1, local[part] * here[part]), 0))
    every, at_id = shard.exchange(stack(own, n, 3, k), stack(labelled, n, 1, k))
    tops, rests, depths = every.unbind(2)
    top, first = tops.max(1, keepdim=True)
    gap = torch.where(tops == -math.inf, math.inf, k * (top - tops))
    w = (-gap).exp()
    depth = (w * (depths + (1 + rests) * torch.where(w == 0, 0, gap))).sum(1, keepdim=True)
    most = torch.zeros_like(w).scatter(1, first, 1)  # the rank of the maximum
    rest = (w * (rests + (1 - most))).sum(1, keepdim=True)
    log_z, depth = torch.log1p(rest), depth / (1 + rest)
    sound = torch.isfinite(top + log_z + depth)
    logprob = k * (at_id - top) - log_z
    kept = torch.where(
        sound & inside[chosen, None] | sound & (torch.arange(5, device=device) < 3),
        torch.cat([top, log_z, depth, logprob, log_z + depth], 1), math.nan,
    )  # fmt: skip
    full = spread(kept, counted, chosen, device)
    status = torch.where(inside | ~counted, token.SOUND, token.ID_OUT_OF_RANGE)
    saved = torch.cat([full[:, :4], status[:, None].float()], 1)
    return full[:, 3].contiguous(), full[:, 4].contiguous(), saved
