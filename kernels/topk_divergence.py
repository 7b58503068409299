"""Triton kernels of `topk_divergence`: row losses and saved values, gradients, both in place.

The maths is docs/ops/topk_divergence.md. A row of student logits is compared with a teacher known
on the K tokens of `ids`, in cells: one a token of this support and, where the tail counts, one for
all others.

Shapes: student [R, V], ids int64 [R, K], log_p fp32 [R, K], log_tail fp32 [R], loss [R],
saved [R, 7], gradient [R, V]. fp32, bf16 or fp16 logits.

Forward is two kernels, a program a row each. The first reads the row once, in blocks, and sums the
exponentials outside the support about their own maximum; the second gathers the support's K logits
and sums over cells. So neither side of the support drowns the other. To leave the support out, the
launcher sorts the ids: a block then meets its own in turn, and strikes each out by one comparison,
K of them a row however the ids lie. Cells are K + 1 numbers a row, in fp64: the slopes on a peaked
row are small differences, and forward and backward must agree on them far below fp32's last digit.

Backward reads a row once and writes it once: a first kernel reads the support's logits and makes
its gradients, a second sweeps the row, a third puts the support's gradients in their places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.divergences import FORWARD_KL, JSD, REVERSE_KL, TVD
from pydistill.kernels._common.launch import compiler_options, on_device
from pydistill.kernels._common.numerics import INF, load_fp32, partial_sums

# max s, max s outside S, log of q's scale on S, c, its rest, the slope outside S, status
SAVED = tl.constexpr(7)
# The numbers of `pydistill.reference.topk_divergence`.
WITH_TAIL, SUPPORT_ONLY, TRUNCATED = map(tl.constexpr, range(3))
ID_OUT_OF_RANGE, ID_TWICE = tl.constexpr(1), tl.constexpr(2)

THREADS = 256  # of a program on a long row; each takes 16 bytes at a load
SLOTS = 256  # of the support, taken at a time
EMPTY = tl.constexpr(2**31 - 1)  # sorts behind every token


@triton.jit
def _parameters(row_params, row, temperature, beta):
    """T and beta of a row: its own where the call has per-row values."""
    if row_params is not None:
        temperature, beta = tl.load(row_params + row * 2), tl.load(row_params + row * 2 + 1)
    else:
        temperature = tl.full((), temperature, tl.float32)
        beta = tl.full((), beta, tl.float32)
    return temperature, beta


@triton.jit
def _cell(log_p, log_q, beta, KIND: tl.constexpr, TRUNCATE: tl.constexpr):
    """A cell's term of D, q and q h; fp64 in and out. The term is inf where D is, and NaN where
    log p or log q is."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    d = log_p - log_q
    if KIND == FORWARD_KL:
        q_h, term = q - p, tl.where(p == 0.0, 0.0, p * d)
        if TRUNCATE:
            q_h = -p
        else:
            term += q_h
    elif KIND == REVERSE_KL:
        q_h = tl.where(q == 0.0, 0.0, -q * d)
        term = q_h
        if TRUNCATE:
            q_h = q + q_h
        else:
            term -= q - p
    elif KIND == JSD:
        log_m = tl.log(beta * p + (1.0 - beta) * q)
        q_h = tl.where(q == 0.0, 0.0, (1.0 - beta) * q * (log_q - log_m))
        term = tl.where(p == 0.0, 0.0, beta * p * (log_p - log_m)) + q_h
    else:
        tl.static_assert(KIND == TVD)
        q_h = q * tl.where(d > 0.0, -0.5, tl.where(d < 0.0, 0.5, 0.0))
        term = 0.5 * tl.abs(p - q)
    return term, q, q_h


@triton.jit
def _support(ids, slots, vocab, begin, SLOTS: tl.constexpr):
    """Ids of a few slots, and which of them name a token."""
    slot = begin + tl.arange(0, SLOTS)
    token = tl.load(ids + slot, mask=slot < slots, other=-1)
    return token, (token >= 0) & (token < vocab)


