"""Triton kernels of `divergence`: row losses and what backward needs, gradients, both in place.

The maths is docs/ops/divergence.md: for every pair of a student row s and a teacher row t,

    loss = (1 - label_weight) * t2 * D(p, q) + label_weight * CE(s, label) + z_loss * lse(s)^2
    dD/ds_j = k * (q_j h_j - q_j c),   k = 1 / T,   c = sum q h

A kind's D and q h are `_common/divergences.py`.

Shapes: student [S, V_s], teacher [T, V_t], loss [R], saved [R, 8], stats [R, 6] or [0, 6], gradient
[S, V_s]. fp32, bf16 or fp16 logits, each side its own; all arithmetic is fp32.

A program of forward owns one pair, a program of backward one student row; each runs over its rows
in blocks. The sums of a row stay spread over the threads, one partial sum a lane, until the row
ends: only the two maxima cross threads in every block. Bytes: the two KLs read both rows once,
since their sums are taken about a constant known after the first block; only a row whose value
would cancel is swept again. Other kinds read twice, for the normalisers and for the terms, and so
do statistics. `adaptive_kl` must find the boundary of the teacher's head in between: a row of up to
32,768 tokens stays in registers for that, of a longer one the teacher is read up to eight more
times (fp32; four for bf16, five for fp16). Backward reads once and writes once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.divergences import (
    ADAPTIVE_KL,
    ALPHA_BETA,
    CHI2,
    FORWARD_KL,
    REVERSE_KL,
    TODI,
    infinite_tokens,
    log_ratio,
    parameters_valid,
    terms,
)
from pydistill.kernels._common.head import head_of_kept_row, head_of_long_row
from pydistill.kernels._common.launch import compiler_options, on_device
from pydistill.kernels._common.numerics import (
    FAR,
    INF,
    expm1,
    load_fp32,
    log1p,
    partial_sums,
    phi,
    weighted_phi,
)

SAVED = tl.constexpr(8)  # max s, log Zs, max t, log Zt, D, c, log Z1, w
STATS = tl.constexpr(6)

THREADS = 256  # of a program on a long row; each takes 16 bytes at a load
# adaptive_kl keeps a teacher's row of up to so many tokens in the registers of so many threads: 64
# of the 128 that each can have.
KEPT, KEPT_THREADS = 32768, 512
# Beyond this, exp in units of the other side's largest term leaves what fp32 can sum to any use.
_REACH = tl.constexpr(40.0)


@triton.jit
def _row(index, pair):
    """The row that pair `pair` names on one side."""
    return pair if index is None else tl.load(index + pair)


@triton.jit
def _parameters(row_params, pair, temperature, alpha, beta):
    """T, alpha and beta of a pair: its own where the call has per-row values."""
    if row_params is not None:
        temperature = tl.load(row_params + pair * 3)
        alpha = tl.load(row_params + pair * 3 + 1)
        beta = tl.load(row_params + pair * 3 + 2)
    else:
        temperature = tl.full((), temperature, tl.float32)
        alpha, beta = tl.full((), alpha, tl.float32), tl.full((), beta, tl.float32)
    return temperature, alpha, beta


@triton.jit
def _sweep(
    row_s, row_t, vocab, k, about, estimate, WITH_TEACHER: tl.constexpr, KIND: tl.constexpr,
    NEED_Z1: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over both rows or the student's alone: maxima and sums of exponentials, and for a KL
    its sums about `about`.

    With `lead` the side the KL averages over, d0 = k (lead - other) - about: sums of e_lead
    phi(d0) and e_lead d0. With `estimate`, `about` comes from the first block. `reach` is the
    largest log of (other / lead) in units of the sums.
    """
    lanes = tl.arange(0, BLOCK)
    max_s, max_t = tl.full((), -INF, tl.float32), tl.full((), -INF, tl.float32)
    z_s = tl.zeros((LANES,), tl.float32)
    z_t, z_1, phis, ratios = z_s, z_s, z_s, z_s
    reach = tl.full((), -INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        s = load_fp32(row_s + at, at < vocab)
        if WITH_TEACHER:
            t = load_fp32(row_t + at, at < vocab)
            new_t = tl.maximum(max_t, tl.max(t, 0))
            shift_t = tl.where(new_t == -INF, 0.0, new_t)
            scale_t = tl.exp(k * (max_t - shift_t))
            e_t = tl.exp(k * (t - shift_t))
            z_t = z_t * scale_t + partial_sums(e_t, LANES)
            max_t = new_t
        new_s = tl.maximum(max_s, tl.max(s, 0))
        shift_s = tl.where(new_s == -INF, 0.0, new_s)
        scale_s = tl.exp(k * (max_s - shift_s))
        e_s = tl.exp(k * (s - shift_s))
        z_s = z_s * scale_s + partial_sums(e_s, LANES)
        if NEED_Z1:
            z_1 = z_1 * tl.exp(max_s - shift_s) + partial_sums(tl.exp(s - shift_s), LANES)
        if (KIND == FORWARD_KL) or (KIND == REVERSE_KL):
            if KIND == FORWARD_KL:
                lead, other, e_lead, e_other, scale = t, s, e_t, e_s, scale_t
                apart = k * (shift_t - shift_s)
            else:
                lead, other, e_lead, e_other, scale = s, t, e_s, e_t, scale_s
                apart = k * (shift_s - shift_t)
            if estimate & (start == 0):
                about = apart + tl.log(tl.sum(e_lead, 0) / tl.sum(e_other, 0))
                about = tl.where(tl.abs(about) < FAR, about, 0.0)
            d0 = log_ratio(other, lead, k, about)
            reach = tl.maximum(reach, about - apart)
            other_in_units = e_other * tl.exp(tl.minimum(about - apart, _REACH))
            term = weighted_phi(e_lead, other_in_units, d0)
            term = tl.where((other == -INF) & (lead > -INF), INF, term)
            phis = phis * scale + partial_sums(term, LANES)
            ratios = ratios * scale + partial_sums(e_lead * d0, LANES)
        max_s = new_s
    return max_s, tl.sum(z_s, 0), max_t, tl.sum(z_t, 0), tl.sum(z_1, 0), phis, ratios, about, reach


@triton.jit
def _kl_sweeps(
    row_s, row_t, vocab, k,
    KIND: tl.constexpr, NEED_Z1: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maxima, sums and the KL of a row, in one pass unless the value would cancel; and what is
    added to D for c.

    With A = sum p phi(d0), B = sum p d0 and C the true constant, delta = C - C0 = -log1p(A -
    B), and KL is A - phi(delta) or B - delta. The first is exact unless it cancels, the second
    once KL is not small; if neither, C0 was too far off.
    """
    max_s = tl.full((), 0.0, tl.float32)
    z_s, max_t, z_t, z_1, value, adjust, about = max_s, max_s, max_s, max_s, max_s, max_s, max_s
    sweeps = tl.full((), 0, tl.int32)
    again = sweeps == 0
    while again:
        estimate = sweeps == 0
        max_s, z_s, max_t, z_t, z_1, phis, ratios, about, reach = _sweep(
            row_s, row_t, vocab, k, about, estimate, True, KIND, NEED_Z1, LANES, BLOCK
        )
        constant = k * (max_t - max_s) + tl.log(z_t) - tl.log(z_s)
        if KIND == REVERSE_KL:
            constant = -constant
        z_lead = z_t if KIND == FORWARD_KL else z_s
        a, b = tl.sum(phis, 0) / z_lead, tl.sum(ratios, 0) / z_lead
        plain = b - (constant - about)
        plain_is_exact = (plain > 1.0) & (tl.abs(constant - about) < 16.0 * plain)
        delta = -log1p(a - b)
        centred = a - phi(delta)
        centred_is_exact = (reach <= _REACH) & (centred >= a / 16.0)
        value = tl.where(plain_is_exact, plain, tl.maximum(centred, 0.0))
        adjust = tl.where(plain_is_exact, 0.0, about + delta - constant)
        # A term of inf stays, or becomes NaN where a later maximum scales it by 0.
        infinite = (a < INF) == 0
        value = tl.where(infinite, INF, value)
        adjust = tl.where(infinite, float("nan"), adjust)
        repeat = (a > 1e-12) & ~(plain_is_exact | centred_is_exact | infinite)
        again = estimate & repeat
        about = constant
        sweeps += 1
    return max_s, z_s, max_t, z_t, z_1, value, adjust


@triton.jit
def _term_sweep(
    row_s, row_t, vocab, k, max_s, log_zs, max_t, log_zt, alpha, beta, boundary, at_boundary,
    KIND: tl.constexpr, WITH_STATS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass, with the normalisers known: D, c and w (nothing for a KL, which has them),
    and statistics.

    Its offset of d is rounded as backward will round it, so that c cancels there what that
    rounding adds to h.
    """
    lanes = tl.arange(0, BLOCK)
    value, centre = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    error, head_error, entropy_s, entropy_t, common = value, value, value, value, value
    ties = tl.full((), 0, tl.int32)
    first_s, first_t = ties + vocab, ties + vocab
    offset = k * (max_t - max_s) + log_zt - log_zs
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        s = load_fp32(row_s + at, at < vocab)
        t = load_fp32(row_t + at, at < vocab)
        log_q, log_p = k * (s - max_s) - log_zs, k * (t - max_t) - log_zt
        p, q = tl.exp(log_p), tl.exp(log_q)
        if KIND == ADAPTIVE_KL:
            d = log_ratio(s, t, k, offset)
            infinite = infinite_tokens(KIND, s, t, alpha, beta)
            value += partial_sums(tl.where(infinite, INF, weighted_phi(p, q, d)), LANES)
            centre += partial_sums(tl.where(infinite, INF, weighted_phi(q, p, -d)), LANES)
            token_error = -tl.maximum(p, q) * expm1(-tl.abs(d))
            tied = (t == boundary).to(tl.int32)
            rank = ties + tl.cumsum(tied, 0)
            in_head = (t > boundary) | ((tied != 0) & (rank <= at_boundary))
            ties += tl.sum(tied, 0)
            error += partial_sums(token_error, LANES)
            head_error += partial_sums(tl.where(in_head, token_error, 0.0), LANES)
        elif (KIND != FORWARD_KL) and (KIND != REVERSE_KL):
            d = log_ratio(s, t, k, offset)
            term, q_h = terms(KIND, log_p, log_q, d, alpha, beta)
            if (KIND == CHI2) or (KIND == ALPHA_BETA) or (KIND == TODI):
                term = tl.where(infinite_tokens(KIND, s, t, alpha, beta), INF, term)
            value += partial_sums(term, LANES)
            centre += partial_sums(q_h, LANES)
        if WITH_STATS:
            entropy_s -= partial_sums(q * tl.maximum(log_q, -FAR), LANES)
            entropy_t -= partial_sums(p * tl.maximum(log_p, -FAR), LANES)
            common += partial_sums(tl.minimum(p, q), LANES)
            first_s = tl.minimum(first_s, tl.min(tl.where(s == max_s, at, vocab), 0))
            first_t = tl.minimum(first_t, tl.min(tl.where(t == max_t, at, vocab), 0))
    d_value, c, w = tl.sum(value, 0), tl.sum(centre, 0), tl.sum(head_error, 0)
    if KIND == ADAPTIVE_KL:
        total = tl.sum(error, 0)
        w = tl.where(total == 0.0, 0.5, w / tl.where(total == 0.0, 1.0, total))
        d_value = tl.where(d_value + c < INF, w * d_value + (1.0 - w) * c, INF)
    agree = (first_s == first_t).to(tl.float32)
    return d_value, c, w, tl.sum(entropy_s, 0), tl.sum(entropy_t, 0), tl.sum(common, 0), agree


@triton.jit
def _store_normalisers(saved, pair, max_s, log_zs, max_t, log_zt, log_z1):
    base = saved + pair * SAVED
    tl.store(base, max_s)
    tl.store(base + 1, log_zs)
    tl.store(base + 2, max_t)
    tl.store(base + 3, log_zt)
    tl.store(base + 6, log_z1)


@triton.jit
def _store_terms(saved, pair, value, c, w):
    base = saved + pair * SAVED
    tl.store(base + 4, value)
    tl.store(base + 5, c)
    tl.store(base + 7, w)


@triton.jit
def _store_stats(stats, pair, lse_s, lse_t, entropy_s, entropy_t, common, agree):
    base = stats + pair * STATS
    tl.store(base, lse_s)
    tl.store(base + 1, lse_t)
    tl.store(base + 2, entropy_s)
    tl.store(base + 3, entropy_t)
    tl.store(base + 4, common)
    tl.store(base + 5, agree)


@triton.jit
def _divergence_forward(
    student, teacher, student_rows, teacher_rows, counted, labels, row_params, loss, saved, stats,
    student_count, teacher_count, student_stride, teacher_stride, vocab, temperature, alpha, beta,
    label_weight, z_loss, search_depth, KIND: tl.constexpr, SCALE_T2: tl.constexpr,
    WITH_HARD: tl.constexpr, NEED_Z1: tl.constexpr, WITH_STATS: tl.constexpr,
    KEPT_ROW: tl.constexpr, KEY_SHIFT: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair: its loss, saved values and statistics."""
    pair = tl.program_id(0).to(tl.int64)
    nan = float("nan")
    if counted is not None:
        if tl.load(counted + pair) == 0:
            tl.store(loss + pair, 0.0)
            _store_normalisers(saved, pair, 0.0, 0.0, 0.0, 0.0, 0.0)
            _store_terms(saved, pair, 0.0, 0.0, 0.0)
            if WITH_STATS:
                _store_stats(stats, pair, nan, nan, nan, nan, nan, nan)
            return
    at_s, at_t = _row(student_rows, pair), _row(teacher_rows, pair)
    temperature, alpha, beta = _parameters(row_params, pair, temperature, alpha, beta)
    valid = parameters_valid(KIND, temperature, alpha, beta)
    valid = valid & (at_s >= 0) & (at_s < student_count) & (at_t >= 0) & (at_t < teacher_count)
    if labels is not None:
        label = tl.load(labels + pair)
        valid = valid & (label >= 0) & (label < vocab)
    if valid == 0:
        tl.store(loss + pair, nan)
        _store_normalisers(saved, pair, nan, nan, nan, nan, nan)
        _store_terms(saved, pair, nan, nan, nan)
        if WITH_STATS:
            _store_stats(stats, pair, nan, nan, nan, nan, nan, nan)
        return

    row_s, row_t = student + at_s * student_stride, teacher + at_t * teacher_stride
    k = tl.div_rn(1.0, temperature)
    boundary, at_boundary = 0.0, 0
    if (KIND == FORWARD_KL) or (KIND == REVERSE_KL):
        max_s, z_s, max_t, z_t, z_1, value, adjust = _kl_sweeps(
            row_s, row_t, vocab, k, KIND, NEED_Z1, LANES, BLOCK
        )
        c = value + adjust if KIND == REVERSE_KL else tl.full((), -1.0, tl.float32)
    elif KEPT_ROW > 0:
        max_t, z_t, boundary, at_boundary = head_of_kept_row(
            row_t, vocab, k, search_depth, KEPT_ROW, LANES
        )
        max_s, z_s, _, _, z_1, _, _, _, _ = _sweep(
            row_s, row_t, vocab, k, 0.0, False, False, KIND, NEED_Z1, LANES, BLOCK
        )
    else:
        max_s, z_s, max_t, z_t, z_1, _, _, _, _ = _sweep(
            row_s, row_t, vocab, k, 0.0, False, True, KIND, NEED_Z1, LANES, BLOCK
        )
    log_zs, log_zt = tl.log(z_s), tl.log(z_t)
    log_z1 = tl.log(z_1) if NEED_Z1 else log_zs
    # NaN or +inf anywhere makes a sum NaN, nothing but -inf makes it 0.
    sound = (z_s > 0.0) & (z_s < INF) & (z_t > 0.0) & (z_t < INF)
    max_s = tl.where(sound, max_s, nan)
    # Stored before the second sweep, which needs the registers.
    _store_normalisers(saved, pair, max_s, log_zs, max_t, log_zt, log_z1)
    hard = 0.0
    if WITH_HARD:
        lse = max_s + log_z1
        hard = z_loss * lse * lse
        if labels is not None:
            hard += label_weight * (lse - tl.load(row_s + label).to(tl.float32))

    w = 0.0
    if WITH_STATS or ((KIND != FORWARD_KL) and (KIND != REVERSE_KL)):
        if (KIND == ADAPTIVE_KL) and (KEPT_ROW == 0):
            boundary, at_boundary = head_of_long_row(
                row_t, vocab, k, max_t, z_t, search_depth, KEY_SHIFT, SEARCH_BLOCK
            )
        swept, swept_c, w, entropy_s, entropy_t, common, agree = _term_sweep(
            row_s, row_t, vocab, k, max_s, log_zs, max_t, log_zt, alpha, beta, boundary,
            at_boundary, KIND, WITH_STATS, LANES, BLOCK,
        )  # fmt: skip
        if (KIND != FORWARD_KL) and (KIND != REVERSE_KL):
            value, c = swept, tl.where(swept < INF, swept_c, nan)
    sound = max_s == max_s
    value = tl.where(sound, value, nan)
    _store_terms(saved, pair, value, c, w)
    row_loss = value * temperature * temperature if SCALE_T2 else value
    if WITH_HARD:
        row_loss = (1.0 - label_weight) * row_loss + hard
    tl.store(loss + pair, row_loss)
    if WITH_STATS:
        lse_s = k * max_s + log_zs
        lse_t = tl.where(sound, k * max_t + log_zt, nan)
        entropy_s, entropy_t = tl.where(sound, entropy_s, nan), tl.where(sound, entropy_t, nan)
        common, agree = tl.where(sound, common, nan), tl.where(sound, agree, nan)
        _store_stats(stats, pair, lse_s, lse_t, entropy_s, entropy_t, common, agree)


@triton.jit
def _pair_constants(
    pair, teacher, teacher_rows, labels, row_params, saved, upstream, teacher_stride, vocab,
    temperature, alpha, beta, label_weight, z_loss, SCALE_T2: tl.constexpr, WITH_HARD: tl.constexpr,
):  # fmt: skip
    """What backward needs of a pair besides logits; a flagged pair's teacher row is not read."""
    temperature, alpha, beta = _parameters(row_params, pair, temperature, alpha, beta)
    base = saved + pair * SAVED
    max_s, log_zs, max_t = tl.load(base), tl.load(base + 1), tl.load(base + 2)
    log_zt, c, w = tl.load(base + 3), tl.load(base + 5), tl.load(base + 7)
    teacher_vocab = tl.where(max_s == max_s, vocab, 0)
    row_t = teacher + _row(teacher_rows, pair) * teacher_stride
    k = tl.div_rn(1.0, temperature)
    soft = upstream * k * temperature * temperature if SCALE_T2 else upstream * k
    hard, picked, label, lse = 0.0, 0.0, -1, 0.0
    if WITH_HARD:
        soft = soft * (1.0 - label_weight)
        lse = max_s + tl.load(base + 6)
        hard = upstream * (2.0 * z_loss * lse)
        if labels is not None:
            label = tl.load(labels + pair)
            hard = upstream * (label_weight + 2.0 * z_loss * lse)
            picked = upstream * label_weight
    return (
        row_t, teacher_vocab, k, max_s, log_zs, max_t, log_zt, c, w, alpha, beta, soft, hard,
        picked, label, lse,
    )  # fmt: skip


@triton.jit
def _gradient(s, at, constants, KIND: tl.constexpr, WITH_HARD: tl.constexpr):
    """A block of one pair's gradient, times its upstream."""
    (
        row_t, teacher_vocab, k, max_s, log_zs, max_t, log_zt, c, w, alpha, beta, soft, hard,
        picked, label, lse,
    ) = constants  # fmt: skip
    t = load_fp32(row_t + at, at < teacher_vocab)
    log_q, log_p = k * (s - max_s) - log_zs, k * (t - max_t) - log_zt
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == FORWARD_KL:
        gradient = q - p
    else:
        d = log_ratio(s, t, k, k * (max_t - max_s) + log_zt - log_zs)
        if KIND == REVERSE_KL:
            gradient = -q * (d + c)
        elif KIND == ADAPTIVE_KL:
            gradient = w * (q - p) - (1.0 - w) * q * (d + c)
        else:
            _, q_h = terms(KIND, log_p, log_q, d, alpha, beta)
            gradient = q_h - q * c
    gradient = soft * gradient
    if WITH_HARD:
        gradient += hard * tl.exp(s - lse) - tl.where(at == label, picked, 0.0)
    return gradient


@triton.jit
def _divergence_backward(
    student, teacher, student_rows, teacher_rows, row_start, pairs, labels, row_params, saved,
    upstreams, grad, student_count, student_stride, teacher_stride, grad_stride, columns, vocab,
    temperature, alpha, beta, label_weight, z_loss, KIND: tl.constexpr, SCALE_T2: tl.constexpr,
    WITH_HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One student row: the sum of its pairs' gradients. `grad` may be `student`: a block is read
    before it is written.

    With `row_start` and `pairs` a program owns a student row, else the one pair of its number.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program
    if row_start is None:
        row = _row(student_rows, program)
        if (row < 0) | (row >= student_count):
            return
    row_s, row_g = student + row * student_stride, grad + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    zero_from = vocab
    if row_start is not None:
        begin, end = tl.load(row_start + program), tl.load(row_start + program + 1)
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            inside = at < vocab
            gradient = tl.zeros((BLOCK,), tl.float32)
            if begin < end:
                s = load_fp32(row_s + at, inside)
                for position in range(begin, end):
                    pair = tl.load(pairs + position)
                    upstream = tl.load(upstreams + pair)
                    if upstream != 0.0:
                        constants = _pair_constants(
                            pair, teacher, teacher_rows, labels, row_params, saved, upstream,
                            teacher_stride, vocab, temperature, alpha, beta, label_weight, z_loss,
                            SCALE_T2, WITH_HARD,
                        )  # fmt: skip
                        gradient += _gradient(s, at, constants, KIND, WITH_HARD)
            tl.store(row_g + at, gradient.to(grad.dtype.element_ty), mask=inside)
    else:
        upstream = tl.load(upstreams + program)
        if upstream == 0.0:
            zero_from = 0
        else:
            constants = _pair_constants(
                program, teacher, teacher_rows, labels, row_params, saved, upstream, teacher_stride,
                vocab, temperature, alpha, beta, label_weight, z_loss, SCALE_T2, WITH_HARD,
            )  # fmt: skip
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                inside = at < vocab
                s = load_fp32(row_s + at, inside)
                gradient = _gradient(s, at, constants, KIND, WITH_HARD)
                tl.store(row_g + at, gradient.to(grad.dtype.element_ty), mask=inside)
    for start in range(zero_from, columns, BLOCK):
        at = start + lanes
        tl.store(row_g + at, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=at < columns)


def divergence_fwd(
    student: Tensor, teacher: Tensor, student_rows: Tensor | None, teacher_rows: Tensor | None,
    counted: Tensor | None, labels: Tensor | None, params: Tensor | None, kind: int,
    temperature: float, alpha: float, beta: float, scale_t2: bool, label_weight: float,
    z_loss: float, vocab: int, loss: Tensor, saved: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    """Writes `loss`, `saved` and, unless empty, `stats`."""
    if loss.shape[0] == 0:
        return
    with_hard = label_weight != 0.0 or z_loss != 0.0
    with_stats = stats.numel() > 0
    kept = triton.next_power_of_2(vocab) if kind == ADAPTIVE_KL.value else 0
    kept = kept if kept <= KEPT else 0
    block, elements = _shape(vocab, student, teacher, KEPT_THREADS if kept else THREADS)
    with on_device(student):
        _divergence_forward[(loss.shape[0],)](
            student, teacher, student_rows, teacher_rows,
            None if counted is None else counted.view(torch.uint8), labels, params, loss, saved,
            stats, student.shape[0], teacher.shape[0], student.stride(0), teacher.stride(0), vocab,
            temperature, alpha, beta, label_weight, z_loss, math.log(2 * vocab) + 1.0,
            KIND=kind, SCALE_T2=scale_t2, WITH_HARD=with_hard,
            NEED_Z1=with_hard and (params is not None or temperature != 1.0),
            WITH_STATS=with_stats, KEPT_ROW=kept, KEY_SHIFT=_UNUSED_BITS[teacher.dtype],
            SEARCH_BLOCK=min(block, 1024), LANES=block // elements, BLOCK=block,
            **compiler_options(
                block, elements, None if kept else _forward_registers(kind, with_hard or with_stats)
            ),
        )  # fmt: skip


def divergence_bwd(
    student: Tensor, teacher: Tensor, student_rows: Tensor | None, teacher_rows: Tensor | None,
    row_start: Tensor | None, pairs: Tensor | None, labels: Tensor | None, params: Tensor | None,
    saved: Tensor, grad_rows: Tensor, kind: int, temperature: float, alpha: float, beta: float,
    scale_t2: bool, label_weight: float, z_loss: float, vocab: int, grad: Tensor,
) -> None:  # fmt: skip
    """Writes `grad [S, V_s]`, the gradient of sum(grad_rows * loss); `row_start` and `pairs` go
    with `student_rows`.
    """
    programs = grad_rows.shape[0] if row_start is None else student.shape[0]
    if programs == 0:
        return
    block, elements = _shape(vocab, student, teacher, THREADS)
    with_hard = label_weight != 0.0 or z_loss != 0.0
    registers = 128 if with_hard or row_start is not None else None
    with on_device(student):
        _divergence_backward[(programs,)](
            student, teacher, student_rows, teacher_rows, row_start, pairs, labels, params, saved,
            grad_rows, grad, student.shape[0], student.stride(0), teacher.stride(0), grad.stride(0),
            student.shape[1], vocab, temperature, alpha, beta, label_weight, z_loss, KIND=kind,
            SCALE_T2=scale_t2, WITH_HARD=with_hard, BLOCK=block,
            **compiler_options(block, elements, registers),
        )  # fmt: skip


def divergence_overwrite(
    student: Tensor, teacher: Tensor, student_rows: Tensor | None, teacher_rows: Tensor | None,
    counted: Tensor | None, labels: Tensor | None, params: Tensor | None, scale_rows: Tensor,
    kind: int, temperature: float, alpha: float, beta: float, scale_t2: bool, label_weight: float,
    z_loss: float, vocab: int, loss: Tensor,
) -> None:  # fmt: skip
    """Writes `loss`, then over the rows of `student` the gradient of sum(scale_rows * loss); each
    row at most once.
    """
    options = (kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab)
    saved = torch.empty((loss.shape[0], SAVED.value), dtype=torch.float32, device=loss.device)
    inputs = (student, teacher, student_rows, teacher_rows)
    divergence_fwd(*inputs, counted, labels, params, *options, loss, saved, saved.new_empty(0))
    divergence_bwd(*inputs, None, None, labels, params, saved, scale_rows, *options, student)


# Low mantissa bits that are zero in every number of a dtype, as fp32.
_UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def _shape(vocab: int, student: Tensor, teacher: Tensor, threads: int) -> tuple[int, int]:
    """A program's block, and how much of it a thread holds: 16 bytes of the smaller dtype."""
    elements = 16 // min(student.element_size(), teacher.element_size())
    return elements * min(threads, max(64, triton.next_power_of_2(vocab) // elements)), elements


def _forward_registers(kind: int, more: bool) -> int | None:
    """Forward's register limit; `more` work a token than the two normalisers and D."""
    if kind in (ALPHA_BETA.value, ADAPTIVE_KL.value):
        return 168
    return 128 if more and kind not in (FORWARD_KL.value, REVERSE_KL.value) else None
