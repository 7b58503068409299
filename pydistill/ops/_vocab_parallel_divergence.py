"""`divergence` of rows of which this process has some columns of the vocabulary: forward, and a
backward where no kernel is present. pydistill/ops/_vocab_parallel.py says what is exchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
from pydistill.ops._vocab_parallel_terms import FAR, Tokens, terms
from pydistill.reference import divergence as dense
from pydistill.reference.divergence import KINDS


class _Pairs:
    """The row pairs of a `divergence` call that are computed, and what a row needs. Labels are
    relative to the columns that are here; those elsewhere are negative or not below their
    number."""

    def __init__(
        self, inputs: dense.Inputs, options: dense.Options, counted: Tensor | None
    ) -> None:
        student, teacher = inputs.student, inputs.teacher
        pairs = student.shape[0] if inputs.student_rows is None else inputs.student_rows.shape[0]
        self.width, self.options = student.shape[1], options
        self.student, self.teacher = student, teacher
        everyone = torch.arange(pairs, device=student.device)
        self.name = next(name for name, kind in KINDS.items() if kind.id == options.kind)
        given = (options.temperature, options.alpha, options.beta)
        params = inputs.params
        if params is None:
            params = torch.tensor([given], dtype=torch.float32, device=student.device)
        temperature, alpha, beta = params.float().expand(pairs, 3)[:, :, None].unbind(1)
        valid = dense._parameters_valid(options.kind, temperature, alpha, beta).squeeze(1)
        at = []
        for index, side in ((inputs.student_rows, student), (inputs.teacher_rows, teacher)):
            place = everyone if index is None else index
            valid = valid & (place >= 0) & (place < side.shape[0])
            at.append(place)
        self.counted = torch.ones_like(valid) if counted is None else counted
        self.chosen = (self.counted & valid).nonzero().squeeze(1)
        self.n = self.chosen.shape[0]
        self.rows_s, self.rows_t = (place[self.chosen] for place in at)
        self.labels = None if inputs.labels is None else inputs.labels[self.chosen]
        temperature, alpha, beta = (x[self.chosen] for x in (temperature, alpha, beta))
        self.k, self.a, self.b = inverse(temperature), alpha.double(), beta.double()
        self.t2 = temperature.double() ** 2 if options.scale_t2 else torch.ones_like(self.k)
        self.norms: tuple[Tensor, ...] = ()  # max s, log Zs, max t, log Zt, each [n, 1]

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, and their logits in fp64."""
        for part in row_tiles(self.n, self.width):
            s, t = self.student[self.rows_s[part]], self.teacher[self.rows_t[part]]
            yield part, s.double(), t.double()

    def tokens(self, part: slice, s: Tensor, t: Tensor) -> Tokens:
        max_s, log_z_s, max_t, log_z_t = (x[part] for x in self.norms)
        k = self.k[part]
        return Tokens(k * (t - max_t) - log_z_t, k * (s - max_s) - log_z_s)

    def here(self, part: slice) -> tuple[Tensor, Tensor]:
        """Whether this rank has the row's label, and a column to read in any case, `[n, 1]`."""
        assert self.labels is not None
        label = self.labels[part, None]
        here = (label >= 0) & (label < self.width)
        return here, torch.where(here, label, 0)


