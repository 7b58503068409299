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

TILE = 1 << 19  # elements of an fp64 temporary


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
    return shard._replace(widths=tuple(row[1] for row in table))


def check(shard: Shard | None, like: object, overwrite_logits: bool = False) -> None:
    """Raises for what a call with a group does not offer; `like` has the precision of the call."""
    if shard is None:
        return
    if isinstance(like, Tensor) and like.dtype == torch.float64:
        raise TypeError("fp64 is not offered with a group; cast to fp32, bf16 or fp16.")
    if overwrite_logits:
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
    out: tuple[Tensor, ...] = _Rows.apply(op, logits, *tensors)
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


def row_tiles(n: int, width: int) -> Iterator[slice]:
    step = max(1, TILE // width)
    for begin in range(0, n, step):
        yield slice(begin, min(begin + step, n))


def stack(tiles: list[Tensor], n: int, columns: int, like: Tensor) -> Tensor:
    if n == 0:
        return torch.zeros((0, columns), dtype=torch.float64, device=like.device)
    return torch.cat(tiles)


def inverse(temperature: Tensor) -> Tensor:
    """1 / T as kernels round it, in fp64."""
    return temperature.double().reciprocal().float().double()


def sum_exp(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m (-inf of none) and sum of exp(k (x - m)) of each row."""
    top = x.amax(-1, keepdim=True)
    return top, (k * (x - or_zero(top))).exp().sum(-1, keepdim=True)


def or_zero(top: Tensor) -> Tensor:
    return torch.where(top == -math.inf, 0, top)


def merge(tops: Tensor, sums: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of exp(k (x - max)) from those of the ranks, `[n, ranks]` ->
    `[n, 1]`; -inf and -inf of nothing."""
    top = tops.amax(1, keepdim=True)
    return top, ((k * (tops - or_zero(top))).exp() * sums).sum(1, keepdim=True).log()


def spread(x: Tensor, counted: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    """Values of the `chosen` rows among all: 0 for one that does not count, NaN for a flagged
    one."""
    full = torch.full((counted.shape[0], x.shape[1]), math.nan, device=device)
    full = torch.where(counted[:, None], full, 0)
    full[chosen] = x.float()
    return full
