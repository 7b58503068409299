"""`topk_divergence` of rows of which this process has some columns of the vocabulary: forward, and
a backward where no kernel is present. pydistill/ops/_vocab_parallel.py says what is exchanged.

The support's logits are on whatever ranks hold its tokens. Who holds a token is a mask, never an
id: index 0 of a shard is a token like any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydistill.ops._vocab_parallel import (
    Shard,
    inverse,
    merge,
    row_tiles,
    spread,
    stack,
    sum_exp,
)  # fmt: skip
from pydistill.ops._vocab_parallel_terms import Tokens, terms
from pydistill.reference import topk_divergence as topk
from pydistill.reference.divergence import KINDS


def topk_forward(shard: Shard, inputs: topk.Inputs, options: topk.Options) -> tuple[Tensor, Tensor]:
    """Row losses `[R]` and `saved [R, SAVED]`; `inputs.ids` are global."""
    student, ids = inputs.student, inputs.ids
    count, device = student.shape[0], student.device
    status = support_status(ids, shard.total)
    temperature, beta = _topk_parameters(inputs.params, options, count, device)
    valid = topk.parameters_valid(options.kind, temperature, beta).squeeze(1)
    counted = torch.ones_like(valid) if inputs.counted is None else inputs.counted
    chosen = (counted & valid & (status == topk.SOUND)).nonzero().squeeze(1)
    n, k, b = chosen.shape[0], inverse(temperature[chosen]), beta[chosen].double()
    ids, log_p = ids[chosen], inputs.log_p[chosen].double()
    present = ids >= 0
    here = (ids >= shard.offset) & (ids < shard.offset + shard.width)
    slots = torch.where(here, ids - shard.offset, shard.width)  # one column more, of nobody
    own, support = [], []
    for part in row_tiles(n, shard.width):
        x = student.new_full((len(chosen[part]), shard.width + 1), -math.inf).double()
        x[:, :-1] = student[chosen[part]]
        support.append(torch.where(here[part], x.gather(1, slots[part]), 0))
        top = x.amax(-1, keepdim=True)
        own.append(torch.cat([top, *sum_exp(x.scatter(1, slots[part], -math.inf), k[part])], 1))
    every, s = shard.exchange(stack(own, n, 3, k), stack(support, n, ids.shape[1], k))
    top = every[..., 0].amax(1, keepdim=True)
    s = torch.where(present, s, -math.inf)
    tail_top, log_tail = merge(every[..., 1], every[..., 2], k)
    relative = log_tail  # to the tail's own maximum
    log_tail = log_tail + k * (tail_top - top)  # all relative to the row's maximum
    support_top, z = sum_exp(s, k)
    log_support = z.log() + k * (support_top - top)
    log_z = torch.logaddexp(log_support, log_tail)
    sound = torch.isfinite(log_z + top)
    log_scale = log_support if options.mode == topk.SUPPORT_ONLY else log_z
    sound = sound & torch.isfinite(log_scale)
    log_scale = log_scale.float().double()  # as backward will see it
    log_q = k * (s - top) - log_scale
    full = present.sum(1, keepdim=True) == shard.total  # no cell for a tail
    with_tail = options.mode == topk.WITH_TAIL
    log_q_tail = torch.where(full, -math.inf, log_tail - log_z)
    if with_tail:
        log_p_tail = torch.full_like(log_q_tail, -math.inf)
        if inputs.log_tail is not None:
            log_p_tail = torch.where(full, -math.inf, inputs.log_tail[chosen, None].double())
        log_q, log_p = torch.cat([log_q, log_q_tail], 1), torch.cat([log_p, log_p_tail], 1)
    t = Tokens(log_p, log_q.float().double())
    value, q_h = _cell_terms(options, t, b)
    loss = value.sum(1, keepdim=True)
    name = next(name for name, kind in KINDS.items() if kind.id == options.kind)
    no_q = ((log_q == -math.inf) & (t.p > 0)).any(1, keepdim=True)
    no_p = ((log_p == -math.inf) & (t.q > 0)).any(1, keepdim=True)
    sound = sound & ~torch.isnan(log_p).any(1, keepdim=True)
    q_tail = log_q_tail.exp()
    outside = -q_tail if options.mode == topk.TRUNCATED else torch.zeros_like(loss)
    centre = _cell_centre(t.q, q_h, outside)
    slope = torch.zeros_like(centre)
    if options.mode == topk.TRUNCATED:
        slope = -q_tail * centre
    elif with_tail:
        slope = q_h[:, -1:] - t.q[:, -1:] * centre
    slope = torch.where(log_q_tail > -math.inf, slope * (-relative).exp(), 0)
    infinite = no_q if name == "forward_kl" else no_p
    if name in ("forward_kl", "reverse_kl"):
        loss = torch.where(infinite, math.inf, loss)
        centre, slope = (torch.where(infinite, math.nan, x) for x in (centre, slope))
    if options.scale_t2:
        loss = loss * temperature[chosen].double() ** 2
    low = centre - centre.float().double()
    kept = torch.cat([top, tail_top, log_scale, centre, low, slope], 1)
    kept, loss = (torch.where(sound, x, math.nan) for x in (kept, loss))
    saved = spread(kept, counted, chosen, device)
    saved = torch.cat([saved, torch.where(counted, status, 0).float()[:, None]], 1)
    return spread(loss, counted, chosen, device).squeeze(1), saved


def _topk_parameters(
    params: Tensor | None, options: topk.Options, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Temperature and beta `[R, 1]`, fp32."""
    if params is None:
        given = [[options.temperature, options.beta]]
        params = torch.tensor(given, dtype=torch.float32, device=device)
    temperature, beta = params.float().expand(count, 2)[:, :, None].unbind(1)
    return temperature, beta


