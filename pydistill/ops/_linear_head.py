"""What the fused-linear operators share: a language model's head, taken through it tile by tile.

Logits [R, V] are never in memory as a whole. Forward goes over *blocks of rows*, whose logits are
whole rows, so that every operator on rows serves as it is. Backward goes over *tiles of columns* of
all rows: a row whose statistics are known needs nothing of its other columns, and a tile's part of
the weight's gradient is then complete at once, summed in fp32 and rounded once. That computes the
logits twice (8 R V H flops for the student's three gradients and 4 R V H for a teacher's head;
`gradient="in_forward"`: 6 and 2) and holds O(R + V) besides a tile.

Products are sums in fp32 of the operands as they are. Logits are fp32, whatever the operands; their
gradient is rounded to bf16 where both tensors of the head are, and the device multiplies bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.ops.matmul import matmul
from pydistill.reference.linear_head import Head

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A block of rows in forward: at most so many rows (enough to spread the packing of the weight
# over), and at most so many bytes of fp32 logits a side.
BLOCK_ROWS, BLOCK_BYTES = 192, 128 << 20
# A tile of backward.
TILE_ROWS, TILE_COLUMNS = 1024, 2048


def check_head(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None,
) -> Head:  # fmt: skip
    """The head of one side, its hidden states flattened to `[R, H]`."""
    names = [f"{side}_{part}" if side else part for part in ("hidden", "weight", "bias")]
    for name, x in zip(names, (hidden, weight, bias), strict=True):
        if x is None and name == names[2]:
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {got}; pass an fp32, bf16, fp16 or fp64 tensor.")
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor of {tuple(x.shape)}; pass {name}.full_tensor(), through which"
                " gradients flow back to the shards (with grad_placements=[Partial()] where each"
                " process has rows of its own)."
            )
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} and {names[0]} on {hidden.device}.")
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{names[0]} has shape {tuple(hidden.shape)} and {names[1]} {tuple(weight.shape)}; pass"
            " [..., H] and [V, H] with V >= 1 (a weight that ZeRO-3 has partitioned must be"
            " gathered first: deepspeed.zero.GatheredParameters)."
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} has {hidden.shape[-1]} features and {names[1]} takes {weight.shape[1]};"
            " they must be equal ([..., H] and [V, H])."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{names[2]} has shape {tuple(bias.shape)}; pass one number a token,"
            f" ({weight.shape[0]},)."
        )
    prefix = f"{side}_" if side else ""
    _rows.check_range(f"{prefix}logit_scale", scale, -1e30, 1e30, fix="pass a finite number.")
    if softcap is not None:
        _rows.check_range(f"{prefix}softcap", softcap, 0.0, 1e30, fix="pass None for no softcap.")
    rows = hidden.reshape(-1, hidden.shape[-1])
    return Head(rows, weight, bias, float(scale), float(softcap or 0.0))


def check_frozen(head: Head, side: str) -> None:
    """Raises where a tensor of the teacher's wants a gradient."""
    for part in ("hidden", "weight", "bias"):
        x = getattr(head, part)
        if x is not None and (x.requires_grad or _rows.has_tangent(x)):
            raise ValueError(
                f"{side}_{part} requires grad, but gradients flow to the student only; detach it."
            )


def widest(*heads: Head) -> Tensor:
    """An empty tensor of the device and precision (fp32, or fp64) that a call computes in."""
    wide = any(
        x is not None and x.dtype == torch.float64 for head in heads for x in head[:3]
    )  # fmt: skip
    dtype = torch.float64 if wide else torch.float32
    return torch.empty(0, dtype=dtype, device=heads[0].hidden.device)


# An operator on rows of logits, as the driver calls it; `rows` are those of the selection.


class Forward(Protocol):
    def forward(self, logits: Tensor, rows: slice) -> None:
        """Values and statistics of `rows` from their logits `[n, V]`."""


class Backward(Protocol):
    def backward(self, logits: Tensor, rows: slice, columns: slice) -> None:
        """The gradient of `rows`, over the memory of `logits`, which are their `columns`."""


class Overwrite(Protocol):
    def overwrite(self, logits: Tensor, rows: slice) -> None:
        """Both: losses of `rows`, and their gradient over `logits [n, V]`."""


