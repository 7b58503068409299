"""Triton kernels of `token_logprob`: log-probability of a token and entropy of each row, and the
gradient of both.

The maths is docs/ops/token_logprob.md: with m the row's maximum, d = k (z - m) and e = exp(d),

    log Z = log1p(sum of e but one maximum's)    logprob = d_id - log Z
    depth = -sum e d / Z                         entropy = log Z + depth
    gradient = k up (1[j = id] - q) - k up_entropy q (d + depth)

Shapes: logits [R, V], ids [R], logprob and entropy [R], saved [R, 5], gradient [R, V]. fp32, bf16
or fp16 logits; sums are fp32, the few numbers of a row that are made of them fp64.

A program owns a row and runs over it in blocks, forward with one read, backward with one read and
one write. The sums stay spread over the threads, one partial sum a lane, until the row ends. In
each lane, elements equal to the maximum so far are counted and the others summed: added to the 1 of
the maximum, a sum of 1e-8 would be gone. Backward never reads what another thread may have written,
so that it works in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.launch import compiler_options, on_device
from pydistill.kernels._common.numerics import FAR, INF, expm1, load_fp32, log1p, partial_sums

SAVED = tl.constexpr(5)  # m, log Z, depth, logprob, status
ID_OUT_OF_RANGE = tl.constexpr(1)

THREADS = 256  # of a program on a long row; each takes 16 bytes at a load
_GONE = tl.constexpr(200.0)  # exp of minus this is 0


@triton.jit
def _inverse_temperature(row_params, row, temperature):
    """1 / T of a row; NaN if T is out of range."""
    if row_params is not None:
        temperature = tl.load(row_params + row)
    else:
        temperature = tl.full((), temperature, tl.float32)
    valid = (temperature > 0.0) & (temperature < INF)
    return tl.where(valid, tl.div_rn(1.0, temperature), float("nan"))


@triton.jit
def _token_logprob_forward(
    logits, ids, counted, row_params, logprob, entropy, saved, stride, vocab, temperature,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: both outputs and what backward needs."""
    row = tl.program_id(0).to(tl.int64)
    base = saved + row * SAVED
    if counted is not None:
        if tl.load(counted + row) == 0:
            tl.store(logprob + row, 0.0)
            tl.store(entropy + row, 0.0)
            for column in tl.static_range(SAVED):
                tl.store(base + column, 0.0)
            return
    k = _inverse_temperature(row_params, row, temperature)
    row_z = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), -INF, tl.float32)
    rest = tl.zeros((LANES,), tl.float32)
    ties, depth = rest, rest
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = load_fp32(row_z + at, at < vocab)
        new_top = tl.maximum(top, tl.max(z, 0))
        raised = new_top > top
        gap = tl.where(raised, tl.minimum(k * (new_top - top), _GONE), 0.0)
        scale = tl.exp(-gap)
        depth = scale * (depth + (rest + ties) * gap)
        rest = tl.where(raised, scale * (rest + ties), rest)
        ties = tl.where(raised, 0.0, ties)
        top = new_top
        d = tl.maximum(k * (z - top), -FAR)  # which is -FAR while all are -inf
        tie = z == top  # then all of them, until scale is 0
        e = tl.exp(d)
        e = tl.where(z != z, z, e)  # a maximum may have lost a NaN
        depth -= partial_sums(e * d, LANES)
        rest += partial_sums(tl.where(tie, 0.0, e), LANES)
        ties += partial_sums(tie.to(tl.float32), LANES)
    others = tl.sum(rest, 0).to(tl.float64) + (tl.sum(ties, 0) - 1.0)
    below = tl.sum(depth, 0).to(tl.float64) / (1.0 + others)
    sound = (tl.abs(top) < INF) & (k == k)
    log_z = tl.where(sound, log1p(others), float("nan"))
    token = tl.load(ids + row)
    inside = (token >= 0) & (token < vocab)
    z = load_fp32(row_z + token, inside)
    value = tl.where(inside, k * (z - top).to(tl.float64) - log_z, float("nan"))
    tl.store(logprob + row, value.to(tl.float32))
    tl.store(entropy + row, tl.where(inside, log_z + below, float("nan")).to(tl.float32))
    tl.store(base, top)
    tl.store(base + 1, log_z.to(tl.float32))
    tl.store(base + 2, below.to(tl.float32))
    tl.store(base + 3, value.to(tl.float32))
    tl.store(base + 4, tl.where(inside, 0, ID_OUT_OF_RANGE).to(tl.float32))