def divergence_forward(
    shard: Shard, inputs: dense.Inputs, options: dense.Options, *, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses `[R]`, `saved [R, SAVED]` and, if asked for, the teacher's entropies `[R]`."""
    labels, counted = inputs.labels, inputs.counted
    if labels is not None:
        wrong = (labels < 0) | (labels >= shard.total)
        wrong = wrong if counted is None else wrong & counted
        inputs = inputs._replace(labels=labels - shard.offset)
    pairs = _Pairs(inputs, options, counted)
    device, n, k = pairs.student.device, pairs.n, pairs.k
    hard = labels is not None or options.z_loss != 0
    own, labelled = [], []
    for part, s, t in pairs.tiles():
        at, one = k[part], torch.ones_like(k[part])
        top, z = sum_exp(s, at)
        z_1 = sum_exp(s, one)[1] if hard else one
        own.append(torch.cat([top, z, z_1, *sum_exp(t, at)], 1))
        at_label = torch.zeros_like(top)
        if labels is not None:
            here, column = pairs.here(part)
            at_label = torch.where(here, s.gather(1, column), 0)
        labelled.append(at_label)
    every, label = shard.exchange(stack(own, n, 5, k), stack(labelled, n, 1, k))
    max_s, log_z_s = merge(every[..., 0], every[..., 1], k)
    _, log_z_1 = merge(every[..., 0], every[..., 2], torch.ones_like(k))
    max_t, log_z_t = merge(every[..., 3], every[..., 4], k)
    pairs.norms = (max_s, log_z_s, max_t, log_z_t)
    adaptive = pairs.name == "adaptive_kl"
    sums = []
    for part, s, t in pairs.tiles():
        x = pairs.tokens(part, s, t)
        gone_s, gone_t = s == -math.inf, t == -math.inf
        if adaptive:
            columns = [terms(name, x, x.p, x.p)[0] for name in ("forward_kl", "reverse_kl")]
        else:
            columns = list(terms(pairs.name, x, pairs.a[part], pairs.b[part]))
        columns += [gone_s & ~gone_t, gone_t & ~gone_s, -x.larger * x.e]
        columns.append(-x.p * x.log_p.clamp(min=-FAR) if entropy else gone_s)
        sums.append(torch.stack([c.sum(-1, dtype=torch.float64) for c in columns], 1))
    found = shard.sum_(stack(sums, n, 6, k))
    value, centre, no_q, no_p, error, entropies = found[:, :, None].unbind(1)
    share = torch.zeros_like(value)
    if adaptive:
        share = _head_share(shard, pairs, error)
        value = share * value + (1 - share) * centre
    elif pairs.name == "reverse_kl":
        centre = value
    elif pairs.name == "forward_kl":
        centre = torch.zeros_like(value)
    infinite = _infinite(pairs.name, no_q > 0, no_p > 0, pairs.a, pairs.b)
    value = torch.where(infinite, math.inf, value.clamp(min=0))
    centre = torch.where(infinite, math.nan, centre)
    loss = value * pairs.t2
    if hard:
        lse = max_s + log_z_1
        ce = lse - label if labels is not None else 0
        loss = (1 - options.label_weight) * loss + options.label_weight * ce
        loss = loss + options.z_loss * lse**2
    kept = torch.cat([*pairs.norms, value, centre, log_z_1, share], 1)
    sound = torch.isfinite(max_s + log_z_s + max_t + log_z_t)
    if labels is not None:
        sound = sound & ~wrong[pairs.chosen, None]
    kept, loss = (torch.where(sound, x, math.nan) for x in (kept, loss))
    outputs = (loss, kept, entropies if entropy else loss[:0])
    full = [spread(x, pairs.counted, pairs.chosen, device) for x in outputs[: 2 + entropy]]
    return full[0].squeeze(1), full[1], full[-1].squeeze(1) if entropy else full[0][:0, 0]


def _infinite(name: str, no_q: Tensor, no_p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows whose D is +inf because one side alone gives some token nothing."""
    if name in ("forward_kl", "chi2"):
        return no_q
    if name == "reverse_kl":
        return no_p
    if name in ("adaptive_kl", "todi"):
        return no_q | no_p
    if name == "alpha_beta":
        return (no_q & ((b <= 0) | (a + b <= 0))) | (no_p & ((a <= 0) | (a + b <= 0)))
    return torch.zeros_like(no_q)


def _head_share(shard: Shard, pairs: _Pairs, total: Tensor) -> Tensor:
    """adaptive_kl's weight: the share of sum abs(p - q) on the teacher's most likely tokens up to
    half of the mass. Their smallest logit is found by a radix search, a byte of its ordered bits a
    round; of the tokens at it, the first ones that still fit are taken."""
    n, device = pairs.n, total.device
    prefix = torch.zeros((n, 1), dtype=torch.int64, device=device)
    above, error = torch.zeros_like(total), torch.zeros_like(total)
    for shift in (24, 16, 8, 0):
        tiles = []
        for part, s, t in pairs.tiles():
            x, key = pairs.tokens(part, s, t), _ordered(t)
            inside = (key >> (shift + 8)) == prefix[part]
            bucket, zero = (key >> shift) & 255, x.p.new_zeros((s.shape[0], 256))
            tiles.append(
                torch.cat(
                    [
                        zero.scatter_add(1, bucket, torch.where(inside, v, 0))
                        for v in (x.p, -x.larger * x.e)
                    ],
                    1,
                )
            )
        mass, errors = shard.sum_(stack(tiles, n, 512, total)).flip(1).chunk(2, 1)[::-1]
        sums = above + mass.cumsum(1)  # of the buckets from the highest on
        taken = (sums <= dense.ADAPTIVE_HEAD_MASS).sum(1, keepdim=True).clamp(max=255)
        last = (taken - 1).clamp(min=0)
        above = torch.where(taken > 0, sums.gather(1, last), above)
        error = error + torch.where(taken > 0, errors.cumsum(1).gather(1, last), 0)
        prefix = (prefix << 8) | (255 - taken)
    each = (pairs.k * (_from_ordered(prefix) - pairs.norms[2]) - pairs.norms[3]).exp()
    fit = ((dense.ADAPTIVE_HEAD_MASS - above) / each).floor()
    fit = torch.where(above == 0, fit.clamp(min=1), fit)
    counts = [(_ordered(t) == prefix[part]).sum(1, keepdim=True) for part, _, t in pairs.tiles()]
    own = stack([c.double() for c in counts], n, 1, total)
    every, _ = shard.exchange(own, own[:, :0])
    before = every[:, : shard.rank, 0].sum(1, keepdim=True)
    tied = []
    for part, s, t in pairs.tiles():
        x, here = pairs.tokens(part, s, t), _ordered(t) == prefix[part]
        first = here & (here.cumsum(1) + before[part] <= fit[part])
        tied.append(torch.where(first, -x.larger * x.e, 0).sum(1, keepdim=True))
    error = error + shard.sum_(stack(tied, n, 1, total))
    return torch.where(total == 0, 0.5, error / torch.where(total == 0, 1, total))


def _ordered(x: Tensor) -> Tensor:
    """fp32 numbers as integers of the same order, from 0 to 2^32 - 1."""
    bits = (x.float() + 0.0).view(torch.int32).long()  # -0 is 0
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) + (1 << 31)


def _from_ordered(key: Tensor) -> Tensor:
    bits = key - (1 << 31)
    bits = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32).double()


def divergence_backward(
    inputs: dense.Inputs,
    options: dense.Options,
    saved: Tensor,
    grad_rows: Tensor,
    out: Tensor,
) -> None:
    """The gradient of the local columns, without a kernel; over `out`, which may be the student's
    memory where no row indices are given. Labels are relative to the columns."""
    pairs = _Pairs(inputs, options, grad_rows != 0)
    grads = saved.new_full((grad_rows.shape[0], 1), math.nan).double()
    grads = torch.where(pairs.counted[:, None], grads, 0)
    if inputs.student_rows is not None:
        out = out.zero_()
    elif pairs.n < grads.shape[0]:
        out.copy_(grads.expand_as(out))
    total = torch.zeros(out.shape, device=out.device) if inputs.student_rows is not None else out
    kept = saved[pairs.chosen].double()[:, :, None]
    max_s, log_z_s, max_t, log_z_t, _, centre, log_z_1, share = kept.unbind(1)
    pairs.norms = (max_s, log_z_s, max_t, log_z_t)
    up = grad_rows[pairs.chosen].double()[:, None]
    one_hot = up * options.label_weight if inputs.labels is not None else torch.zeros_like(up)
    hard = one_hot + 2 * options.z_loss * up * (max_s + log_z_1)
    soft = up * (1 - options.label_weight) * pairs.t2 * pairs.k
    for part, s, t in pairs.tiles():
        x, c = pairs.tokens(part, s, t), centre[part]
        if pairs.name == "adaptive_kl":
            w = share[part]
            g = w * (x.q - x.p) - (1 - w) * x.q * (x.d + c)
        elif pairs.name == "forward_kl":
            g = x.q - x.p + 0 * log_z_s[part]
        else:
            g = terms(pairs.name, x, pairs.a[part], pairs.b[part])[1] - x.q * c
        g = soft[part] * g
        if inputs.labels is not None or options.z_loss != 0:
            g = g + hard[part] * (s - max_s[part] - log_z_1[part]).exp()
        if inputs.labels is not None:
            here, column = pairs.here(part)
            g = g.scatter_add(1, column, torch.where(here, -one_hot[part], 0))
        if inputs.student_rows is not None:
            total.index_add_(0, pairs.rows_s[part], g.float())
        else:
            out[pairs.chosen[part]] = g.to(out.dtype)
    if inputs.student_rows is not None:
        out.copy_(total)