@triton.jit
def _on_support(row_s, log_p, token, present, begin, k, max_s, log_q_scale, SLOTS: tl.constexpr):
    """log p and log q of a few slots."""
    slot = begin + tl.arange(0, SLOTS)
    log_p = load_fp32(log_p + slot, present).to(tl.float64)
    s = load_fp32(row_s + token, present).to(tl.float64)
    return log_p, k * (s - max_s) - log_q_scale


@triton.jit
def _outside_sums(
    student, ordered, counted, row_params, saved, student_stride, vocab, slots, temperature,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over a row: maximum and sum of exponentials outside the support, and the status.

    `ordered` are the row's ids in order, then `vocab` for each that is too large, then EMPTY.
    """
    row = tl.program_id(0).to(tl.int64)
    if counted is not None:
        if tl.load(counted + row) == 0:
            return
    temperature, _ = _parameters(row_params, row, temperature, 0.0)
    k = tl.div_rn(1.0, temperature)
    row_s, ordered = student + row * student_stride, ordered + row * slots
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), -INF, tl.float32)
    z = tl.zeros((LANES,), tl.float32)
    position = tl.full((), 0, tl.int32)
    token = tl.load(ordered + position, mask=position < slots, other=EMPTY)
    twice = position != position
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        s = load_fp32(row_s + at, at < vocab)
        end = tl.minimum(start + BLOCK, vocab)
        while token < end:
            s = tl.where(at == token, -INF, s)
            position += 1
            following = tl.load(ordered + position, mask=position < slots, other=EMPTY)
            twice = twice | (following == token)
            token = following
        new_top = tl.maximum(top, tl.max(s, 0))
        shift = tl.where(new_top == -INF, 0.0, new_top)
        z = z * tl.exp(k * (top - shift)) + partial_sums(tl.exp(k * (s - shift)), LANES)
        top = new_top
    status = tl.where(token == vocab, ID_OUT_OF_RANGE, tl.where(twice, ID_TWICE, 0))
    base = saved + row * SAVED
    tl.store(base + 1, top)
    tl.store(base + 5, tl.sum(z, 0))
    tl.store(base + 6, status.to(tl.float32))


@triton.jit
def _support_sums(row_s, ids, slots, vocab, k, SLOTS: tl.constexpr):
    """Maximum and sum of exponentials on the support, and how many tokens it has."""
    tokens = tl.full((), 0, tl.int32)
    top, z = tl.full((), -INF, tl.float32), tl.full((), 0.0, tl.float64)
    for begin in range(0, slots, SLOTS):
        token, present = _support(ids, slots, vocab, begin, SLOTS)
        s = load_fp32(row_s + token, present)
        new_top = tl.maximum(top, tl.max(s, 0))
        shift = tl.where(new_top == -INF, 0.0, new_top)
        e = tl.where(present, tl.exp(k * (s - shift)), 0.0)
        z = z * tl.exp(k * (top - shift)) + tl.sum(e.to(tl.float64), 0)
        top = new_top
        tokens += tl.sum(present.to(tl.int32), 0)
    return top, z, tokens


@triton.jit
def _store_saved(saved, row, max_s, outside_max, log_q_scale, centre, centre_low, slope, status):
    base = saved + row * SAVED
    tl.store(base, max_s)
    tl.store(base + 1, outside_max)
    tl.store(base + 2, log_q_scale)
    tl.store(base + 3, centre)
    tl.store(base + 4, centre_low)
    tl.store(base + 5, slope)
    tl.store(base + 6, status)


@triton.jit
def _topk_divergence_forward(
    student, ids, log_p, log_tail, counted, row_params, loss, saved, student_stride, vocab, slots,
    temperature, beta, KIND: tl.constexpr, MODE: tl.constexpr, SCALE_T2: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """One row's loss and saved values, from its support and what `_outside_sums` left there."""
    row = tl.program_id(0).to(tl.int64)
    nan = float("nan")
    if counted is not None:
        if tl.load(counted + row) == 0:
            tl.store(loss + row, 0.0)
            _store_saved(saved, row, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            return
    temperature, beta = _parameters(row_params, row, temperature, beta)
    valid = (temperature > 0.0) & (temperature < INF)
    if KIND == JSD:
        valid = valid & (beta > 0.0) & (beta < 1.0)
    row_s, ids, log_p = student + row * student_stride, ids + row * slots, log_p + row * slots
    k = tl.div_rn(1.0, temperature)
    beta = beta.to(tl.float64)

    base = saved + row * SAVED
    tail_top, tail_z, status = tl.load(base + 1), tl.load(base + 5), tl.load(base + 6)
    top, z, tokens = _support_sums(row_s, ids, slots, vocab, k, SLOTS)
    max_s = tl.maximum(top, tail_top)
    log_support = tl.log(z) + (k * (top - max_s)).to(tl.float64)
    log_outside = tl.log(tail_z.to(tl.float64)) + (k * (tail_top - max_s)).to(tl.float64)
    both = tl.exp(log_support) + tl.exp(log_outside)
    # NaN or +inf anywhere makes a sum NaN, nothing but -inf makes it NaN or 0.
    valid = valid & (status == 0) & (both > 0.0) & (both < INF)
    log_z = tl.log(both)
    scale = log_z.to(tl.float32)
    if MODE == SUPPORT_ONLY:
        valid = valid & (log_support > -INF)
        scale = log_support.to(tl.float32)

    # The tail's cell; with S the whole vocabulary there is none.
    log_q_t, log_p_t = tl.full((), -INF, tl.float64), tl.full((), -INF, tl.float64)
    if MODE == WITH_TAIL:
        log_q_t = tl.where(tokens < vocab, log_outside - log_z, -INF)
        if log_tail is not None:
            log_p_t = tl.where(tokens < vocab, tl.load(log_tail + row).to(tl.float64), -INF)
    TRUNCATE: tl.constexpr = MODE == TRUNCATED
    value, q_t, q_h_t = _cell(log_p_t, log_q_t, beta, KIND, TRUNCATE)
    centre = q_h_t
    wide_k, log_q_scale = k.to(tl.float64), scale.to(tl.float64)  # as backward will read it
    for begin in range(0, slots, SLOTS):
        token, present = _support(ids, slots, vocab, begin, SLOTS)
        log_p_here, log_q = _on_support(
            row_s, log_p, token, present, begin, wide_k, max_s, log_q_scale, SLOTS
        )
        term, _q, q_h = _cell(log_p_here, log_q, beta, KIND, TRUNCATE)
        value += tl.sum(term, 0)
        centre += tl.sum(q_h, 0)
    value = tl.where(valid, value, nan)
    centre = tl.where(value < INF, centre, nan)
    # Outside S the gradient is (q_h_t - q_t c) times a token's share of the tail: q_t may be too
    # small for fp32, or h_t too large.
    slope = tl.where(centre == centre, 0.0, nan)
    if MODE == WITH_TAIL:
        slope = tl.where(log_q_t > -INF, (q_h_t - q_t * centre) / tail_z.to(tl.float64), slope)
    elif MODE == TRUNCATED:
        q_t = tl.exp(log_outside - log_z)
        slope = tl.where(log_outside > -INF, -q_t * centre / tail_z.to(tl.float64), slope)

    high = centre.to(tl.float32)
    _store_saved(
        saved, row, tl.where(valid, max_s, nan), tl.where(valid, tail_top, nan),
        tl.where(valid, scale, nan), high, (centre - high).to(tl.float32), slope.to(tl.float32),
        status,
    )  # fmt: skip
    row_loss = value.to(tl.float32)
    tl.store(loss + row, row_loss * temperature * temperature if SCALE_T2 else row_loss)


@triton.jit
def _slope(row_params, upstreams, row, temperature, beta, SCALE_T2: tl.constexpr):
    """k, beta, and what multiplies q (h - c), of a row."""
    temperature, beta = _parameters(row_params, row, temperature, beta)
    k = tl.div_rn(1.0, temperature)
    soft = tl.load(upstreams + row) * k
    return k, beta, soft * temperature * temperature if SCALE_T2 else soft


@triton.jit
def _support_gradient(
    student, ids, log_p, row_params, saved, upstreams, values, student_stride, columns, slots,
    temperature, beta, KIND: tl.constexpr, TRUNCATE: tl.constexpr, SCALE_T2: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """One row's gradient on the support, slot by slot; nothing where the row has none."""
    row = tl.program_id(0).to(tl.int64)
    base = saved + row * SAVED
    high = tl.load(base + 3)
    if (high == high) & (tl.load(upstreams + row) != 0.0):
        k, own_beta, soft = _slope(row_params, upstreams, row, temperature, beta, SCALE_T2)
        k, own_beta = k.to(tl.float64), own_beta.to(tl.float64)
        max_s, log_q_scale = tl.load(base).to(tl.float64), tl.load(base + 2).to(tl.float64)
        centre = high.to(tl.float64) + tl.load(base + 4).to(tl.float64)
        row_s, ids, log_p = student + row * student_stride, ids + row * slots, log_p + row * slots
        for begin in range(0, slots, SLOTS):
            token, present = _support(ids, slots, columns, begin, SLOTS)
            log_p_here, log_q = _on_support(
                row_s, log_p, token, present, begin, k, max_s, log_q_scale, SLOTS
            )
            _term, q, q_h = _cell(log_p_here, log_q, own_beta, KIND, TRUNCATE)
            gradient = soft * (q_h - q * centre).to(tl.float32)
            slot = begin + tl.arange(0, SLOTS)
            tl.store(values + row * slots + slot, gradient, mask=present)


@triton.jit
def _outside_gradient(
    student, row_params, saved, upstreams, grad, student_stride, grad_stride, columns, temperature,
    beta, SCALE_T2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's gradient as it is outside the support. `grad` may be `student`: a block is read
    before it is written."""
    row = tl.program_id(0).to(tl.int64)
    row_s, row_g = student + row * student_stride, grad + row * grad_stride
    base = saved + row * SAVED
    centre, slope = tl.load(base + 3), tl.load(base + 5)
    lanes = tl.arange(0, BLOCK)
    upstream = tl.load(upstreams + row)
    constant = tl.where((centre == centre) | (upstream == 0.0), 0.0, float("nan"))
    if (upstream == 0.0) | (slope == 0.0) | (constant != constant):
        for start in range(0, columns, BLOCK):
            at = start + lanes
            value = tl.full((BLOCK,), 0.0, tl.float32) + constant
            tl.store(row_g + at, value.to(grad.dtype.element_ty), mask=at < columns)
    else:
        k, _own_beta, soft = _slope(row_params, upstreams, row, temperature, beta, SCALE_T2)
        outside_max, factor = tl.load(base + 1), soft * slope
        for start in range(0, columns, BLOCK):
            at = start + lanes
            s = load_fp32(row_s + at, at < columns)
            gradient = factor * tl.exp(k * (s - outside_max))
            tl.store(row_g + at, gradient.to(grad.dtype.element_ty), mask=at < columns)


@triton.jit
def _place(
    ids, saved, upstreams, values, grad, grad_stride, columns, slots, SLOTS: tl.constexpr,
):  # fmt: skip
    """Writes one row's gradients on the support where they belong."""
    row = tl.program_id(0).to(tl.int64)
    centre = tl.load(saved + row * SAVED + 3)
    if (centre == centre) & (tl.load(upstreams + row) != 0.0):
        for begin in range(0, slots, SLOTS):
            token, present = _support(ids + row * slots, slots, columns, begin, SLOTS)
            slot = begin + tl.arange(0, SLOTS)
            gradient = tl.load(values + row * slots + slot, mask=present)
            target = grad + row * grad_stride + token
            tl.store(target, gradient.to(grad.dtype.element_ty), mask=present)


def topk_divergence_fwd(
    student: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor | None, counted: Tensor | None,
    params: Tensor | None, kind: int, tail_mode: int, temperature: float, beta: float,
    scale_t2: bool, loss: Tensor, saved: Tensor,
) -> None:  # fmt: skip
    """Writes `loss` and `saved`."""
    rows, vocab = student.shape
    if rows == 0:
        return
    block, elements = _shape(vocab, student)
    slots, options = _slots(ids)
    if counted is not None:
        counted = counted.view(torch.uint8)
    with on_device(student):
        ordered = torch.where(ids < 0, EMPTY.value, ids.clamp(max=vocab)).int().sort(-1).values
        _outside_sums[(rows,)](
            student, ordered, counted, params, saved, student.stride(0), vocab, ids.shape[1],
            temperature, LANES=block // elements, BLOCK=block, **compiler_options(block, elements),
        )  # fmt: skip
        _topk_divergence_forward[(rows,)](
            student, ids, log_p, log_tail, counted, params, loss, saved, student.stride(0), vocab,
            ids.shape[1], temperature, beta, KIND=kind, MODE=tail_mode, SCALE_T2=scale_t2,
            SLOTS=slots, **options,
        )  # fmt: skip


def topk_divergence_bwd(
    student: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor | None, params: Tensor | None,
    saved: Tensor, grad_rows: Tensor, kind: int, tail_mode: int, temperature: float, beta: float,
    scale_t2: bool, grad: Tensor,
) -> None:  # fmt: skip
    """Writes `grad [R, V]`, the gradient of sum(grad_rows * loss).

    `student`, `ids` and `grad` may be of some columns of the rows that forward read: ids count from
    the first of them, and are negative for tokens elsewhere.
    """
    rows, columns = student.shape
    if rows == 0:
        return
    block, elements = _shape(columns, student)
    slots, options = _slots(ids)
    values = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    with on_device(student):
        _support_gradient[(rows,)](
            student, ids, log_p, params, saved, grad_rows, values, student.stride(0), columns,
            ids.shape[1], temperature, beta, KIND=kind, TRUNCATE=tail_mode == TRUNCATED.value,
            SCALE_T2=scale_t2, SLOTS=slots, **options,
        )  # fmt: skip
        _outside_gradient[(rows,)](
            student, params, saved, grad_rows, grad, student.stride(0), grad.stride(0), columns,
            temperature, beta, SCALE_T2=scale_t2, BLOCK=block, **compiler_options(block, elements),
        )  # fmt: skip
        _place[(rows,)](
            ids, saved, grad_rows, values, grad, grad.stride(0), columns, ids.shape[1],
            SLOTS=slots, **options,
        )  # fmt: skip


def topk_divergence_overwrite(
    student: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor | None, counted: Tensor | None,
    params: Tensor | None, scale_rows: Tensor, kind: int, tail_mode: int, temperature: float,
    beta: float, scale_t2: bool, loss: Tensor, saved: Tensor,
) -> None:  # fmt: skip
    """Writes `loss`, `saved`, and over `student` the gradient of sum(scale_rows * loss)."""
    topk_divergence_fwd(
        student, ids, log_p, log_tail, counted, params, kind, tail_mode, temperature, beta,
        scale_t2, loss, saved,
    )  # fmt: skip
    topk_divergence_bwd(
        student, ids, log_p, log_tail, params, saved, scale_rows, kind, tail_mode, temperature,
        beta, scale_t2, student,
    )  # fmt: skip


def _shape(columns: int, student: Tensor) -> tuple[int, int]:
    """A program's block, and how much of it a thread holds: 16 bytes."""
    elements = 16 // student.element_size()
    return elements * min(THREADS, max(64, triton.next_power_of_2(columns) // elements)), elements


def _slots(ids: Tensor) -> tuple[int, dict[str, int]]:
    """Slots of the support that a program takes at a time, one a thread, and its launch options."""
    slots = max(32, min(SLOTS, triton.next_power_of_2(ids.shape[1])))
    return slots, compiler_options(slots, 1)
