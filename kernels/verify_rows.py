"""What `verify`'s Triton kernels keep of a row of logits: its maximum, the cut of its filters, its
mass, and the mass of each of its blocks.

Shapes: logits [B, N, V], any strides but a unit last one; of each block of columns a maximum and a
mass about it, fp32, and of each row NUMBERS numbers, fp64. A row is read once, by as many programs
as it has blocks; where filters are on, one program then searches the cut, a threshold on the
logits, in the row that is in cache by now. Rows behind the last drafted token are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.launch import compiler_options
from pydistill.kernels._common.numerics import INF, from_ordered_key, load_fp32, ordered_key

COLUMNS = 4096  # of a block, at most
PER_THREAD = 16

WARPERS = tl.constexpr(4)  # temperature, top_k, top_p, log min_p; of the target, then of the draft

# What is kept of a row, in fp64. A row without a softmax has no total: 0. The point is a greedy
# row's token, or -1. The depth is the sum of weight times distance below the maximum.
LARGEST, CUT, TOTAL, POINT, DEPTH = map(tl.constexpr, range(5))
NUMBERS = tl.constexpr(5)

DOUBT = tl.constexpr(5e-7)  # of a mass that is summed of fp32 weights
PARTS = tl.constexpr(4)  # of a block, for passes in fp64


@triton.jit
def load(row, bias, at, vocab):
    """Logits as fp32, with +inf for NaN: a row that has either has no softmax."""
    x = load_fp32(row + at, at < vocab)
    if bias is not None:
        x += tl.load(bias + at, mask=at < vocab, other=0.0)
    return tl.where(x != x, INF, x)


@triton.jit
def inverse_of(warpers):
    """1 / T in fp64; 1 of a greedy side."""
    temperature = tl.load(warpers)
    return 1.0 / tl.where(temperature == 0.0, 1.0, temperature)


@triton.jit
def weights(x, largest, inverse):
    """exp(inverse (x - largest)) in fp32. The factor is two floats: in one it would bend every
    weight the same way."""
    factor = inverse * 1.4426950408889634
    high = factor.to(tl.float32)
    low = (factor - high.to(tl.float64)).to(tl.float32)
    d = x - largest
    return tl.exp2(d * high + tl.maximum(d, -1e30) * low)


@triton.jit
def exactly(x, largest, inverse):
    """The same in fp64."""
    return tl.exp(inverse * (x.to(tl.float64) - largest))


@triton.jit
def reach(ids, num_drafted, slots, vocab, SLOTS: tl.constexpr):
    """How many leading slots hold a token: rows behind them are never looked at."""
    slot = tl.arange(0, SLOTS)
    token = tl.load(ids + slot, mask=slot < slots, other=-1)
    there = (token >= 0) & (token < vocab) & (slot < tl.load(num_drafted))
    return tl.min(tl.where(there, SLOTS, slot), 0)


@triton.jit
def _needed(
    ids, num_drafted, warpers, request, row, drafted_step, warper_step, slots, tokens,
    DRAFT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Whether a row of the target, or of the draft, can matter."""
    reached = reach(
        ids + request * slots, num_drafted + request * drafted_step, slots, tokens, SLOTS
    )
    if DRAFT:
        own = warpers + request * warper_step
        sampled = (tl.load(own) != 0.0) & (tl.load(own + WARPERS) != 0.0)
        return (row < reached) & sampled
    else:
        return row <= reached


