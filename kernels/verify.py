"""Triton kernels of `verify` for chains: how many drafted tokens of each request the target
accepts, and the token that follows them.

The maths is docs/ops/verify.md. Shapes: target [B, K + 1, V], draft [B, K, V], or [B, K, S] with
the tokens of its logits, ids [B, K]; fp32, bf16 or fp16. Logits are weighed in fp32 and summed in
fp64 beyond a block of columns; odds, coins and draws are fp64.

Six small kernels. `_reduce_blocks` reads every row that can matter once, and `_finish_rows` makes
its numbers of the blocks' (verify_rows.py). With these the odds of all slots are known: a test
needs two logits and no row. So `_walk` says which slots are tested at all, and `_compare` reads
only their rows again, for the overlap and for what a rejection leaves. `_decide` writes the
results, and `_sample` walks the sums of the blocks and opens one to draw the token. A method whose
odds hang on the comparison (`block`, `tv_budget`) compares every slot that could be tested.

What fp32 would decide by rounding is done again in fp64: a `top_p` limit within 5e-7 of a mass, and
the residual of a rejection where less than 1e-3 is left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.launch import compiler_options, on_device
from pydistill.kernels._common.numerics import INF, load_fp32
from pydistill.kernels.verify_rows import (
    CUT,
    DEPTH,
    LARGEST,
    NUMBERS,
    PARTS,
    PER_THREAD,
    POINT,
    TOTAL,
    WARPERS,
    Rows,
    block_of,
    by_token,
    draft_block,
    exactly,
    inverse_of,
    load,
    log_probabilities,
    mass_exactly,
    reach,
    sums_of,
    weights,
)

# Numbers shared with pydistill/reference/verify.py.
TOKEN, BLOCK_METHOD, TYPICAL = map(tl.constexpr, range(3))
STRICT, LINEAR, SQUARE, EXPONENTIAL, ENSEMBLE, TV_BUDGET = map(tl.constexpr, range(6))
BAD_ID, BAD_TARGET, BAD_DRAFT, IMPOSSIBLE = map(tl.constexpr, (1, 2, 4, 8))
ACCEPT, RESAMPLE = map(tl.constexpr, (0, 1))

_SMALL = tl.constexpr(1e-3)  # a residual that is summed in fp64


@triton.jit
def coins(seed, position, slot, stream):
    """Uniform numbers in [0, 1) by Philox4x32-10, one a slot (int32)."""
    zero = (slot * 0).to(tl.uint32)
    c0 = (position & 0xFFFFFFFF).to(tl.uint32) + zero
    c1 = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32) + zero
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    c0, c1, _c2, _c3 = tl.philox_impl(c0, c1, slot.to(tl.uint32), zero + stream, k0, k1)
    word = ((c0 >> 5).to(tl.int64) << 26) + (c1 >> 6).to(tl.int64)
    return word.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _slots(
    target, draft, bias, ids, places, num_drafted, warpers, p_numbers, q_numbers,
    target_request, target_row, draft_request, draft_row, bias_step, drafted_step, warper_step,
    request, slots, tokens, SLOTS: tl.constexpr,
):  # fmt: skip
    """Of every slot of a request: its token, log p and q of it, the fault of its rows; and how many
    leading slots can be tested."""
    slot = tl.arange(0, SLOTS)
    reached = reach(
        ids + request * slots, num_drafted + request * drafted_step, slots, tokens, SLOTS
    )
    there = slot < reached
    own = warpers + request * warper_step
    token = tl.load(ids + request * slots + slot, mask=slot < slots, other=-1)
    row = slot.to(tl.int64)
    x = load_fp32(target + request * target_request + row * target_row + token, there)
    if bias is not None:
        x += tl.load(bias + request * bias_step + token, mask=there, other=0.0)
    own_p = p_numbers + (request * (slots + 1) + slot) * NUMBERS
    log_p = log_probabilities(x, token, own_p, inverse_of(own), there)
    qx = tl.where(there, 1.0, 0.0).to(tl.float64)
    q_sound = there
    if draft is not None:
        sampled = (tl.load(own) != 0.0) & (tl.load(own + WARPERS) != 0.0)
        asked = slot < tl.where(sampled, reached, 0)
        place = tl.load(places + request * slots + slot, mask=asked, other=-1)
        known = asked & (place >= 0)
        y = load_fp32(draft + request * draft_request + row * draft_row + place, known)
        own_q = q_numbers + (request * slots + slot) * NUMBERS
        log_q = log_probabilities(y, token, own_q, inverse_of(own + WARPERS), asked)
        q_sound = (log_q == log_q) | ~asked
        qx = tl.where(asked, tl.exp(tl.where(known, log_q, -INF)), qx)
    outside = (token < -1) | (token >= tokens)
    fault = tl.where(there & (qx > 0.0), 0, IMPOSSIBLE)
    fault = tl.where(q_sound, fault, BAD_DRAFT)
    fault = tl.where(log_p == log_p, fault, BAD_TARGET)
    fault = tl.where(there, fault, tl.where(outside, BAD_ID, 0))
    fault = tl.where(slot < tl.load(num_drafted + request * drafted_step), fault, 0)
    good = there & (fault == 0)
    length = tl.min(tl.where(good, SLOTS, slot), 0)
    return token, log_p, qx, fault, length


@triton.jit
def _odds(px, qx, rest, strength, LENIENCE: tl.constexpr):
    """f(p, q) of the drafted token: its slot passes when coin * q < f."""
    if LENIENCE == LINEAR:
        return px / strength
    elif LENIENCE == SQUARE:
        return px / (strength * strength)
    elif LENIENCE == EXPONENTIAL:
        return tl.where(px > 0.0, tl.exp(strength * tl.log(px)), 0.0)
    elif (LENIENCE == ENSEMBLE) | (LENIENCE == TV_BUDGET):
        weight = _weight_of_target(rest, strength, LENIENCE)
        return weight * px + (1.0 - weight) * qx
    else:
        return px


@triton.jit
def _weight_of_target(rest, strength, LENIENCE: tl.constexpr):
    """Of an ensemble; `rest` is the residual mass."""
    if LENIENCE == ENSEMBLE:
        return strength + rest * 0.0
    else:
        return tl.where(rest > strength, 1.0 - strength / rest, 0.0)


@triton.jit
def _least_typical(numbers, inverse, strength, alpha, there):
    """What p of a token has to exceed, from its row's entropy."""
    total = tl.load(numbers + TOTAL, mask=there, other=1.0)
    depth = tl.load(numbers + DEPTH, mask=there, other=0.0)
    point = tl.load(numbers + POINT, mask=there, other=-1.0)
    entropy = tl.where(point >= 0.0, 0.0, tl.log(total) + inverse * depth / total)
    return tl.minimum(alpha * tl.exp(-entropy), strength)


