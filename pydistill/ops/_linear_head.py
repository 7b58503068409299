"""What the fused-linear operators share: a language model's head, taken through it tile by tile.

Logits [R, V] are never in memory as a whole. Forward goes over *blocks of rows*, whose logits are
whole rows, so that every operator on rows serves as it is. Backward goes over *tiles of columns* of
all rows: a row whose statistics are known needs nothing of its other columns, and a tile's part of
the weight's gradient is then complete at once, summed in fp32 and rounded once. That computes the
logits twice (8 R V H flops for the student's three gradients and 4 R V H for a teacher's head;
`gradient="in_forward"`: 6 and 2, see `forward_backward`) and holds O(R + V) besides a tile.

Products are sums in fp32 of the operands as they are. Logits are fp32, whatever the operands; their
gradient is rounded to bf16 where both tensors of the head are, and the device multiplies bf16. It
is never rounded to fp16, below whose range it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _memory, _rows
from pydistill.ops.matmul import matmul
from pydistill.reference.linear_head import Head

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A block of rows in forward: at most so many rows (enough to spread the packing of the weight over,
# few enough for memory that the allocator keeps), in units of the CPU kernels' tiles, and at most
# so many bytes of fp32 logits a side.
BLOCK_ROWS, BLOCK_UNIT, BLOCK_BYTES = 128, 32, 128 << 20
# And so many where some gradients of logits are kept beside the weight's, to take a tenth of the
# memory of all logits.
KEPT_BESIDE_ROWS = 96
# A tile of backward. Its rows have whole units of columns: others begin between the 16-byte words
# that a GPU's threads load.
TILE_ROWS, TILE_COLUMNS, TILE_UNIT = 1024, 2048, 16


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
    if hidden.ndim == 0 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{names[0]} has shape {tuple(hidden.shape)} and {names[1]} {tuple(weight.shape)}; pass"
            " [..., H] and [V, H], neither of them 0 (a weight that ZeRO-3 has partitioned must be"
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


def spans(size: int, at_most: int, unit: int = 1) -> Iterator[slice]:
    """[0, size) in as few parts as `at_most` allows: even ones, but whole units where they fit."""
    parts = -(-size // at_most) if size else 0
    each = -(-size // parts) if parts else 1
    if -(-each // unit) * unit <= at_most:
        each = -(-each // unit) * unit
    for begin in range(0, size, each):
        yield slice(begin, min(begin + each, size))


def column_tiles(vocab: int) -> Iterator[slice]:
    return spans(vocab, TILE_COLUMNS, TILE_UNIT)


def row_stride(width: int) -> int:
    """Numbers from a row of fp32 logits to the next: whole cache lines, and an odd number of them,
    for a tile of rows a power of two apart would meet in a few places of the CPU's caches."""
    return (-(-width // 16) | 1) * 16


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
        head, n, width = self.head, rows.stop - rows.start, columns.stop - columns.start
        stride = row_stride(width) if self._buffer.device.type == "cpu" else width
        if self._buffer.numel() < n * stride:
            self._buffer = _memory.empty_like(self._buffer.new_empty(()).expand(n * stride))
        out = self._buffer[: n * stride].view(n, stride)[:, :width]
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


def blocks(tiles: Tiles) -> Iterator[slice]:
    return spans(tiles.head.hidden.shape[0], tiles.block_rows, BLOCK_UNIT)


def forward(tiles: Tiles, loss: Forward) -> None:
    columns = slice(0, tiles.vocab)
    for rows in blocks(tiles):
        loss.forward(tiles.logits(rows, columns), rows)


def backward(tiles: Tiles, loss: Backward, out: Gradients) -> None:
    """`out` from the statistics that forward has left with `loss`."""
    hidden, bias = (None if x is None else _zeros(x) for x in (out.hidden, out.bias))
    n = tiles.head.hidden.shape[0]
    sums = TileSums(out.weight, once=n <= TILE_ROWS)
    for columns in column_tiles(tiles.vocab) if n > tiles.block_rows else [slice(0, tiles.vocab)]:
        sums.begin(columns)
        for rows in spans(n, TILE_ROWS):
            logits = tiles.logits(rows, columns)
            slope = tiles.slope(logits)
            loss.backward(logits, rows, columns)
            _chain(logits, slope, columns, bias)
            _add_hidden(tiles.head, logits, rows, columns, hidden)
            sums.add(logits, tiles.head, rows)
        sums.end()
    _put(out.hidden, hidden)
    _put(out.bias, bias)
    _clear_rest(out, tiles.vocab)


def forward_backward(tiles: Tiles, loss: Overwrite, out: Gradients) -> None:
    """Losses and gradients at once, from logits computed once, block by block of rows.

    Sums of the weight's gradient over the blocks take fp32 memory of its shape, and products of a
    few rows run below the rate of many. So where the gradients of the logits fit, they are kept
    until all rows have theirs; then follow the products of tiles of columns, as in `backward`.
    One block has them in its logits' memory.
    """
    head, single = tiles.head, 0 < tiles.head.hidden.shape[0] <= tiles.block_rows
    kept = None if single else Kept.of(tiles, out)
    hidden, bias = (None if x is None else _zeros(x) for x in (out.hidden, out.bias))
    weight = out.weight if kept is None else None
    if weight is not None and not single:
        weight = _zeros(weight)
    everything = slice(0, tiles.vocab)
    if kept is not None:
        tiles.block_rows = kept.block_rows(tiles.block_rows)
    for rows in blocks(tiles):
        logits = tiles.logits(rows, everything)
        slope = tiles.slope(logits)
        loss.overwrite(logits, rows)
        _chain(logits, slope, everything, bias)
        if kept is not None:
            kept.put(logits, rows)
            continue
        _add_hidden(head, logits, rows, everything, hidden)
        if weight is not None:
            product(
                logits.T, head.hidden[rows], weight[everything], accumulate=not single,
                narrow=is_narrow(head),
            )  # fmt: skip
    if kept is not None:
        for columns in kept.columns():
            grad = kept.tile(columns)
            _add_hidden(head, grad, slice(None), columns, hidden)
            product(grad.T, head.hidden, kept.memory[columns], narrow=is_narrow(head))
    elif not single:
        _put(out.weight, weight)
    _put(out.hidden, hidden)
    _put(out.bias, bias)
    _clear_rest(out, tiles.vocab)


class Kept:
    """The gradients of all logits, by tiles of columns: for as many rows as fit in the memory of
    the weight's gradient, whose part for those columns is written after them, and for the others
    beside it. In the weight's dtype, fp32 or, where both tensors of the head are bf16, bf16."""

    def __init__(self, rows: int, vocab: int, memory: Tensor) -> None:
        self.memory = memory
        self._rows, self._vocab, self._fit = rows, vocab, min(rows, memory.shape[1])
        self._rest = _memory.empty_like(memory.new_empty(()).expand((rows - self._fit) * vocab))
        self._tile = memory.new_empty(rows * min(TILE_COLUMNS, vocab))

    @staticmethod
    def of(tiles: Tiles, out: Gradients) -> Kept | None:
        """None where there is no such memory, or sums of the weight's gradient take less."""
        head, memory = tiles.head, out.weight
        if memory is None or not memory.is_contiguous():
            return None
        if not (memory.dtype == torch.float32 or is_narrow(head)):
            return None
        rows, fit = head.hidden.shape[0], memory.shape[1]
        sums = 0 if memory.dtype == torch.float32 else 4 * fit
        if (rows - fit) * memory.element_size() > sums:
            return None
        return Kept(rows, tiles.vocab, memory)

    def block_rows(self, most: int) -> int:
        return most if self._fit == self._rows else min(most, KEPT_BESIDE_ROWS)

    def columns(self) -> Iterator[slice]:
        return column_tiles(self._vocab)

    def tile(self, columns: slice) -> Tensor:
        """The gradients `[rows, columns]` of a tile, out of the way of the weight's. One product of
        all rows is faster than several of some by more than the copy takes."""
        width = columns.stop - columns.start
        out = self._tile[: self._rows * width].view(self._rows, width)
        for rows, tiles in self._tiles(columns, width):
            out[rows] = tiles[0]
        return out

    def _tiles(self, columns: slice, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the gradients `[tiles, rows, width]` of their `columns`, which are those of
        whole tiles of `width`."""
        count, room = (columns.stop - columns.start) // width, self.memory.shape[1]
        inside = self.memory[columns].view(count, width * room)[:, : self._fit * width]
        yield slice(0, self._fit), inside.unflatten(1, (self._fit, width))
        rest = self._rows - self._fit
        if rest:
            outside = self._rest[rest * columns.start : rest * columns.stop]
            yield slice(self._fit, self._rows), outside.view(count, rest, width)

    def put(self, grad: Tensor, rows: slice) -> None:
        """`grad [rows, V]` to its tiles: to all of one width at once."""
        tiles = list(self.columns())
        width = tiles[0].stop
        whole = self._vocab // width * width
        for columns in (slice(0, whole), slice(whole, self._vocab)):
            if columns.start == columns.stop:
                continue
            wide = min(width, columns.stop - columns.start)
            some = grad[:, columns].unflatten(1, (-1, wide)).transpose(0, 1)
            for place, part in self._tiles(columns, wide):
                first, last = max(place.start, rows.start), min(place.stop, rows.stop)
                if first < last:
                    into = part[:, first - place.start : last - place.start]
                    into.copy_(some[:, first - rows.start : last - rows.start])


class TileSums:
    """A tile of the weight's gradient, summed in fp32 over rows and rounded once: in the memory of
    the result where that is fp32, or all rows are added at `once`, else in one buffer."""

    def __init__(self, weight: Tensor | None, once: bool) -> None:
        self._weight, self._columns, self._empty = weight, slice(0), True
        self._buffer: Tensor | None = None
        if weight is not None and not (once or weight.dtype == torch.float32):
            rows = min(TILE_COLUMNS, weight.shape[0])
            self._buffer = weight.new_empty((rows, weight.shape[1]), dtype=torch.float32)

    def begin(self, columns: slice) -> None:
        self._columns, self._empty = columns, True

    def _place(self) -> Tensor | None:
        if self._buffer is None:
            return None if self._weight is None else self._weight[self._columns]
        return self._buffer[: self._columns.stop - self._columns.start]

    def add(self, grad: Tensor, head: Head, rows: slice) -> None:
        place = self._place()
        if place is not None:
            more = not self._empty
            product(grad.T, head.hidden[rows], place, accumulate=more, narrow=is_narrow(head))
            self._empty = False

    def end(self) -> None:
        place = self._place()
        if self._weight is None or place is None:
            return
        if self._empty:
            self._weight[self._columns].zero_()
        elif self._buffer is not None:
            self._weight[self._columns] = place


def is_narrow(head: Head) -> bool:
    """Whether gradients of the logits may be rounded to bf16."""
    return head.hidden.dtype == head.weight.dtype == torch.bfloat16


def _chain(grad: Tensor, slope: Tensor | float, columns: slice, bias: Tensor | None) -> None:
    """Makes the gradient of logits that of the products they come from; adds it to the bias's."""
    if not isinstance(slope, float) or slope != 1.0:
        grad *= slope
    if bias is not None:
        bias[columns].add_(grad.sum(0))


def _add_hidden(
    head: Head, grad: Tensor, rows: slice, columns: slice, hidden: Tensor | None
) -> None:
    if hidden is not None:
        product(grad, head.weight[columns], hidden[rows], accumulate=True, narrow=is_narrow(head))


def _zeros(out: Tensor) -> Tensor:
    """fp32 sums for `out`: its own memory where it is fp32."""
    if out.dtype == torch.float32:
        return out.zero_()
    return torch.zeros(out.shape, dtype=torch.float32, device=out.device)


def _put(out: Tensor | None, total: Tensor | None) -> None:
    if out is not None and total is not None and out.dtype != torch.float32:
        out.copy_(total)


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
    if a.is_cuda and a.dtype != b.dtype:
        product_in_one_type(a, b, out, accumulate=accumulate, narrow=narrow)
    else:
        matmul(a, b, out=out, accumulate=accumulate, narrow=narrow)


def common_type(a: torch.dtype, b: torch.dtype, narrow: bool) -> torch.dtype:
    """The type in which operands of two types are multiplied by a device that takes one.

    It is bf16, where that is allowed, for bf16 has the range of fp32. fp16 never is: a gradient of
    a mean over many tokens lies below its smallest number.
    """
    if narrow and {a, b} == {torch.float32, torch.bfloat16}:
        return torch.bfloat16
    return torch.promote_types(torch.promote_types(a, b), torch.float32)


def product_in_one_type(
    a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, narrow: bool
) -> None:
    """`product` by a device that takes operands of one type. A widened copy of a whole weight would
    be larger than all else, so that it is made a tile at a time."""
    dtype = common_type(a.dtype, b.dtype, narrow)
    tile = TILE_COLUMNS if dtype.itemsize > b.dtype.itemsize else max(1, *b.shape)
    for columns in spans(b.shape[1], tile):
        for inner in spans(b.shape[0], tile):
            matmul(
                a[:, inner].to(dtype), b[inner, columns].to(dtype), out=out[:, columns],
                accumulate=accumulate or inner.start > 0,
            )  # fmt: skip


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
        if need and dtype == like.dtype:
            found.append(_memory.empty_like(like))
        else:
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