@triton.jit
def _reduce_blocks(
    logits, bias, ids, num_drafted, warpers, tops, masses, depths, request_stride, row_stride,
    bias_step, drafted_step, warper_step, rows, slots, vocab, tokens, blocks,
    DRAFT: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum, mass and depth about it of one block of one row, before any filter."""
    index, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, row = index // rows, index % rows
    if _needed(
        ids, num_drafted, warpers, request, row, drafted_step, warper_step, slots, tokens,
        DRAFT, SLOTS,
    ):  # fmt: skip
        if bias is not None:
            bias += request * bias_step
        inverse = inverse_of(warpers + request * warper_step + DRAFT * WARPERS)
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = load(logits + request * request_stride + row * row_stride, bias, at, vocab)
        top = tl.max(x, 0)
        e = weights(x, tl.where(top == -INF, 0.0, top), inverse)
        tl.store(tops + index * blocks + block, top)
        tl.store(masses + index * blocks + block, tl.sum(e, 0))
        if depths is not None:
            depth = tl.sum(e * tl.minimum(top - x, 1e30), 0)
            tl.store(depths + index * blocks + block, depth)


@triton.jit
def _narrow(
    row, bias, low, high, cut, largest, inverse, limit, doubt, by_mass, vocab,
    EXACT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The bracket (low, high] of ordered keys narrowed to one key, or as far as fp32 decides.

    Less than `limit` of what the cut keeps, in tokens or in mass, lies above the key `high`, and
    not so above `low`. A pass asks three keys between them, and the row's keys in the bracket, of
    which the lowest and the highest bound the next one.
    """
    moved = high - low > 1
    while moved:
        span = high - low
        a, b = low + tl.maximum(span // 4, 1), low + span // 2
        c = high - tl.maximum(span // 4, 1)
        above_a = tl.full((), 0.0, tl.float64)
        above_b, above_c = above_a, above_a
        first, final = (low + 1).to(tl.int32), high.to(tl.int32)
        lowest, highest = final, first
        for start in range(0, vocab, STEP):
            x = load(row, bias, start + tl.arange(0, STEP), vocab)
            key = ordered_key(x)
            inside = (key >= first) & (key <= final)
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, key, final), 0))
            highest = tl.maximum(highest, tl.max(tl.where(inside, key, first), 0))
            if EXACT:
                e = exactly(x, largest, inverse)
            else:
                e = tl.where(by_mass, weights(x, largest.to(tl.float32), inverse), 1.0)
            e = tl.where(x >= cut, e, 0.0)
            above_a += tl.sum(tl.where(key > a, e, 0.0), 0).to(tl.float64)
            above_b += tl.sum(tl.where(key > b, e, 0.0), 0).to(tl.float64)
            above_c += tl.sum(tl.where(key > c, e, 0.0), 0).to(tl.float64)
        least, most = limit - doubt, limit + doubt
        top = tl.where(above_b < least, b, tl.where(above_c < least, c, high))
        top = tl.where(above_a < least, a, top)
        bottom = tl.where(above_b >= most, b, tl.where(above_a >= most, a, low))
        bottom = tl.where(above_c >= most, c, bottom)
        high = tl.minimum(top, highest.to(tl.int64))
        low = tl.maximum(bottom, lowest.to(tl.int64) - 1)
        moved = (high - low < span) & (high - low > 1)
    return low, high


@triton.jit
def _key(x):
    return ordered_key(x).to(tl.int64)