class Gradients(NamedTuple):
    """Where gradients go, in their tensors' dtypes; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows that are computed: those of `index`, or all."""
    return x if index is None else x[index]


def select_optional(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    return None if x is None else select(x, index)


def spans(size: int, at_most: int) -> Iterator[slice]:
    """[0, size) in as few even parts as `at_most` allows."""
    parts = -(-size // at_most) if size else 0
    for i in range(parts):
        yield slice(size * i // parts, size * (i + 1) // parts)


def block_rows(vocab: int) -> int:
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * vocab)))


class Tiles:
    """Logits of a head, tile by tile, in one buffer. `widest` is the largest shard's `vocab`, where
    it has shards: their processes must cut the same blocks of rows."""

    def __init__(self, head: Head, vocab: int, widest: int | None = None) -> None:
        self.head, self.vocab = head, vocab
        self.block_rows = block_rows(widest or vocab)
        self._buffer = torch.empty(0, dtype=torch.float32, device=head.hidden.device)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """fp32 `[rows, columns]`, to be overwritten."""
        head, shape = self.head, (rows.stop - rows.start, columns.stop - columns.start)
        if self._buffer.numel() < shape[0] * shape[1]:
            self._buffer = self._buffer.new_empty(shape[0] * shape[1])
        out = self._buffer[: shape[0] * shape[1]].view(shape)
        product(head.hidden[rows], head.weight[columns].T, out)
        if head.bias is not None:
            out += head.bias[columns]
        if head.scale != 1.0:
            out *= head.scale
        if head.softcap:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out

    def slope(self, logits: Tensor) -> Tensor | float:
        """Of the logits in the product that they come from."""
        head = self.head
        if not head.softcap:
            return head.scale
        return (logits / head.softcap).square_().neg_().add_(1).mul_(head.scale)


def forward(tiles: Tiles, loss: Forward) -> None:
    columns = slice(0, tiles.vocab)
    for rows in spans(tiles.head.hidden.shape[0], tiles.block_rows):
        loss.forward(tiles.logits(rows, columns), rows)


def backward(tiles: Tiles, loss: Backward, out: Gradients) -> None:
    """`out` from the statistics that forward has left with `loss`."""
    hidden = None if out.hidden is None else _zeros(out.hidden)
    for columns in spans(tiles.vocab, TILE_COLUMNS):
        weight = None if out.weight is None else _zeros(out.weight[columns])
        bias = None if out.bias is None else _zeros(out.bias[columns])
        for rows in spans(tiles.head.hidden.shape[0], TILE_ROWS):
            logits = tiles.logits(rows, columns)
            slope = tiles.slope(logits)
            loss.backward(logits, rows, columns)
            _add(tiles.head, logits, slope, rows, columns, Gradients(hidden, weight, bias))
        _put(out.weight, weight, columns)
        _put(out.bias, bias, columns)
    _put(out.hidden, hidden, slice(None))
    _clear_rest(out, tiles.vocab)


def forward_backward(tiles: Tiles, loss: Overwrite, out: Gradients) -> None:
    """Losses and gradients at once, from logits computed once. The weight's gradient is summed over
    blocks of rows, which takes fp32 memory of the weight's shape where that is a half type."""
    sums = Gradients(*(None if x is None else _zeros(x) for x in out))
    columns = slice(0, tiles.vocab)
    for rows in spans(tiles.head.hidden.shape[0], tiles.block_rows):
        logits = tiles.logits(rows, columns)
        slope = tiles.slope(logits)
        loss.overwrite(logits, rows)
        part = sums._replace(
            weight=None if sums.weight is None else sums.weight[: tiles.vocab],
            bias=None if sums.bias is None else sums.bias[: tiles.vocab],
        )
        _add(tiles.head, logits, slope, rows, columns, part)
    for given, total in zip(out, sums, strict=True):
        _put(given, total, slice(None))