def support_status(ids: Tensor, total: int) -> Tensor:
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    status = torch.where(twice, topk.ID_TWICE, topk.SOUND)
    return torch.where((ids >= total).any(1), topk.ID_OUT_OF_RANGE, status)


def _cell_terms(options: topk.Options, t: Tokens, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each cell's share of D and of sum q h; truncated sums take the Bregman terms back."""
    name = next(name for name, kind in KINDS.items() if kind.id == options.kind)
    value, q_h = terms(name, t, b, b)
    if options.mode == topk.TRUNCATED and name in ("forward_kl", "reverse_kl"):
        gap = t.larger * t.e * torch.where(t.teacher, -1, 1)  # p - q
        if name == "forward_kl":
            return value + gap, -t.p
        return value - gap, q_h + t.q
    return value, q_h


def _cell_centre(q: Tensor, q_h: Tensor, outside: Tensor) -> Tensor:
    """sum q h about h of the likeliest cell; `outside` is -q of a cell of h = 0."""
    if not q.shape[1]:
        return torch.zeros_like(outside)
    most, at = q.max(1, keepdim=True)
    h = torch.where(most >= 0.5, q_h.gather(1, at) / most, 0)
    return h + outside * h + (q_h - q * h).sum(1, keepdim=True)


def topk_backward(
    inputs: topk.Inputs,
    options: topk.Options,
    saved: Tensor,
    grad_rows: Tensor,
    out: Tensor,
) -> None:
    """The gradient of the local columns, without a kernel, over `out`, which may be the student's
    memory; `inputs.ids` are relative to the columns, others negative."""
    temperature, beta = _topk_parameters(
        inputs.params, options, grad_rows.shape[0], grad_rows.device
    )
    kept, k = saved.double()[:, :, None], inverse(temperature)
    top, outside_max, log_scale, centre, low, slope, status = kept.unbind(1)
    up = grad_rows.double()[:, None]
    soft = up * k * (temperature.double() ** 2 if options.scale_t2 else 1)
    soft = torch.where(status == topk.SOUND, soft, math.nan)
    for part in row_tiles(grad_rows.shape[0], out.shape[1]):
        ids, x = inputs.ids[part], inputs.student[part].double()
        here = ids >= 0
        s = torch.where(here, x.gather(1, ids.clamp(min=0)), -math.inf)
        log_q = (k[part] * (s - top[part]) - log_scale[part]).float().double()
        t = Tokens(torch.where(here, inputs.log_p[part].double(), -math.inf), log_q)
        _, q_h = _cell_terms(options, t, beta[part].double())
        on = soft[part] * (q_h - t.q * (centre[part] + low[part]))
        g = soft[part] * slope[part] * (k[part] * (x - outside_max[part])).exp()
        g = torch.cat([g, torch.zeros_like(g[:, :1])], 1)
        g = g.scatter(1, torch.where(here, ids, x.shape[1]), on)[:, :-1]
        out[part] = torch.where(up[part] == 0, 0, g).to(out.dtype)
