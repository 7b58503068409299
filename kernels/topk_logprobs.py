"""Triton kernels of `topk_logprobs`: the K most likely tokens of each row, their log-probabilities,
the log of the others' mass, and the normaliser.

The maths is docs/ops/topk_logprobs.md. Shapes: logits [R, V], ids int64 [R, K], logprobs [R, K],
tail and lse [R]. fp32, bf16 or fp16 logits; sums are fp32 within a block and fp64 beyond it.

A long row is read once, by programs that reduce groups of GROUP neighbouring tokens to their
maximum and their sum of exponentials about it. The K best tokens of the row lie in the K groups of
the best maxima, so a second kernel chooses those groups, and the same kernel then chooses K tokens
among their GROUP K; what it leaves, groups and tokens, is the tail: nothing is ever subtracted. A
row that a program can keep in registers, and one of which K takes too large a part, is its own list
of candidates. torch sorts the K tokens, and a last kernel writes what is asked for.

The choice is a boundary, the K-th largest logit, found by bisection over ordered integers: of
candidates in registers, or in memory where they are too many. Of those at the boundary the first
few are in. A chosen token goes on as one integer, larger for a larger logit and, of equal ones, for
a smaller index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels._common.launch import compiler_options, on_device
from pydistill.kernels._common.numerics import (
    INF,
    from_ordered_key,
    load_fp32,
    log1p,
    ordered_key,
)

THREADS = 256  # of a program that reads groups; each takes 16 bytes at a load, twice
KEPT = 16384  # candidates that a program keeps in registers
_PER_THREAD = 16  # of them at least
SLOTS = 256  # of the K, taken at a time

_SHIFT = tl.constexpr(30)  # of a packed logit: 2^30 tokens a row
_BELOW = tl.constexpr(2**30 - 1)
_LOWEST = tl.constexpr(-2139095041)  # the ordered key of -inf
_HIGHEST = tl.constexpr(2139095040)


@triton.jit
def _load(pointers, mask):
    """Logits as fp32, with +inf for NaN: a row that has either has no softmax."""
    x = load_fp32(pointers, mask)
    return tl.where(x != x, INF, x)


@triton.jit
def _unpack(packed):
    """Logit and token of one integer."""
    key = (packed + _BELOW) >> _SHIFT
    return from_ordered_key(key.to(tl.int32)), (key << _SHIFT) - packed


@triton.jit
def _inverse(temperature):
    return tl.div_rn(1.0, tl.full((), temperature, tl.float32))


@triton.jit
def _reduce_groups(
    logits, tops, masses, stride, vocab, groups, temperature, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials about it, NaN if that is -inf, of the groups in a block."""
    COUNT: tl.constexpr = BLOCK // GROUP
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.reshape(_load(logits + row * stride + at, at < vocab), (COUNT, GROUP))
    top = tl.max(x, 1)
    mass = tl.sum(tl.exp(_inverse(temperature) * (x - top[:, None])), 1)
    group = block * COUNT + tl.arange(0, COUNT)
    tl.store(tops + row * groups + group, top, mask=group < groups)
    tl.store(masses + row * groups + group, mass, mask=group < groups)