@triton.jit
def mass_exactly(row, bias, cut, largest, inverse, vocab, STEP: tl.constexpr):
    """The mass of what a row keeps, in fp64."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, STEP):
        x = load(row, bias, start + tl.arange(0, STEP), vocab)
        total += tl.sum(tl.where(x >= cut, exactly(x, largest, inverse), 0.0), 0)
    return total


@triton.jit
def _mass(row, bias, cut, largest, inverse, vocab, STEP: tl.constexpr):
    """The same of fp32 weights."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, STEP):
        x = load(row, bias, start + tl.arange(0, STEP), vocab)
        e = weights(x, largest.to(tl.float32), inverse)
        total += tl.sum(tl.where(x >= cut, e, 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _search(
    row, bias, own, peak, total, inverse, vocab, STEP: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """The smallest logit that top-k and top-p keep, of a row of mass `total`."""
    top_k, top_p = tl.load(own + 1), tl.load(own + 2)
    largest, cut = peak.to(tl.float64), tl.full((), -INF, tl.float32)
    for stage in range(2):
        by_mass = stage == 1
        if tl.where(by_mass, top_p < 1.0, (top_k > 0.0) & (top_k < vocab)):
            if by_mass & (cut > -INF):
                total = _mass(row, bias, cut, largest, inverse, vocab, STEP)
            low, high = _narrow(
                row, bias, _key(cut) - 1, _key(peak), cut, largest, inverse,
                tl.where(by_mass, top_p * total, top_k), tl.where(by_mass, DOUBT * total, 0.0),
                by_mass, vocab, False, STEP,
            )  # fmt: skip
            if high - low > 1:
                exact = mass_exactly(row, bias, cut, largest, inverse, vocab, PART)
                low, high = _narrow(
                    row, bias, low, high, cut, largest, inverse, top_p * exact, exact * 0.0, True,
                    vocab, True, PART,
                )  # fmt: skip
            cut = from_ordered_key(high.to(tl.int32))
    return cut


@triton.jit
def _finish_rows(
    logits, bias, ids, num_drafted, warpers, tops, masses, depths, numbers, request_stride,
    row_stride, bias_step, drafted_step, warper_step, rows, slots, vocab, tokens, blocks,
    DRAFT: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The numbers of one row; where filters cut it, the masses of its blocks are summed again."""
    index = tl.program_id(0).to(tl.int64)
    request, row = index // rows, index % rows
    if _needed(
        ids, num_drafted, warpers, request, row, drafted_step, warper_step, slots, tokens,
        DRAFT, SLOTS,
    ):  # fmt: skip
        if bias is not None:
            bias += request * bias_step
        own = warpers + request * warper_step + DRAFT * WARPERS
        temperature, inverse = tl.load(own), inverse_of(own)
        row_x = logits + request * request_stride + row * row_stride
        tops, masses = tops + index * blocks, masses + index * blocks
        if depths is not None:
            depths += index * blocks
        numbers += index * NUMBERS
        lane = tl.arange(0, BLOCKS)
        top = tl.load(tops + lane, mask=lane < blocks, other=-INF)
        peak = tl.max(top, 0)
        largest = peak.to(tl.float64)
        cut, total = tl.full((), -INF, tl.float32), tl.full((), 0.0, tl.float64)
        depth, point = total, tl.full((), -1, tl.int32)
        if (peak > -INF) & (peak < INF):
            share = tl.where(top > -INF, exactly(top, largest, inverse), 0.0)
            mass = tl.load(masses + lane, mask=lane < blocks, other=0.0).to(tl.float64)
            total = tl.sum(tl.where(top > -INF, mass, 0.0) * share, 0)
            if temperature == 0.0:
                block = tl.min(tl.where(top == peak, lane, BLOCKS), 0)
                at = block * BLOCK + tl.arange(0, BLOCK)
                x = load(row_x, bias, at, vocab)
                point = tl.min(tl.where(x == peak, at, vocab), 0)
            else:
                cut = _search(row_x, bias, own, peak, total, inverse, vocab, BLOCK, BLOCK // PARTS)
                bound = largest + temperature * tl.load(own + 3)
                least = bound.to(tl.float32)  # of min_p, the smallest float at the bound or above
                rounded = least.to(tl.float64) < bound
                least = tl.where(rounded, from_ordered_key(ordered_key(least) + 1), least)
                cut = tl.maximum(cut, least)
                if cut > -INF:
                    total = tl.full((), 0.0, tl.float64)
                    for block in range(blocks):
                        about = tl.load(tops + block)
                        kept = tl.full((), 0.0, tl.float32)
                        below = kept
                        if about >= cut:
                            at = block * BLOCK + tl.arange(0, BLOCK)
                            x = load(row_x, bias, at, vocab)
                            e = tl.where(x >= cut, weights(x, about, inverse), 0.0)
                            kept = tl.sum(e, 0)
                            below = tl.sum(e * tl.minimum(about - x, 1e30), 0)
                            total += kept.to(tl.float64) * exactly(about, largest, inverse)
                        tl.store(masses + block, kept)
                        if depths is not None:
                            tl.store(depths + block, below)
                            about = tl.maximum(about, cut)  # it may be -inf; its mass is 0
                            deep = below.to(tl.float64) + kept * (largest - about)
                            depth += deep * exactly(about, largest, inverse)
                elif depths is not None:
                    below = tl.load(depths + lane, mask=lane < blocks, other=0.0).to(tl.float64)
                    deep = tl.where(top > -INF, below + mass * (largest - top), 0.0)
                    depth = tl.sum(deep * share, 0)
        tl.store(numbers + LARGEST, largest)
        tl.store(numbers + CUT, cut.to(tl.float64))
        tl.store(numbers + TOTAL, total)
        tl.store(numbers + POINT, point.to(tl.float64))
        tl.store(numbers + DEPTH, depth)


@triton.jit
def log_probabilities(x, token, numbers, inverse, there):
    """log p of one token of each row, from their logits and their rows' numbers; NaN in a row
    without a softmax."""
    largest = tl.load(numbers + LARGEST, mask=there, other=0.0)
    cut = tl.load(numbers + CUT, mask=there, other=0.0)
    total = tl.load(numbers + TOTAL, mask=there, other=0.0)
    point = tl.load(numbers + POINT, mask=there, other=-1.0)
    value = inverse * (x.to(tl.float64) - largest) - tl.log(total)
    value = tl.where(x.to(tl.float64) >= cut, value, -INF)
    value = tl.where(point >= 0.0, tl.where(token == point, 0.0, -INF), value)
    return tl.where(total > 0.0, value, float("nan"))


@triton.jit
def draft_block(
    draft, support, starts, part, vocab, BLOCK: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """One of SHARES parts of a block of a draft's row as fp32, -inf for what it does not name."""
    SIZE: tl.constexpr = BLOCK // SHARES
    at = part * SIZE + tl.arange(0, SIZE)
    if support is None:
        return load_fp32(draft + at, at < vocab)
    else:
        begin = starts + part // SHARES
        y = tl.full((SIZE,), -INF, tl.float32)
        for i in range(tl.load(begin), tl.load(begin + 1)):
            y = tl.where(at == tl.load(support + i), tl.load(draft + i).to(tl.float32), y)
        return y


@triton.jit
def sums_of(values, index, blocks, BLOCKS: tl.constexpr):
    """The numbers of a slot's blocks, in fp64."""
    lane = tl.arange(0, BLOCKS)
    return tl.load(values + index * blocks + lane, mask=lane < blocks, other=0.0).to(tl.float64)


class Rows:
    """What is kept of all rows of a tensor of logits `[B, N, V]`."""

    def __init__(self, logits: Tensor, block: int, depths: bool):
        batch, rows, vocab = logits.shape
        self.logits, self.block = logits, block
        self.blocks = triton.cdiv(vocab, block)
        self.lanes = triton.next_power_of_2(self.blocks)
        kept = torch.empty(
            (3 if depths else 2, batch * rows, self.blocks), dtype=torch.float32,
            device=logits.device,
        )  # fmt: skip
        self.tops, self.masses, self.depths = kept[0], kept[1], kept[2] if depths else None
        self.numbers = kept.new_empty((batch * rows, NUMBERS.value), dtype=torch.float64)

    def reduce(
        self, bias: Tensor | None, ids: Tensor, num_drafted: Tensor, warpers: Tensor,
        bias_step: int, drafted_step: int, warper_step: int, slots: int, tokens: int, side: int,
        lanes: int,
    ) -> None:  # fmt: skip
        """Fills `tops`, `masses`, `depths` and `numbers`."""
        batch, rows, vocab = self.logits.shape
        head = (self.logits, bias, ids, num_drafted, warpers, self.tops, self.masses, self.depths)
        tail = (
            self.logits.stride(0), self.logits.stride(1), bias_step, drafted_step, warper_step,
            rows, slots, vocab, tokens, self.blocks,
        )  # fmt: skip
        _reduce_blocks[(batch * rows, self.blocks)](
            *head, *tail, DRAFT=side, SLOTS=lanes, BLOCK=self.block,
            **compiler_options(self.block, PER_THREAD),
        )  # fmt: skip
        _finish_rows[(batch * rows,)](
            *head, self.numbers, *tail, DRAFT=side, SLOTS=lanes, BLOCKS=self.lanes,
            BLOCK=self.block, **compiler_options(self.block, PER_THREAD, 168),
        )  # fmt: skip


def block_of(vocab: int) -> int:
    """Columns of a block of a row."""
    columns: int = triton.next_power_of_2(vocab)
    return max(32 * PER_THREAD, min(COLUMNS, columns))


def by_token(
    draft: Tensor, support: Tensor, ids: Tensor, vocab: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A draft known on S tokens, in the order of their ids: logits, ids, the place of each drafted
    token among them, -1 for none, and where each block of the vocabulary begins. Empty slots are
    -inf, and a row with a wrong id is NaN."""
    ordered, order = support.sort(-1)
    logits = draft.gather(-1, order.expand(draft.shape))
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    wrong = twice.any(-1, keepdim=True) | (ordered[..., -1:] >= vocab)
    logits = torch.where(ordered >= 0, logits, -INF.value)
    logits = torch.where(wrong, float("nan"), logits).to(draft.dtype)
    rows = ordered.expand(*ids.shape, -1).contiguous()
    place = torch.searchsorted(rows, ids[..., None])
    found = rows.gather(-1, place.clamp(max=rows.shape[-1] - 1)) == ids[..., None]
    edges = torch.arange(0, vocab + block, block, device=ids.device)
    starts = torch.searchsorted(ordered, edges.expand(*ordered.shape[:2], -1).contiguous())
    return logits, ordered, torch.where(found & (ids >= 0)[..., None], place, -1)[..., 0], starts