@triton.jit
def _token_logprob_backward(
    logits, ids, row_params, saved, upstream, upstream_entropy, grad, stride, grad_stride, columns,
    temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, or of a tile of its columns."""
    row = tl.program_id(0).to(tl.int64)
    row_z, row_g = logits + row * stride, grad + row * grad_stride
    lanes = tl.arange(0, BLOCK)
    up, up_entropy = tl.load(upstream + row), tl.load(upstream_entropy + row)
    base = saved + row * SAVED
    k = _inverse_temperature(row_params, row, temperature)
    top, log_z, depth = tl.load(base), tl.load(base + 1), tl.load(base + 2)
    at_token = -expm1(tl.load(base + 3))
    flagged = tl.load(base + 4) != 0.0
    unused = (up == 0.0) & (up_entropy == 0.0)
    if flagged | unused:
        fill = tl.where(unused, 0.0, float("nan"))
        for start in range(0, columns, BLOCK):
            at = start + lanes
            value = tl.zeros((BLOCK,), tl.float32) + fill
            tl.store(row_g + at, value.to(grad.dtype.element_ty), mask=at < columns)
    else:
        token = tl.load(ids + row)
        up, up_entropy = k * up, k * up_entropy
        for start in range(0, columns, BLOCK):
            at = start + lanes
            inside = at < columns
            d = tl.maximum(k * (load_fp32(row_z + at, inside) - top), -FAR)
            q = tl.exp(d - log_z)
            value = up * tl.where(at == token, at_token, -q) - up_entropy * (q * (d + depth))
            tl.store(row_g + at, value.to(grad.dtype.element_ty), mask=inside)


def token_logprob_fwd(
    logits: Tensor, ids: Tensor, counted: Tensor | None, params: Tensor | None, temperature: float,
    logprob: Tensor, entropy: Tensor, saved: Tensor,
) -> None:  # fmt: skip
    """Writes `logprob`, `entropy` and `saved`."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    block, elements = _shape(logits)
    with on_device(logits):
        _token_logprob_forward[(rows,)](
            logits, ids, None if counted is None else counted.view(torch.uint8), params, logprob,
            entropy, saved, logits.stride(0), vocab, temperature, LANES=block // elements,
            BLOCK=block, **compiler_options(block, elements),
        )  # fmt: skip


def token_logprob_bwd(
    logits: Tensor, ids: Tensor, params: Tensor | None, saved: Tensor, grad_logprob: Tensor,
    grad_entropy: Tensor, temperature: float, grad: Tensor,
) -> None:  # fmt: skip
    """Writes `grad [R, W]`, the gradient of sum(grad_logprob * logprob + grad_entropy * entropy)
    with respect to these columns; it may be the logits' memory.
    """
    rows, columns = logits.shape
    if rows == 0:
        return
    block, elements = _shape(logits)
    with on_device(logits):
        _token_logprob_backward[(rows,)](
            logits, ids, params, saved, grad_logprob, grad_entropy, grad, logits.stride(0),
            grad.stride(0), columns, temperature, BLOCK=block, **compiler_options(block, elements),
        )  # fmt: skip


def _shape(logits: Tensor) -> tuple[int, int]:
    """A program's block, and how much of it a thread holds: 16 bytes."""
    elements = 16 // logits.element_size()
    threads = max(64, triton.next_power_of_2(logits.shape[1]) // elements)
    return elements * min(THREADS, threads), elements