@triton.jit
def _tokens(groups, begin, size, limit, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block of the candidates is, among all of a row or in the chosen groups, and which of
    it are candidates."""
    if groups is None:
        token = begin + tl.arange(0, BLOCK)
        return token, token < limit
    else:
        slot = begin // GROUP + tl.arange(0, BLOCK // GROUP)
        present = slot < size // GROUP
        _top, group = _unpack(tl.load(groups + slot, mask=present, other=0))
        token = (group.to(tl.int32) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        return token, present[:, None] & (token < limit)


@triton.jit
def _keys(values, groups, begin, size, limit, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Ordered integers of a block of the candidates, and their places; those of -inf come behind
    the last."""
    token, present = _tokens(groups, begin, size, limit, GROUP, BLOCK)
    key = ordered_key(_load(values + token, present))
    return tl.reshape(key, (BLOCK,)), tl.reshape(token, (BLOCK,))


@triton.jit
def _choose(
    values, masses, groups, before, chosen, rest, stride, size, limit, slots, temperature,
    GROUP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The K best of a row's candidates, in their order, and maximum and sum of exponentials of the
    others.

    `values` are `limit` logits a row, or the maxima of groups with their `masses`. `before` is the
    `rest` of the choice that left these candidates.
    """
    row = tl.program_id(0).to(tl.int64)
    values, chosen = values + row * stride, chosen + row * slots
    if groups is not None:
        groups = groups + row * slots
    if KEEP:
        key, _token = _keys(values, groups, 0, size, limit, GROUP, BLOCK)

    # The boundary is in [low, high], beyond which are `above` candidates.
    low, high = tl.full((), _LOWEST, tl.int64), tl.full((), _HIGHEST, tl.int64)
    above = tl.full((), 0, tl.int32)
    while low < high:
        cut = (low + (high - low + 1) // 2).to(tl.int32)
        count = tl.full((), 0, tl.int32)
        lowest, highest = high.to(tl.int32), low.to(tl.int32)  # at the cut or above, and below it
        for begin in range(0, size, BLOCK):
            if not KEEP:
                key, _token = _keys(values, groups, begin, size, limit, GROUP, BLOCK)
            beyond = key >= cut
            count += tl.sum(beyond.to(tl.int32), 0)
            lowest = tl.minimum(lowest, tl.min(tl.where(beyond, key, _HIGHEST), 0))
            highest = tl.maximum(highest, tl.max(tl.where(beyond, _LOWEST, key), 0))
        enough = count >= slots
        low = tl.where(enough, lowest, low).to(tl.int64)
        high = tl.where(enough, high, highest).to(tl.int64)
        above = tl.where(enough, above, count)
    boundary = low.to(tl.int32)

    k = _inverse(temperature)
    top, z = tl.full((), -INF, tl.float32), tl.full((), 0.0, tl.float64)
    if before is not None:
        top, z = tl.load(before + row * 2).to(tl.float32), tl.load(before + row * 2 + 1)
    filled, ties = tl.full((), 0, tl.int32), slots - above
    for begin in range(0, size, PART):
        logit, token = _keys(values, groups, begin, size, limit, GROUP, PART)
        tie = (logit == boundary).to(tl.int32)
        inside = (logit > boundary) | ((tie != 0) & (tl.cumsum(tie, 0) <= ties))
        ties -= tl.sum(tie, 0)
        taken = inside.to(tl.int32)
        place = filled + tl.cumsum(taken, 0) - 1
        tl.store(chosen + place, (logit.to(tl.int64) << _SHIFT) - token, mask=inside)
        filled += tl.sum(taken, 0)
        x = tl.where(inside, -INF, from_ordered_key(logit))
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == -INF, 0.0, new_top)
        e = tl.exp(k * (x - shift))
        if masses is not None:
            e *= tl.load(masses + row * stride + token, mask=x > -INF, other=0.0)
        z = z * tl.exp(k * (top - shift)).to(tl.float64) + tl.sum(e, 0).to(tl.float64)
        top = new_top
    tl.store(rest + row * 2, top.to(tl.float64))
    tl.store(rest + row * 2 + 1, z)


@triton.jit
def _write(
    chosen, rest, ids, logprobs, tail, lse, slots, temperature, SLOTS: tl.constexpr,
):  # fmt: skip
    """One row's results from its K tokens in order and what they leave."""
    row = tl.program_id(0).to(tl.int64)
    nan = float("nan")
    temperature = tl.full((), temperature, tl.float32).to(tl.float64)
    k = 1.0 / temperature
    chosen, ids, logprobs = chosen + row * slots, ids + row * slots, logprobs + row * slots
    first, _best = _unpack(tl.load(chosen))
    sound = (first < INF) & (temperature > 0.0) & (temperature < INF)
    peak = first.to(tl.float64)  # if -inf, all that follows is NaN
    absent = tl.where(sound, -INF, INF)
    others = tl.full((), 0.0, tl.float64)  # of the chosen, but for the first
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        x, _token = _unpack(tl.load(chosen + slot, mask=slot < slots, other=0))
        e = tl.exp(k * (x.to(tl.float64) - peak))
        others += tl.sum(tl.where((slot > 0) & (slot < slots), e, 0.0), 0)
    top, z = tl.load(rest + row * 2), tl.load(rest + row * 2 + 1)
    log_tail = tl.log(z) + k * (top - peak)
    log_z = tl.where(sound, log1p(others + tl.exp(log_tail)), nan)
    tl.store(tail + row, (log_tail - log_z).to(tl.float32))
    tl.store(lse + row, (k * peak + log_z).to(tl.float32))
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        x, token = _unpack(tl.load(chosen + slot, mask=slot < slots, other=0))
        value = k * (x.to(tl.float64) - peak) - log_z
        tl.store(logprobs + slot, value.to(tl.float32), mask=slot < slots)
        tl.store(ids + slot, tl.where(x > absent, token, -1), mask=slot < slots)


def topk_logprobs_fwd(
    logits: Tensor, k: int, temperature: float, ids: Tensor, logprobs: Tensor, tail: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Writes `ids`, `logprobs`, `tail` and `lse`."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    group = _group(vocab, k, logits.element_size())
    chosen = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    rest = torch.empty((rows, 2), dtype=torch.float64, device=logits.device)
    with on_device(logits):
        if group == 0:
            _choose_from(
                logits, None, None, None, chosen, rest, vocab, vocab, k, temperature, 1
            )  # fmt: skip
        else:
            count = 16 * triton.cdiv(vocab, 16 * group)  # so that rows of them are aligned
            tops, masses = lse.new_empty((rows, count)), lse.new_empty((rows, count))
            elements = 32 // logits.element_size()
            block = elements * THREADS
            _reduce_groups[(rows, triton.cdiv(count * group, block))](
                logits, tops, masses, logits.stride(0), vocab, count, temperature, GROUP=group,
                BLOCK=block, **compiler_options(block, elements),
            )  # fmt: skip
            groups, outside = torch.empty_like(chosen), torch.empty_like(rest)
            _choose_from(
                tops, masses, None, None, groups, outside, count, count, k, temperature, 1
            )  # fmt: skip
            _choose_from(
                logits, None, groups, outside, chosen, rest, k * group, vocab, k, temperature, group
            )  # fmt: skip
        slots = max(32, min(SLOTS, triton.next_power_of_2(k)))
        _write[(rows,)](
            chosen.sort(-1, descending=True).values, rest, ids, logprobs, tail, lse, k, temperature,
            SLOTS=slots, **compiler_options(slots, 1),
        )  # fmt: skip


def _choose_from(
    values: Tensor, masses: Tensor | None, groups: Tensor | None, before: Tensor | None,
    chosen: Tensor, rest: Tensor, size: int, limit: int, k: int, temperature: float, group: int,
) -> None:  # fmt: skip
    """Launches `_choose` for candidates of `size` a row."""
    block = max(32 * _PER_THREAD, min(KEPT, triton.next_power_of_2(size)))
    _choose[(len(values),)](
        values, masses, groups, before, chosen, rest, values.stride(0), size, limit, k, temperature,
        GROUP=group, KEEP=size <= block, BLOCK=block, PART=max(group, block // 4),
        **compiler_options(block, _PER_THREAD),
    )  # fmt: skip


def _group(vocab: int, k: int, itemsize: int) -> int:
    """Tokens of a group, for the least traffic: a group costs 20 bytes, and a candidate is read
    twice. 0 for a row without groups."""
    group = 256
    while group > 16 and (k * group > KEPT or k * group * group * itemsize > 10 * vocab):
        group //= 2
    return group if vocab > KEPT and 2 * k * group <= vocab else 0