@triton.jit
def _exact_number(high, low):
    """An argument in fp64, of the two floats that carry it."""
    return tl.full((), high, tl.float32).to(tl.float64) + tl.full((), low, tl.float32)


@triton.jit
def _leading(passes, SLOTS: tl.constexpr):
    return tl.min(tl.where(passes, SLOTS, tl.arange(0, SLOTS)), 0)


@triton.jit
def _walk(
    target, draft, bias, ids, places, num_drafted, warpers, seed, position, p_numbers, q_numbers,
    scales, tested, target_request, target_row, draft_request, draft_row, bias_step, drafted_step,
    warper_step, seed_step, position_step, slots, tokens, strength, strength_low, alpha, alpha_low,
    METHOD: tl.constexpr, LENIENCE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """How many slots of a request are tested, and the scale of every residual [scale p - q]+."""
    request = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    strength = _exact_number(strength, strength_low)
    _token, log_p, qx, _fault, length = _slots(
        target, draft, bias, ids, places, num_drafted, warpers, p_numbers, q_numbers,
        target_request, target_row, draft_request, draft_row, bias_step, drafted_step, warper_step,
        request, slots, tokens, SLOTS,
    )  # fmt: skip
    px = tl.exp(log_p)
    scale = tl.full((SLOTS,), 1.0, tl.float64)
    if METHOD == BLOCK_METHOD:
        ratio = tl.full((), 1.0, tl.float64)
        gain = px / qx
        for i in range(length):
            gained = ratio * tl.sum(tl.where(slot == i, gain, 0.0), 0)
            ratio = tl.minimum(gained, 1.0)
            scale = tl.where(slot > i, ratio, scale)
    elif LENIENCE != TV_BUDGET:
        coin = coins(
            tl.load(seed + request * seed_step), tl.load(position + request * position_step), slot,
            ACCEPT,
        )  # fmt: skip
        if METHOD == TYPICAL:
            own = p_numbers + (request * (slots + 1) + slot) * NUMBERS
            inverse = inverse_of(warpers + request * warper_step)
            least = _least_typical(
                own, inverse, strength, _exact_number(alpha, alpha_low), slot < length
            )
            passes = px > least
        else:
            passes = coin * qx < _odds(px, qx, px * 0.0, strength, LENIENCE)
        length = tl.minimum(_leading(passes & (slot < length), SLOTS) + 1, length)
    tl.store(scales + request * (slots + 1) + slot, scale, mask=slot <= slots)
    tl.store(tested + request, length)


@triton.jit
def _compare(
    target, draft, bias, support, starts, ids, warpers, tops, masses, p_numbers, q_numbers, scales,
    tested, drafted, same, left, more, target_request, target_row, draft_request, draft_row,
    bias_step, support_request, support_row, starts_request, starts_row, warper_step, slots, vocab,
    blocks, strength, strength_low, alpha, alpha_low,
    METHOD: tl.constexpr, LENIENCE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block of one slot: min(p, q), the residual, and what its bias needs. `drafted`, for
    the second pass of `typical`, is what the first gave as `more`."""
    index, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, slot = index // slots, index % slots
    if slot < tl.load(tested + request):
        own = warpers + request * warper_step
        own_p = p_numbers + (request * (slots + 1) + slot) * NUMBERS
        inverse, largest = inverse_of(own), tl.load(own_p + LARGEST)
        cut, total = tl.load(own_p + CUT).to(tl.float32), tl.load(own_p + TOTAL)
        scale = tl.load(scales + request * (slots + 1) + slot)
        if bias is not None:
            bias += request * bias_step
        row = target + request * target_request + slot * target_row
        at = block * BLOCK + tl.arange(0, BLOCK)
        place = index * blocks + block
        sums = (request * (slots + 1) + slot) * blocks + block
        pointed = tl.full((), True, tl.int1)
        if draft is not None:
            pointed = (tl.load(own) == 0.0) | (tl.load(own + WARPERS) == 0.0)
        if tl.load(own) != 0.0:
            # What is left where q is 0 throughout, or a point in another block.
            about = tl.load(tops + sums)
            share = tl.load(masses + sums) * exactly(about, largest, inverse)
            mass = tl.where(about > -INF, share, 0.0) / total
            if pointed:
                token = tl.load(ids + index)
                if token // BLOCK == block:
                    x = load(row, bias, at, vocab)
                    e = tl.where((x >= cut) & (at != token), weights(x, about, inverse), 0.0)
                    mass = tl.sum(e, 0).to(tl.float64) * exactly(about, largest, inverse) / total
                tl.store(left + place, (scale * mass).to(tl.float32))
            elif draft is not None:
                row_y = draft + request * draft_request + slot * draft_row
                empty = tl.full((), False, tl.int1)
                if support is not None:
                    support += request * support_request + slot * support_row
                    starts += request * starts_request + slot * starts_row
                    empty = tl.load(starts + block) == tl.load(starts + block + 1)
                if (METHOD == TYPICAL) & (drafted is not None):
                    lane = tl.arange(0, BLOCKS)
                    parts = tl.load(drafted + index * blocks + lane, mask=lane < blocks, other=0.0)
                    chosen = tl.sum(parts.to(tl.float64), 0).to(tl.float32)
                    if empty:
                        tl.store(more + place, 0.5 * chosen * mass.to(tl.float32))
                elif empty:
                    tl.store(same + place, 0.0)
                    tl.store(left + place, (scale * mass).to(tl.float32))
                    if more is not None:
                        tl.store(more + place, 0.0)
                if empty == 0:
                    own_q = q_numbers + index * NUMBERS
                    q_cut, q_total = tl.load(own_q + CUT).to(tl.float32), tl.load(own_q + TOTAL)
                    q_largest, q_inverse = tl.load(own_q + LARGEST), inverse_of(own + WARPERS)
                    x = load(row, bias, at, vocab)
                    y = draft_block(row_y, support, starts, block, vocab, BLOCK, 1)
                    p = tl.where(x >= cut, weights(x, largest.to(tl.float32), inverse), 0.0)
                    p *= (1.0 / total).to(tl.float32)
                    q = tl.where(y >= q_cut, weights(y, q_largest.to(tl.float32), q_inverse), 0.0)
                    q *= (1.0 / q_total).to(tl.float32)
                    number = _exact_number(strength, strength_low)
                    if METHOD == TYPICAL:
                        least = _least_typical(
                            own_p, inverse, number, _exact_number(alpha, alpha_low), True
                        ).to(tl.float32)
                        kept = tl.where(p > least, q, 0.0)
                        if drafted is not None:
                            distance = 0.5 * tl.abs(kept - chosen * p)
                            tl.store(more + place, tl.sum(distance, 0))
                        else:
                            tl.store(more + place, tl.sum(kept, 0))
                    elif (LENIENCE == LINEAR) | (LENIENCE == SQUARE):
                        factor = 1.0 / number
                        if LENIENCE == SQUARE:
                            factor *= factor
                        f = tl.minimum(factor, 1e38).to(tl.float32) * p
                        excess = tl.minimum(q, f) - tl.minimum(q, p)
                        tl.store(more + place, tl.sum(excess, 0))
                    elif LENIENCE == EXPONENTIAL:
                        # log p from the logit: p itself has lost what is far below 1.
                        depth = (inverse * (x.to(tl.float64) - largest)).to(tl.float32)
                        depth = tl.maximum(depth - tl.log(total).to(tl.float32), -105.0)
                        f = tl.where(p > 0.0, tl.exp(number.to(tl.float32) * depth), 0.0)
                        excess = tl.maximum(tl.minimum(q, f) - tl.minimum(q, p), 0.0)
                        tl.store(more + place, tl.sum(excess, 0))
                    if (METHOD != TYPICAL) | (drafted is None):
                        tl.store(same + place, tl.sum(tl.minimum(p, q), 0))
                        rest = tl.maximum(scale.to(tl.float32) * p - q, 0.0)
                        tl.store(left + place, tl.sum(rest, 0))


@triton.jit
def _decide(
    target, draft, bias, ids, places, num_drafted, warpers, seed, position, p_numbers, q_numbers,
    scales, tested, same, left, more, tokens, num_accepted, logprobs, overlap, tv, target_lse,
    draft_lse, flags, path, target_request, target_row, draft_request, draft_row, bias_step,
    drafted_step, warper_step, seed_step, position_step, slots, vocab, blocks, strength,
    strength_low, alpha, alpha_low,
    METHOD: tl.constexpr, LENIENCE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One request's results, a lane a slot, but for a token that has to be drawn."""
    request = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    nan = float("nan")
    own = warpers + request * warper_step
    inverse, greedy = inverse_of(own), tl.load(own) == 0.0
    pointed = True
    if draft is not None:
        pointed = greedy | (tl.load(own + WARPERS) == 0.0)
    strength = _exact_number(strength, strength_low)
    token, log_p, qx, fault, length = _slots(
        target, draft, bias, ids, places, num_drafted, warpers, p_numbers, q_numbers,
        target_request, target_row, draft_request, draft_row, bias_step, drafted_step, warper_step,
        request, slots, vocab, SLOTS,
    )  # fmt: skip
    px = tl.exp(log_p)
    compared = tl.load(tested + request)
    scales += request * (slots + 1)
    scale = tl.load(scales + slot, mask=slot <= slots, other=1.0)

    meet, rest, excess = px, scale * (1.0 - px), px * 0.0
    if greedy == 0:
        for i in range(compared):
            index = request * slots + i
            rest = tl.where(slot == i, tl.sum(sums_of(left, index, blocks, BLOCKS), 0), rest)
            if pointed == 0:
                found = tl.sum(sums_of(same, index, blocks, BLOCKS), 0)
                meet = tl.where(slot == i, found, meet)
                if more is not None:
                    found = tl.sum(sums_of(more, index, blocks, BLOCKS), 0)
                    excess = tl.where(slot == i, found, excess)

    coin = coins(
        tl.load(seed + request * seed_step), tl.load(position + request * position_step), slot,
        ACCEPT,
    )  # fmt: skip
    own_p = p_numbers + (request * (slots + 1) + slot) * NUMBERS
    if METHOD == BLOCK_METHOD:
        ratio = tl.load(scales + slot + 1, mask=slot < slots, other=1.0)
        coming = px * 0.0  # the residual of the next slot
        for i in range(1, compared):
            value = tl.sum(tl.where(slot == i, rest, 0.0), 0)
            coming = tl.where(slot == i - 1, value, coming)
        sure = (coming == 0.0) & (ratio == 1.0)
        last = slot == length - 1
        num = tl.where(last, ratio, tl.where(sure, 1.0, coming))
        den = tl.where(last | sure, 1.0, coming + (1.0 - ratio))
        passes = (coin * den < num) & (slot < length)
        accepted = tl.max(tl.where(passes, slot + 1, 0), 0)
        reported, seen = slot < length, slot <= length
    else:
        if METHOD == TYPICAL:
            least = _least_typical(
                own_p, inverse, strength, _exact_number(alpha, alpha_low), slot < length
            )
            passes = px > least
            excess = tl.where(pointed, tl.where(passes, rest, 0.0), excess)
        else:
            odds = _odds(px, qx, rest, strength, LENIENCE)
            passes = coin * qx < odds
            if (LENIENCE == ENSEMBLE) | (LENIENCE == TV_BUDGET):
                excess = (1.0 - _weight_of_target(rest, strength, LENIENCE)) * rest
            if LENIENCE != STRICT:
                excess = tl.where(pointed, tl.minimum(odds, 1.0) - px, excess)
        accepted = _leading(passes & (slot < length), SLOTS)
        reported, seen = slot < tl.minimum(accepted + 1, length), slot <= accepted

    emitted, ends = slot < accepted, slot == accepted
    inside, rows = slot <= slots, request * (slots + 1) + slot
    reached = reported | ends
    total = tl.load(own_p + TOTAL, mask=reached, other=0.0)
    point = tl.load(own_p + POINT, mask=ends, other=-1.0).to(tl.int64)
    tl.store(tokens + rows, tl.where(emitted, token, point), mask=inside)
    tl.store(num_accepted + request, accepted.to(tl.int64))
    value = tl.where(emitted, log_p, tl.where(point >= 0, 0.0, nan))
    tl.store(logprobs + rows, value.to(tl.float32), mask=inside)
    value = inverse * tl.load(own_p + LARGEST, mask=reached, other=0.0) + tl.log(total)
    value = tl.where(reached & (total > 0.0), tl.where(greedy, nan, value), nan)
    tl.store(target_lse + rows, value.to(tl.float32), mask=inside)
    fault = tl.where(seen, fault, 0) | tl.where(ends & (total == 0.0), BAD_TARGET, 0)
    tl.store(flags + rows, fault, mask=inside)
    inside, rows = slot < slots, request * slots + slot
    tl.store(path + rows, tl.where(emitted, slot, -1).to(tl.int64), mask=inside)
    tl.store(overlap + rows, tl.where(reported, meet, nan).to(tl.float32), mask=inside)
    tl.store(tv + rows, tl.where(reported, excess, nan).to(tl.float32), mask=inside)
    value = tl.full((SLOTS,), nan, tl.float64)
    if draft is not None:
        if pointed == 0:
            own_q = q_numbers + rows * NUMBERS
            value = tl.log(tl.load(own_q + TOTAL, mask=reported, other=1.0))
            value += inverse_of(own + WARPERS) * tl.load(own_q + LARGEST, mask=reported, other=0.0)
            value = tl.where(reported, value, nan)
    tl.store(draft_lse + rows, value.to(tl.float32), mask=inside)


@triton.jit
def _residual_exactly(
    row, bias, draft, support, starts, cut, largest, inverse, q_cut, q_largest, q_inverse, scale,
    vocab, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale / sum p, 1 / sum q and the residual of every block, in fp64: a small residual is a
    difference of nearly equal numbers, and rounding would choose its tokens."""
    total = mass_exactly(row, bias, cut, largest, inverse, vocab, BLOCK // PARTS)
    q_total = tl.full((), 0.0, tl.float64)
    for part in range(blocks * PARTS):
        y = draft_block(draft, support, starts, part, vocab, BLOCK, PARTS)
        q_total += tl.sum(tl.where(y >= q_cut, exactly(y, q_largest, q_inverse), 0.0), 0)
    by_p, by_q = scale / total, 1.0 / q_total
    lane, column = tl.arange(0, BLOCKS), tl.arange(0, BLOCK // PARTS)
    sums = tl.full((BLOCKS,), 0.0, tl.float64)
    for part in range(blocks * PARTS):
        x = load(row, bias, part * (BLOCK // PARTS) + column, vocab)
        y = draft_block(draft, support, starts, part, vocab, BLOCK, PARTS)
        p = tl.where(x >= cut, exactly(x, largest, inverse), 0.0)
        q = tl.where(y >= q_cut, exactly(y, q_largest, q_inverse), 0.0)
        rest = tl.sum(tl.maximum(p * by_p - q * by_q, 0.0), 0)
        sums = tl.where(lane == part // PARTS, sums + rest, sums)
    return by_p, by_q, sums


@triton.jit
def _sample(
    target, draft, bias, support, starts, ids, warpers, seed, position, tops, masses, p_numbers,
    q_numbers, scales, tested, left, num_accepted, tokens, logprobs, target_request, target_row,
    draft_request, draft_row, bias_step, support_request, support_row, starts_request, starts_row,
    warper_step, seed_step, position_step, slots, vocab, blocks,
    METHOD: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws the token behind the accepted ones: from the residual of the row where a token was
    rejected, else from p."""
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(num_accepted + request)
    place = request * (slots + 1) + slot
    own, own_p = warpers + request * warper_step, p_numbers + place * NUMBERS
    total = tl.load(own_p + TOTAL)
    if (total > 0.0) & (tl.load(own) != 0.0):
        cut, largest = tl.load(own_p + CUT).to(tl.float32), tl.load(own_p + LARGEST)
        inverse = inverse_of(own)
        row = target + request * target_request + slot * target_row
        if bias is not None:
            bias += request * bias_step
        lane = tl.arange(0, BLOCKS)
        about = tl.load(tops + place * blocks + lane, mask=lane < blocks, other=-INF)
        sums = sums_of(masses, place, blocks, BLOCKS) * exactly(about, largest, inverse)
        by_p, by_q = tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
        tried = tl.full((), -1, tl.int64)
        if (slot < tl.load(tested + request)) & (METHOD != TYPICAL):
            index = request * slots + slot
            sums, tried = sums_of(left, index, blocks, BLOCKS), tl.load(ids + index)
            by_p = tl.load(scales + place) / total
        dense = tried >= 0
        if draft is not None:
            draft += request * draft_request + slot * draft_row
            if support is not None:
                support += request * support_request + slot * support_row
                starts += request * starts_request + slot * starts_row
            dense = dense & (tl.load(own + WARPERS) != 0.0)
            own_q = q_numbers + (request * slots + slot) * NUMBERS
            q_cut = tl.load(own_q + CUT, mask=dense, other=0.0).to(tl.float32)
            q_largest = tl.load(own_q + LARGEST, mask=dense, other=0.0)
            q_inverse = inverse_of(own + WARPERS)
            if dense:
                tried = tl.full((), -1, tl.int64)
                by_q = 1.0 / tl.load(own_q + TOTAL)
                if tl.sum(sums, 0) < _SMALL:
                    by_p, by_q, sums = _residual_exactly(
                        row, bias, draft, support, starts, cut, largest, inverse, q_cut, q_largest,
                        q_inverse, tl.load(scales + place), vocab, blocks, BLOCKS, BLOCK,
                    )  # fmt: skip

        # The first block whose cumulative sum exceeds the coin's share, and in it the first token.
        coin = coins(
            tl.load(seed + request * seed_step), tl.load(position + request * position_step),
            slot.to(tl.int32), RESAMPLE,
        )  # fmt: skip
        bound = coin * tl.sum(sums, 0)
        block = tl.min(tl.where(tl.cumsum(sums, 0) > bound, lane, BLOCKS), 0)
        block = tl.minimum(block, tl.max(tl.where(sums > 0.0, lane, 0), 0))
        bound -= tl.sum(tl.where(lane < block, sums, 0.0), 0)
        column = tl.arange(0, BLOCK)
        at = block * BLOCK + column
        x = load(row, bias, at, vocab)
        w = tl.where((x >= cut) & (at != tried), exactly(x, largest, inverse), 0.0) * by_p
        if draft is not None:
            if dense:
                y = draft_block(draft, support, starts, block, vocab, BLOCK, 1)
                q = tl.where(y >= q_cut, exactly(y, q_largest, q_inverse), 0.0)
                w = tl.maximum(w - q * by_q, 0.0)
        first = tl.min(tl.where(tl.cumsum(w, 0) > bound, column, BLOCK), 0)
        last = tl.max(tl.where(w > 0.0, column, -1), 0)
        if last < 0:  # the block's mass was rounding: its likeliest token
            last = tl.min(tl.where(x == tl.max(x, 0), column, BLOCK), 0)
        drawn = tl.minimum(first, last)
        logit = tl.sum(tl.where(column == drawn, x, 0.0), 0).to(tl.float64)
        tl.store(tokens + place, (block * BLOCK + drawn).to(tl.int64))
        value = inverse * (logit - largest) - tl.log(total)
        tl.store(logprobs + place, value.to(tl.float32))


def verify_fwd(
    target: Tensor, draft: Tensor | None, ids: Tensor, num_drafted: Tensor, warpers: Tensor,
    seed: Tensor, position: Tensor, logit_bias: Tensor | None, parent: Tensor | None,
    support: Tensor | None, method: int, lenience: int, strength: float, alpha: float, check: bool,
    tokens: Tensor, num_accepted: Tensor, logprobs: Tensor, overlap: Tensor, bias: Tensor,
    target_lse: Tensor, draft_lse: Tensor, flags: Tensor, path: Tensor,
) -> None:  # fmt: skip
    """Writes the nine results of chains."""
    batch, slots = ids.shape
    vocab = target.shape[-1]
    if batch == 0:
        return
    places, starts = ids, None
    if draft is not None and support is not None:
        draft, support, places, starts = by_token(draft, support, ids, vocab, block_of(vocab))
    block = block_of(vocab)
    p = Rows(target, block, method == TYPICAL.value)
    q = None if draft is None or slots == 0 else Rows(draft, block_of(draft.shape[-1]), False)
    if q is None:
        draft = support = starts = None
    lanes = triton.next_power_of_2(slots + 1)
    compares = method == TYPICAL.value or lenience in (1, 2, 3)
    blocks, parts = p.blocks, p.tops.new_empty((3, batch * slots, p.blocks))
    same, left, more = parts[0], parts[1], parts[2] if compares and q is not None else None
    scales = p.numbers.new_empty((batch, slots + 1))
    tested = torch.empty(batch, dtype=torch.int32, device=target.device)

    def step(x: Tensor) -> int:
        return x.stride(0) if x.shape[0] > 1 else 0

    def strides(x: Tensor | None) -> tuple[int, int]:
        if x is None:
            return 0, 0
        return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))  # type: ignore[return-value]

    bias_step = 0 if logit_bias is None else step(logit_bias)
    steps = (step(num_drafted), step(warpers))
    coin_steps = (step(seed), step(position))
    numbers = (*_as_floats(strength), *_as_floats(alpha))
    rows = (*strides(target), *strides(draft))
    tokens_of_draft = (*strides(support), *strides(starts))
    q_numbers = None if q is None else q.numbers
    rule = {"METHOD": method, "LENIENCE": lenience}
    with on_device(target):
        for side, own in ((0, p), (1, q)):
            if own is not None:
                own.reduce(
                    None if side else logit_bias, ids, num_drafted, warpers, bias_step, *steps,
                    slots, vocab, side, lanes,
                )  # fmt: skip
        _walk[(batch,)](
            target, draft, logit_bias, ids, places, num_drafted, warpers, seed, position, p.numbers,
            q_numbers, scales, tested, *rows, bias_step, *steps, *coin_steps, slots, vocab,
            *numbers, **rule, SLOTS=lanes, num_warps=1,
        )  # fmt: skip
        options = {"BLOCKS": p.lanes, "BLOCK": block, **compiler_options(block, PER_THREAD)}
        drafted = None
        for again in range(2 if method == TYPICAL.value and q is not None else 1):
            if slots:
                _compare[(batch * slots, blocks)](
                    target, draft, logit_bias, support, starts, ids, warpers, p.tops, p.masses,
                    p.numbers, q_numbers, scales, tested, drafted, same, left, more, *rows,
                    bias_step, *tokens_of_draft, steps[1], slots, vocab, blocks, *numbers, **rule,
                    **options,
                )  # fmt: skip
            if more is not None and method == TYPICAL.value and not again:
                drafted, more = more, torch.empty_like(more)
        _decide[(batch,)](
            target, draft, logit_bias, ids, places, num_drafted, warpers, seed, position, p.numbers,
            q_numbers, scales, tested, same, left, more, tokens, num_accepted, logprobs, overlap,
            bias, target_lse, draft_lse, flags, path, *rows, bias_step, *steps, *coin_steps, slots,
            vocab, blocks, *numbers, **rule, SLOTS=lanes, BLOCKS=p.lanes, num_warps=1,
        )  # fmt: skip
        _sample[(batch,)](
            target, draft, logit_bias, support, starts, ids, warpers, seed, position, p.tops,
            p.masses, p.numbers, q_numbers, scales, tested, left, num_accepted, tokens, logprobs,
            *rows, bias_step, *tokens_of_draft, steps[1], *coin_steps, slots, vocab, blocks,
            METHOD=method, **options,
        )  # fmt: skip


def _as_floats(x: float) -> tuple[float, float]:
    """A number as the two fp32 numbers that carry it to a kernel."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high
