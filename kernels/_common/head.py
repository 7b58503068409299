"""The teacher's head for `adaptive_kl`: tokens above a boundary logit, and how many at it, in token
order.

With w_j = exp(k (t_j - max t)) and Z their sum, the boundary is the largest logit at or above which
lies more than Z / 2; of the tokens at it, as many are in as keep the mass within Z / 2, and one in
any case if none is above. The boundary is at least max t - T (log 2V + 1), for rarer tokens hold
less than half together.

Two searches find the same boundary. `head_of_kept_row` reads the row once, holds it in registers
and bisects it there: a step weighs the tokens at or above one logit and moves an end of the range
to a logit that is in the row. `head_of_long_row` reads the row in every step, so a step tries 16
logits: up to eight reads for fp32, four for bf16 and five for fp16.
"""

import triton
import triton.language as tl

from pydistill.kernels._common.numerics import (
    INF,
    from_ordered_key,
    load_fp32,
    ordered_key,
    partial_mins,
    partial_sums,
)

_WAYS = tl.constexpr(16)


@triton.jit
def _tied(boundary, above, half, k, max_t):
    """How many tokens at the boundary are in, where those above it weigh `above`."""
    count = tl.floor((half - above) / tl.exp(k * (boundary - max_t))).to(tl.int32)
    return tl.where(above == 0.0, tl.maximum(count, 1), count)


@triton.jit
def _divide(row, cut, k, peak, LANES: tl.constexpr):
    """What the tokens at or above `cut` weigh, the lowest of them, and the highest below it."""
    mass = tl.zeros((LANES,), tl.float32)
    lowest = tl.full((LANES,), INF, tl.float32)
    highest = tl.full((LANES,), -INF, tl.float32)
    for i in tl.static_range(len(row)):
        t = row[i]
        beyond = t >= cut
        mass += partial_sums(tl.exp(tl.where(beyond, k * (t - peak), -INF)), LANES)
        lowest = tl.minimum(lowest, partial_mins(tl.where(beyond, t, INF), LANES))
        highest = tl.maximum(highest, -partial_mins(tl.where(beyond, INF, -t), LANES))
    return tl.sum(mass, 0), tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def head_of_kept_row(row_t, vocab, k, depth, ROW: tl.constexpr, LANES: tl.constexpr):
    """max t, Z, the boundary and how many at it, of a row of at most ROW tokens.

    The row is a tuple of blocks, of which a thread loads 16 bytes each, and every step computes the
    weights anew: kept as well, they would take as many registers as the row.
    """
    BLOCK: tl.constexpr = LANES * (128 // row_t.dtype.element_ty.primitive_bitwidth)
    lanes = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -INF, tl.float32)
    row = ()
    for start in tl.static_range(0, ROW, BLOCK):
        at = start + lanes
        block = load_fp32(row_t + at, at < vocab)
        most = tl.maximum(most, block)
        row += (block,)  # type: ignore[assignment]
    max_t = tl.max(most, 0)
    peak = tl.where(max_t == -INF, 0.0, max_t)
    mass = tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(len(row)):
        mass += partial_sums(tl.exp(k * (row[i] - peak)), LANES)
    z_t = tl.sum(mass, 0)
    half = 0.5 * z_t
    above = tl.full((), 0.0, tl.float32)  # mass beyond `high`
    high = max_t
    low = tl.where(half < 1.0, high, max_t - depth / k)  # the first token alone exceeds half
    while low < high:
        bottom = ordered_key(low).to(tl.int64)
        span = ordered_key(high).to(tl.int64) - bottom
        cut = from_ordered_key((bottom + (span + 1) // 2).to(tl.int32))
        beyond, lowest, highest = _divide(row, cut, k, peak, LANES)
        more = beyond > half
        low = tl.where(more, lowest, low)
        high = tl.where(more, high, highest)
        above = tl.where(more, above, beyond)
        peak = tl.where(low > high, low, peak)  # never so: keeps the weights inside the loop
    return max_t, z_t, high, _tied(high, above, half, k, max_t)


@triton.jit
def head_of_long_row(
    row_t, vocab, k, max_t, z_t, depth, KEY_SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The boundary and how many at it, of a row of any length whose max t and Z are known.

    A 16-way bisection of the ordered integers of the logits; `KEY_SHIFT` drops the bits that the
    teacher's dtype does not have.
    """
    lanes = tl.arange(0, BLOCK)
    ways = tl.arange(1, _WAYS + 1)
    half = 0.5 * z_t
    above = tl.full((), 0.0, tl.float32)  # mass beyond the boundary
    high = (ordered_key(max_t) >> KEY_SHIFT).to(tl.int64)
    low = (ordered_key(max_t - depth / k) >> KEY_SHIFT).to(tl.int64)
    low = tl.where(half < 1.0, high, low)  # the first token alone exceeds half
    while low < high:
        step = (high - low) // _WAYS + 1
        bounds = tl.minimum(low + step * ways, high + 1).to(tl.int32)
        mass = tl.zeros((_WAYS,), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            t = load_fp32(row_t + at, at < vocab)
            key, e = ordered_key(t) >> KEY_SHIFT, tl.exp(k * (t - max_t))
            mass += tl.sum(tl.where(key[None, :] >= bounds[:, None], e[None, :], 0.0), 1)
        more = mass > half
        above = tl.max(tl.where(more, 0.0, mass), 0)
        low += step * tl.sum(more.to(tl.int64), 0)
        high = tl.minimum(high, low + step - 1)
    key = low.to(tl.int32)
    dropped = tl.where(key < 0, (1 << KEY_SHIFT) - 1, 0)
    boundary = from_ordered_key((key << KEY_SHIFT) | dropped)
    return boundary, _tied(boundary, above, half, k, max_t)