def _add(
    head: Head, grad: Tensor, slope: Tensor | float, rows: slice, columns: slice, out: Gradients
) -> None:
    """Adds what the gradient of a tile of logits gives to each of `out`."""
    if not isinstance(slope, float) or slope != 1.0:
        grad *= slope
    if out.bias is not None:
        out.bias.add_(grad.sum(0))
    narrow = head.hidden.dtype == head.weight.dtype == torch.bfloat16
    if out.hidden is not None:
        product(grad, head.weight[columns], out.hidden[rows], accumulate=True, narrow=narrow)
    if out.weight is not None:
        product(grad.T, head.hidden[rows], out.weight, accumulate=True, narrow=narrow)


def _zeros(out: Tensor) -> Tensor:
    """fp32 sums for `out`: its own memory where it is fp32."""
    if out.dtype == torch.float32:
        return out.zero_()
    return torch.zeros(out.shape, dtype=torch.float32, device=out.device)


def _put(out: Tensor | None, total: Tensor | None, at: slice) -> None:
    if out is not None and total is not None and out.dtype != torch.float32:
        out[at].copy_(total)


def _clear_rest(out: Gradients, vocab: int) -> None:
    """No gradient reaches the tokens that are not compared."""
    for x in (out.weight, out.bias):
        if x is not None:
            x[vocab:].zero_()


def product(
    a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False, narrow: bool = False
) -> None:
    """out (+)= a @ b, fp32 sums of operands of any floating dtype; with `narrow` an fp32 one beside
    a bf16 one may be rounded to bf16."""
    if a.is_cuda and a.dtype != b.dtype:  # the tensor cores take operands of one type
        half = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        a, b = a.to(half), b.to(half)
    matmul(a, b, out=out, accumulate=accumulate, narrow=narrow)


def new_gradients(
    head: Head, needed: tuple[bool, ...], partial: bool = False
) -> tuple[Tensor, ...]:
    """Memory for the gradients of hidden, weight and bias; empty where not needed. A `partial` one
    of hidden states is fp32, to be summed."""
    found = []
    for x, need in zip(head[:3], needed, strict=True):
        like = head.hidden if x is None else x
        shape = like.shape if need else (0,)
        dtype = torch.float32 if partial and x is head.hidden else like.dtype
        found.append(torch.empty(shape, dtype=dtype, device=like.device))
    return tuple(found)


def wanted(hidden: Tensor, weight: Tensor, bias: Tensor) -> Gradients:
    """The outputs of a kernel, which are empty where no gradient is wanted."""
    return Gradients(*(x if x.numel() else None for x in (hidden, weight, bias)))


class Selected:
    """The rows `index` of some outputs `[R, ...]`: memory for them in `rows`, and `put` to their
    place, with 0 in all other rows."""

    def __init__(self, index: Tensor | None, *outputs: Tensor | None) -> None:
        self._index, self._outputs = index, outputs
        self.rows: list[Any] = [
            x if x is None or index is None else x.new_empty((index.shape[0], *x.shape[1:]))
            for x in outputs
        ]

    def put(self) -> None:
        if self._index is None:
            return
        for out, part in zip(self._outputs, self.rows, strict=True):
            if out is not None:
                out.zero_()
                out[self._index] = part


def rows_where(chosen: Tensor | None) -> Tensor | None:
    """The rows to compute; None for all of them."""
    if chosen is None or bool(chosen.all()):
        return None
    return chosen.nonzero().squeeze(1)


@contextmanager
def plain(like: Tensor) -> Iterator[None]:
    """Products as they are written: without a gradient, and without autocast, which would round
    them to a half type."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def reference_gradients(
    head: Head,
    rows: Callable[[Head], Sequence[Tensor]],
    upstreams: Sequence[Tensor],
    out: Gradients,
) -> None:
    """`out` by autograd through the definition, for a kernel that the dispatcher called."""
    with _registry.autograd_inside_op():
        bias = None if head.bias is None else head.bias.detach()
        leaves = Head(head.hidden.detach(), head.weight.detach(), bias, head.scale, head.softcap)
        pairs = [
            (x, place)
            for x, place in zip(leaves[:3], out, strict=True)
            if x is not None and place is not None
        ]
        asked = [x.requires_grad_() for x, _ in pairs]
        values = rows(leaves)
        seeds = [u.to(v.dtype) for u, v in zip(upstreams, values, strict=True)]
        grads = torch.autograd.grad(values, asked, seeds)
    for (_, place), grad in zip(pairs, grads, strict=True):
        place.copy_(grad)
