"""Row operators where each process of a `torch.distributed` group holds some columns of the
vocabulary.

Rank r holds tokens [offset_r, offset_r + width_r) of every row, in the order of ranks; shards may
differ in width. All else is replicated: ids and labels (global token ids), masks, weights, hidden
states. A call meets once, to learn the widths and to compare arguments, so that what differs is an
error on every rank and not a deadlock. Then a block of rows costs

    divergence        2 all-reduces: maxima and sums of exponentials; then the terms of D
                      (adaptive_kl: 8, whose head is found by four rounds of a radix search)
    topk_divergence   1: the support's logits, maxima, and sums over the shards' part of the tail
    token_logprob     1: the token's logit, maxima, sums and depths

and every rank computes the same loss and the same `saved` from what it received. Backward needs no
communication: the gradient of a column wants the statistics of the row and nothing of its other
columns, so the kernels of one process serve as they are, on the local columns. Only the gradient of
replicated hidden states is a sum over the shards: one all-reduce a call.

A value of one rank travels in its own slot of a sum whose other terms are 0, which is exact in any
order of summation. Statistics are fp64, taken in plain torch over tiles of rows: the formulas are
those of docs/ops/*.md, and no kernel of one process gives terms for normalisers that it is told.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydistill.reference import divergence as dense
from pydistill.reference import token_logprob as token
from pydistill.reference import topk_divergence as topk
from pydistill.reference.divergence import KINDS

TILE = 1 << 19  # elements of an fp64 temporary
_FAR = 1e30


class Shard(NamedTuple):
    """This process's part of the vocabulary."""

    group: Any
    rank: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.widths[self.rank]

    @property
    def offset(self) -> int:
        return sum(self.widths[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.widths)

    @property
    def widest(self) -> int:
        return max(self.widths)

    def local(self, ids: Tensor) -> Tensor:
        """Global ids relative to the shard; -1 for all that are not in it."""
        here = (ids >= self.offset) & (ids < self.offset + self.width)
        return torch.where(here, ids - self.offset, -1)

    def sum_(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks, in place."""
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def exchange(self, own: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        """One all-reduce: `own [n, c]` of every rank, as `[n, ranks, c]`, and the sum of
        `summed [n, m]`."""
        (n, c), ranks = own.shape, len(self.widths)
        sent = own.new_zeros((n, ranks * c + summed.shape[1]))
        sent[:, self.rank * c : (self.rank + 1) * c] = own
        sent[:, ranks * c :] = summed
        self.sum_(sent)
        return sent[:, : ranks * c].reshape(n, ranks, c), sent[:, ranks * c :]


def find(
    group: Any, dim: int, sharded: Sequence[Tensor | None], arguments: Sequence[object]
) -> Shard | None:
    """The shard of a call with `group`, None where that is None: one all-reduce.

    `sharded` hold the vocabulary in dimension `dim`; `arguments` are all others. Nothing is checked
    before the ranks have met, so that what is wrong is wrong for all of them. Raises where
    arguments differ between ranks, or the columns of a rank between its tensors.
    """
    if group is None:
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError("group is for eager mode; call the operator outside torch.compile.")
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; pass a torch.distributed.ProcessGroup that this"
            " process belongs to, or None."
        )
    ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    widths = [_width(x, dim) for x in sharded if x is not None]
    said = (
        [_sketch(x, dim) for x in sharded],
        [_sketch(x) for x in arguments],
        torch.is_grad_enabled(),
    )
    shard = Shard(group, rank, (0,) * ranks)
    first = next((x for x in sharded if isinstance(x, Tensor)), torch.empty(0))
    mine = [float(zlib.crc32(repr(said).encode())), float(min(widths)), float(max(widths))]
    own = torch.tensor([mine], dtype=torch.float64, device=first.device)
    seen, _ = shard.exchange(own, own.new_empty((1, 0)))
    table = [[int(v) for v in row] for row in seen[0].tolist()]
    if any(row[0] != table[0][0] for row in table):
        raise ValueError(
            "the ranks of the group pass different arguments (kinds, numbers, shapes, dtypes or"
            f" requires_grad); only the tokens of a shard may differ. Rank {rank} has {said}."
        )
    for r, (_, least, most) in enumerate(table):
        if least != most or least < 1:
            raise ValueError(
                f"rank {r} of the group passes tensors of {least} and {most} tokens; each rank"
                " needs the same tokens of every sharded tensor, at least one."
            )
    if first.dtype == torch.float64:
        raise TypeError("fp64 is not offered with a group; cast to fp32, bf16 or fp16.")
    return shard._replace(widths=tuple(row[1] for row in table))


def refuse_overwrite(shard: Shard | None, overwrite_logits: bool) -> None:
    if shard is not None and overwrite_logits:
        raise ValueError(
            "overwrite_logits=True is not offered with a group; pass overwrite_logits=False."
        )


def _width(x: object, dim: int) -> int:
    return int(x.shape[dim]) if isinstance(x, Tensor) and x.ndim else 0


def _sketch(x: object, dim: int | None = None) -> object:
    """What has to be the same on every rank of `x`, as text."""
    if isinstance(x, Tensor):
        shape = list(x.shape)
        if dim is not None and shape:
            shape[dim] = 0
        grad = None if dim == 0 else x.requires_grad  # that of a weight stays on its rank
        return f"{x.device.type} {x.dtype} {shape} {grad}"
    if isinstance(x, tuple):
        return [_sketch(v) for v in x]
    return x if x is None or isinstance(x, (bool, int, float, str)) else type(x).__name__


class Op(NamedTuple):
    """An operator on rows of logits, of which this process has some columns."""

    forward: Callable[..., tuple[Tensor, ...]]  # (logits, *tensors) -> (*outputs, saved)
    backward: Callable[..., Tensor]  # (logits, *tensors, saved, *upstreams) -> gradient


def rows(op: Op, logits: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of `op`, differentiable in `logits`."""
    out: tuple[Tensor, ...] = _Rows.apply(op, logits, *tensors)  # type: ignore[no-untyped-call]
    return out[:-1]


class _Rows(torch.autograd.Function):
    """One `forward` with ctx: functorch's transforms cannot use it, and raise."""

    @staticmethod
    def forward(ctx: Any, op: Op, logits: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs = op.forward(logits, *tensors)
        ctx.mark_non_differentiable(outputs[-1])
        ctx.save_for_backward(logits, *tensors, outputs[-1])
        ctx.op = op
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        *tensors, saved = ctx.saved_tensors
        grad = ctx.op.backward(*tensors, saved, *(u.contiguous() for u in upstreams[:-1]))
        return None, grad, *[None] * (len(tensors) - 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError("a call with a group has no forward mode; gather the vocabulary.")


def refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a call with a group has first derivatives only; gather the vocabulary and pass"
            " impl='reference' for second derivatives (create_graph=True, hessians)."
        )


def _tiles(n: int, width: int) -> Iterator[slice]:
    step = max(1, TILE // width)
    for begin in range(0, n, step):
        yield slice(begin, min(begin + step, n))


def _stack(tiles: list[Tensor], n: int, columns: int, like: Tensor) -> Tensor:
    if n == 0:
        return torch.zeros((0, columns), dtype=torch.float64, device=like.device)
    return torch.cat(tiles)


def _inverse(temperature: Tensor) -> Tensor:
    """1 / T as kernels round it, in fp64."""
    return temperature.double().reciprocal().float().double()


def _sum_exp(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m (-inf of none) and sum of exp(k (x - m)) of each row."""
    top = x.amax(-1, keepdim=True)
    return top, (k * (x - _or_zero(top))).exp().sum(-1, keepdim=True)


def _or_zero(top: Tensor) -> Tensor:
    return torch.where(top == -math.inf, 0, top)


def _merge(tops: Tensor, sums: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of exp(k (x - max)) from those of the ranks, `[n, ranks]` ->
    `[n, 1]`; -inf and -inf of nothing."""
    top = tops.amax(1, keepdim=True)
    return top, ((k * (tops - _or_zero(top))).exp() * sums).sum(1, keepdim=True).log()


def _phi(x: Tensor) -> Tensor:
    return x + torch.expm1(-x)


def _weighted_phi(w: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """w phi(x), where w exp(-x) = m is known."""
    return torch.where(x.abs() < 0.5, w * _phi(x), w * (x - 1) + m)


class _Tokens:
    """p, q and d = log p - log q of some tokens, from the larger of p and q and one expm1, so that
    equal rows differ by exactly 0. Where both are 0, d = -1e30."""

    def __init__(self, log_p: Tensor, log_q: Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q
        self.d = torch.nan_to_num(log_p - log_q, nan=-_FAR, posinf=_FAR, neginf=-_FAR)
        self.teacher = self.d >= 0  # is larger
        self.a = self.d.abs()
        self.e = torch.expm1(-self.a)
        self.ratio = 1 + self.e
        self.larger = torch.where(self.teacher, log_p, log_q).exp()
        smaller = self.larger * self.ratio
        self.p = torch.where(self.teacher, self.larger, smaller)
        self.q = torch.where(self.teacher, smaller, self.larger)

    def by_side(self, larger: Tensor, smaller: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the teacher and to the student."""
        return (
            torch.where(self.teacher, larger, smaller),
            torch.where(self.teacher, smaller, larger),
        )

    def mixture(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log(p / M), log(q / M), p / M - 1 and q / M - 1 of M = share p + (1 - share) q."""
        w = torch.where(self.teacher, 1 - share, share) * self.e
        larger = -torch.log1p(w)
        logs = self.by_side(larger, larger - self.a)
        return *logs, *self.by_side(-w / (1 + w), (self.e - w) / (1 + w))


def _terms(name: str, t: _Tokens, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's share of D and of sum q h, h being 0 where p = q (docs/ops/divergence.md)."""
    p, q, d = t.p, t.q, t.d
    if name == "forward_kl":
        return _weighted_phi(p, d, q), q - p
    if name == "reverse_kl":
        return _weighted_phi(q, -d, p), -q * d
    if name == "jsd":
        x, y, _, _ = t.mixture(b)
        p, q = b * p, (1 - b) * q
        near = p * _phi(x) + q * _phi(y)
        return torch.where(t.a < 0.5, near, p * x + q * y), q * y
    if name == "tvd":
        return -0.5 * t.larger * t.e, q * -0.5 * torch.sign(d)
    if name == "skew_forward_kl":
        x, _, p_gain, _ = t.mixture(a)
        return _weighted_phi(p, x, a * p + (1 - a) * q), (a - 1) * q * p_gain
    if name == "skew_reverse_kl":
        _, y, _, q_gain = t.mixture(1 - a)
        return _weighted_phi(q, y, a * q + (1 - a) * p), q * (y - a * q_gain)
    if name == "hellinger":
        root = t.ratio.sqrt()
        e = t.e / (1 + root)
        return t.larger * e * e, t.larger * e * torch.where(t.teacher, root, -1)
    gap = -t.larger * t.e  # abs(p - q)
    if name == "chi2":
        p_r = (t.log_p + d.clamp(min=0)).exp()  # p^2 / q where p > q
        value = torch.where(t.teacher, p_r, t.larger) * t.e * t.e
        return value, torch.where(t.teacher, t.e * (t.larger + p_r), t.ratio * gap + gap)
    if name == "todi":
        share = torch.where(t.teacher, t.ratio, 1) / (1 + t.ratio)  # q / (p + q)
        return t.a * gap, torch.where(t.teacher, -gap, gap) - share * q * d
    assert name == "alpha_beta"
    return _alpha_beta(t, a, b)


def _alpha_beta(t: _Tokens, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    d, s = t.d, a + b
    log_p, log_q = t.log_p.clamp(min=-_FAR), t.log_q.clamp(min=-_FAR)
    present = (t.log_p > -_FAR) | (t.log_q > -_FAR)
    value, qh = torch.zeros_like(d), torch.zeros_like(d)

    def origin() -> tuple[Tensor, Tensor]:
        return d * d / 2, -d

    def at_s0() -> tuple[Tensor, Tensor]:
        z = a * d
        return _weighted_phi(torch.ones_like(z), -z, z.exp()) / a**2, torch.expm1(z) / -a

    def at_a0() -> tuple[Tensor, Tensor]:
        q_b = (b * log_q).exp()
        return _weighted_phi(q_b, -b * d, (b * log_p).exp()) / b**2, -q_b * d

    def at_b0() -> tuple[Tensor, Tensor]:
        p_a, q_a, z = (a * log_p).exp(), (a * log_q).exp(), a * d
        near = z.abs() < 0.5
        return _weighted_phi(p_a, z, q_a) / a**2, torch.where(
            near, q_a * torch.expm1(z), p_a - q_a
        ) / -a

    def general() -> tuple[Tensor, Tensor]:
        p_s, q_s, cross = (s * log_p).exp(), (s * log_q).exp(), (a * log_p + b * log_q).exp()
        za, zs = a * d, s * d
        near = q_s * (a / s * _phi(-zs) - _phi(-za))
        far = a / s * p_s + b / s * q_s - cross
        small = (za.abs() < 0.5) & (zs.abs() < 0.5)
        slope = torch.where(za.abs() < 0.5, q_s * torch.expm1(za), cross - q_s)
        return torch.where(small, near, far) / (a * b), slope / -a

    a0, b0, s0 = a == 0, b == 0, s == 0
    for rows_of, form in (
        (a0 & b0, origin),
        (s0 & ~a0, at_s0),
        (a0 & ~b0, at_a0),
        (b0 & ~a0, at_b0),
        (~a0 & ~b0 & ~s0, general),
    ):
        if bool(rows_of.any()):
            v, g = form()
            value, qh = torch.where(rows_of, v, value), torch.where(rows_of, g, qh)
    return torch.where(present, value, 0), torch.where(present, qh, 0)


class _Pairs:
    """The row pairs of a `divergence` call that are computed, and what a row needs."""

    def __init__(
        self, shard: Shard, inputs: dense.Inputs, options: dense.Options, counted: Tensor | None
    ) -> None:
        student, teacher = inputs.student, inputs.teacher
        pairs = student.shape[0] if inputs.student_rows is None else inputs.student_rows.shape[0]
        self.shard, self.width, self.options = shard, shard.width, options
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
        if inputs.labels is not None:
            valid = valid & (inputs.labels >= 0) & (inputs.labels < shard.total)
        self.counted = torch.ones_like(valid) if counted is None else counted
        self.chosen = (self.counted & valid).nonzero().squeeze(1)
        self.n = self.chosen.shape[0]
        self.rows_s, self.rows_t = (place[self.chosen] for place in at)
        self.labels = None if inputs.labels is None else inputs.labels[self.chosen] - shard.offset
        temperature, alpha, beta = (x[self.chosen] for x in (temperature, alpha, beta))
        self.k, self.a, self.b = _inverse(temperature), alpha.double(), beta.double()
        self.t2 = temperature.double() ** 2 if options.scale_t2 else torch.ones_like(self.k)
        self.norms: tuple[Tensor, ...] = ()  # max s, log Zs, max t, log Zt, each [n, 1]

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, and their logits in fp64."""
        for part in _tiles(self.n, self.width):
            s = self.student[self.rows_s[part], : self.width].double()
            yield part, s, self.teacher[self.rows_t[part], : self.width].double()

    def tokens(self, part: slice, s: Tensor, t: Tensor) -> _Tokens:
        max_s, log_z_s, max_t, log_z_t = (x[part] for x in self.norms)
        k = self.k[part]
        return _Tokens(k * (t - max_t) - log_z_t, k * (s - max_s) - log_z_s)

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
    pairs = _Pairs(shard, inputs, options, inputs.counted)
    device, n, k = pairs.student.device, pairs.n, pairs.k
    hard = inputs.labels is not None or options.z_loss != 0
    own, labelled = [], []
    for part, s, t in pairs.tiles():
        at, one = k[part], torch.ones_like(k[part])
        top, z = _sum_exp(s, at)
        z_1 = _sum_exp(s, one)[1] if hard else one
        own.append(torch.cat([top, z, z_1, *_sum_exp(t, at)], 1))
        x = torch.zeros_like(top)
        if inputs.labels is not None:
            here, column = pairs.here(part)
            x = torch.where(here, s.gather(1, column), 0)
        labelled.append(x)
    every, label = shard.exchange(_stack(own, n, 5, k), _stack(labelled, n, 1, k))
    max_s, log_z_s = _merge(every[..., 0], every[..., 1], k)
    _, log_z_1 = _merge(every[..., 0], every[..., 2], torch.ones_like(k))
    max_t, log_z_t = _merge(every[..., 3], every[..., 4], k)
    pairs.norms = (max_s, log_z_s, max_t, log_z_t)
    adaptive = pairs.name == "adaptive_kl"
    sums = []
    for part, s, t in pairs.tiles():
        x = pairs.tokens(part, s, t)
        gone_s, gone_t = s == -math.inf, t == -math.inf
        if adaptive:
            columns = [_terms(name, x, x.p, x.p)[0] for name in ("forward_kl", "reverse_kl")]
        else:
            columns = list(_terms(pairs.name, x, pairs.a[part], pairs.b[part]))
        columns += [gone_s & ~gone_t, gone_t & ~gone_s, -x.larger * x.e]
        columns.append(-x.p * x.log_p.clamp(min=-_FAR) if entropy else gone_s)
        sums.append(torch.stack([c.sum(-1, dtype=torch.float64) for c in columns], 1))
    found = shard.sum_(_stack(sums, n, 6, k))
    value, centre, no_q, no_p, error, entropies = found[:, :, None].unbind(1)
    share = torch.zeros_like(value)
    if adaptive:
        share = _head_share(pairs, error)
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
        ce = lse - label if inputs.labels is not None else 0
        loss = (1 - options.label_weight) * loss + options.label_weight * ce
        loss = loss + options.z_loss * lse**2
    kept = torch.cat([*pairs.norms, value, centre, log_z_1, share], 1)
    sound = torch.isfinite(sum(pairs.norms)) if n else kept[:, :1] == 0
    kept, loss = (torch.where(sound, x, math.nan) for x in (kept, loss))
    outputs = (loss, kept, entropies if entropy else loss[:0])
    full = [_spread(x, pairs.counted, pairs.chosen, device) for x in outputs[: 2 + entropy]]
    return full[0].squeeze(1), full[1], full[-1].squeeze(1) if entropy else full[0][:0, 0]


def _spread(x: Tensor, counted: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    """Values of the `chosen` rows among all: 0 for one that does not count, NaN for a flagged
    one."""
    full = torch.full((counted.shape[0], x.shape[1]), math.nan, device=device)
    full = torch.where(counted[:, None], full, 0)
    full[chosen] = x.float()
    return full


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


def _head_share(pairs: _Pairs, total: Tensor) -> Tensor:
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
        mass, errors = pairs.shard.sum_(_stack(tiles, n, 512, total)).flip(1).chunk(2, 1)[::-1]
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
    own = _stack([c.double() for c in counts], n, 1, total)
    every, _ = pairs.shard.exchange(own, own[:, :0])
    before = every[:, : pairs.shard.rank, 0].sum(1, keepdim=True)
    tied = []
    for part, s, t in pairs.tiles():
        x, here = pairs.tokens(part, s, t), _ordered(t) == prefix[part]
        first = here & (here.cumsum(1) + before[part] <= fit[part])
        tied.append(torch.where(first, -x.larger * x.e, 0).sum(1, keepdim=True))
    error = error + pairs.shard.sum_(_stack(tied, n, 1, total))
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
    shard: Shard,
    inputs: dense.Inputs,
    options: dense.Options,
    saved: Tensor,
    grad_rows: Tensor,
    out: Tensor,
) -> None:
    """The gradient of the local columns, without a kernel; over `out`, which may be the student's
    memory where no row indices are given."""
    pairs = _Pairs(shard, inputs, options, grad_rows != 0)
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
            g = _terms(pairs.name, x, pairs.a[part], pairs.b[part])[1] - x.q * c
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


def topk_forward(
    shard: Shard, inputs: topk.Inputs, options: topk.Options
) -> tuple[Tensor, Tensor]:
    """Row losses `[R]` and `saved [R, SAVED]`; `inputs.ids` are global."""
    student, ids = inputs.student, inputs.ids
    count, device = student.shape[0], student.device
    status = support_status(ids, shard.total)
    temperature, beta = _topk_parameters(inputs.params, options, count, device)
    valid = topk.parameters_valid(options.kind, temperature, beta).squeeze(1)
    counted = torch.ones_like(valid) if inputs.counted is None else inputs.counted
    chosen = (counted & valid & (status == topk.SOUND)).nonzero().squeeze(1)
    n, k, b = chosen.shape[0], _inverse(temperature[chosen]), beta[chosen].double()
    ids, log_p = ids[chosen], inputs.log_p[chosen].double()
    present = ids >= 0
    here = (ids >= shard.offset) & (ids < shard.offset + shard.width)
    slots = torch.where(here, ids - shard.offset, shard.width)  # one column more, of nobody
    own, support = [], []
    for part in _tiles(n, shard.width):
        x = student.new_full((len(chosen[part]), shard.width + 1), -math.inf).double()
        x[:, :-1] = student[chosen[part]]
        support.append(torch.where(here[part], x.gather(1, slots[part]), 0))
        top = x.amax(-1, keepdim=True)
        own.append(torch.cat([top, *_sum_exp(x.scatter(1, slots[part], -math.inf), k[part])], 1))
    every, s = shard.exchange(_stack(own, n, 3, k), _stack(support, n, ids.shape[1], k))
    top = every[..., 0].amax(1, keepdim=True)
    s = torch.where(present, s, -math.inf)
    tail_top, log_tail = _merge(every[..., 1], every[..., 2], k)
    log_tail = log_tail + k * (tail_top - top)  # all relative to the row's maximum
    support_top, z = _sum_exp(s, k)
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
    t = _Tokens(log_p, log_q.float().double())
    value, q_h = _cell_terms(options, t, b)
    loss = value.sum(1, keepdim=True)
    name = next(name for name, kind in KINDS.items() if kind.id == options.kind)
    no_q = ((log_q == -math.inf) & (t.p > 0)).any(1, keepdim=True)
    no_p = ((log_p == -math.inf) & (t.q > 0)).any(1, keepdim=True)
    sound = sound & ~torch.isnan(log_p).any(1, keepdim=True)
    outside = -log_q_tail.exp() if options.mode == topk.TRUNCATED else torch.zeros_like(loss)
    centre = _cell_centre(t.q, q_h, outside)
    off = -centre
    if options.mode == topk.SUPPORT_ONLY:
        off = torch.zeros_like(off)
    elif with_tail:
        d = torch.where(log_q_tail > -math.inf, log_p_tail - log_q_tail.float().double(), 0)
        off = off + _tail_slope(name, d, b)
    infinite = no_q if name == "forward_kl" else no_p
    if name in ("forward_kl", "reverse_kl"):
        loss = torch.where(infinite, math.inf, loss)
        centre, off = (torch.where(infinite, math.nan, x) for x in (centre, off))
    if options.scale_t2:
        loss = loss * temperature[chosen].double() ** 2
    low = centre - centre.float().double()
    kept = torch.cat([top, log_z, log_scale, centre, low, off], 1)
    kept, loss = (torch.where(sound, x, math.nan) for x in (kept, loss))
    saved = _spread(kept, counted, chosen, device)
    saved = torch.cat([saved, torch.where(counted, status, 0).float()[:, None]], 1)
    return _spread(loss, counted, chosen, device).squeeze(1), saved


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


def _cell_terms(options: topk.Options, t: _Tokens, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each cell's share of D and of sum q h; truncated sums take the Bregman terms back."""
    name = next(name for name, kind in KINDS.items() if kind.id == options.kind)
    value, q_h = _terms(name, t, b, b)
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


def _tail_slope(name: str, d: Tensor, b: Tensor) -> Tensor:
    """h of the tail's cell."""
    if name == "forward_kl":
        return -torch.expm1(d)
    if name == "reverse_kl":
        return -d
    if name == "jsd":
        return (1 - b) * -torch.log1p(b * torch.expm1(d))
    return -0.5 * torch.sign(d)


def topk_backward(
    shard: Shard,
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
    kept, k = saved.double()[:, :, None], _inverse(temperature)
    top, log_z, log_scale, centre, low, off, status = kept.unbind(1)
    up = grad_rows.double()[:, None]
    soft = up * k * (temperature.double() ** 2 if options.scale_t2 else 1)
    soft = torch.where(status == topk.SOUND, soft, math.nan)
    for part in _tiles(grad_rows.shape[0], shard.width):
        ids, x = inputs.ids[part], inputs.student[part].double()
        here = ids >= 0
        s = torch.where(here, x.gather(1, ids.clamp(min=0)), -math.inf)
        log_q = (k[part] * (s - top[part]) - log_scale[part]).float().double()
        t = _Tokens(torch.where(here, inputs.log_p[part].double(), -math.inf), log_q)
        _, q_h = _cell_terms(options, t, beta[part].double())
        on = soft[part] * (q_h - t.q * (centre[part] + low[part]))
        g = soft[part] * off[part] * (k[part] * (x - top[part]) - log_z[part]).exp()
        g = torch.cat([g, torch.zeros_like(g[:, :1])], 1)
        g = g.scatter(1, torch.where(here, ids, x.shape[1]), on)[:, :-1]
        out[part] = torch.where(up[part] == 0, 0, g).to(out.dtype)


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
    for part in _tiles(n, shard.width):
        x = logits[chosen[part], : shard.width].double()
        top, at = x.max(1, keepdim=True)
        d = k[part] * (x - _or_zero(top))
        d = d.scatter(1, at, -math.inf)  # the others: after adding 1 they would be gone
        e = d.exp()
        depth = -(e * torch.where(d == -math.inf, 0, d)).sum(1, keepdim=True)
        own.append(torch.cat([top, e.sum(1, keepdim=True), depth], 1))
        labelled.append(torch.where(here[part], x.gather(1, local[part] * here[part]), 0))
    every, at_id = shard.exchange(_stack(own, n, 3, k), _stack(labelled, n, 1, k))
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
    full = _spread(kept, counted, chosen, device)
    status = torch.where(inside | ~counted, token.SOUND, token.ID_OUT_OF_RANGE)
    saved = torch.cat([full[:, :4], status[:, None].float()], 1)
    return full[:, 3].contiguous(), full[:, 4].contiguous(), saved
