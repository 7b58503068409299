"""Top-k log-probabilities to packed rows: the inverse of `pydistill.cache_decode`, in NumPy.

A row's log-probabilities are stored as codes c, log p = offset - scale c^2. The square spends the
codes where the mass is (steps of 2 sqrt(scale d) at a distance d below the largest) and still keeps
the rarest token within d_max / 254; `scale` is the row's own range over the largest code, squared.
`offset` is not the largest log-probability but what makes the stored row sum to 1 with its tail:
the mean error of the codes cancels, and what is left of KL(stored || true) is their variance.

Rows must be distributions: the given mass may miss 1 by `MASS_ERROR`, and is brought to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pydistill.reference.cache_decode import Layout

MASS_ERROR = 0.01  # what log-probabilities rounded to bf16 may sum up to
RANGE = 100.0  # nats below the largest at which a probability is stored as if it were there
_CHUNK = 4096  # rows packed at a time: one byte a bit

Array = npt.NDArray[Any]


def encode(
    ids: Array, log_p: Array, log_tail: Array, vocab_size: int, at: Layout
) -> tuple[Array, Array]:
    """Packs rows: ids `[n, K]` (-1 in empty slots), log-probabilities `[n, K]`, tails `[n]` to
    uint8 `[n, stride]`, and each row's KL(stored || given) over the K + 1 cells.

    Raises ValueError for what is no distribution over distinct tokens, naming the row.
    """
    packed = np.empty((len(ids), at.stride), np.uint8)
    kl = np.empty(len(ids))
    for begin in range(0, len(ids), _CHUNK):
        some = slice(begin, begin + _CHUNK)
        order, sorted_ids = _sort(ids[some], vocab_size, begin)
        values = np.take_along_axis(log_p[some].astype(np.float64), order, 1)
        full = sorted_ids < vocab_size
        values = np.where(full, values, -np.inf)
        parts = _codes(values, log_tail[some].astype(np.float64), at, begin)
        codes, header, kl[some] = parts
        packed[some] = np.concatenate(
            [
                _low_bits(np.where(full, sorted_ids, 0), at),
                _high_bits(sorted_ids, full, at),
                np.where(full, codes, 0).astype(f"<u{at.code}").view(np.uint8),
                header.astype("<f4").view(np.uint8),
            ],
            axis=1,
        )
    return packed, kl


def _sort(ids: Array, vocab_size: int, first: int) -> tuple[Array, Array]:
    """The order that sorts each row's ids, and the ids in it; empty slots last, as `vocab_size`."""
    if ids.size and ids.max() >= vocab_size:
        row = int((ids.max(1) >= vocab_size).argmax())
        raise ValueError(
            f"topk_ids holds {int(ids[row].max())} in row {first + row}, but the cache's vocabulary"
            f" is {vocab_size}; ids of another model? (-1 marks an empty slot)"
        )
    ids = np.where(ids < 0, vocab_size, ids)
    order = np.argsort(ids, 1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < vocab_size)
    if twice.any():
        row, slot = (int(i) for i in np.argwhere(twice)[0])
        raise ValueError(
            f"topk_ids names token {int(ids[row, slot])} twice in row {first + row}; keep each"
            " token once (-1 marks an empty slot)."
        )
    return order, ids


def _codes(log_p: Array, log_tail: Array, at: Layout, first: int) -> tuple[Array, Array, Array]:
    """Codes `[n, K]`, the header's three numbers `[n, 3]`, and KL(stored || given) `[n]`."""
    if np.isnan(log_p).any() or np.isnan(log_tail).any():
        row = int((np.isnan(log_p).any(1) | np.isnan(log_tail)).argmax())
        raise ValueError(f"a log-probability of row {first + row} is NaN; look at its logits.")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        top = np.exp(log_p).sum(1)
        total = top + np.exp(log_tail)
        wrong = ~(np.abs(total - 1) <= MASS_ERROR)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"the probabilities of row {first + row} and its tail sum to {total[row]:.6g}, not"
                " 1; pass log-probabilities under the full softmax, at the cache's temperature, and"
                " tail_logprob = log(1 - their sum)."
            )
        log_p, log_tail = log_p - np.log(total)[:, None], log_tail - np.log(total)
        best = log_p.max(1, keepdims=True)
        below = np.where(log_p == -np.inf, 0, best - log_p)
        below = np.minimum(np.where(np.isfinite(below), below, 0), RANGE)
        scale = (below.max(1, keepdims=True) / (at.infinite - 1) ** 2).astype(np.float32)
        codes = np.rint(np.sqrt(below / np.where(scale > 0, scale, 1)))
        codes = np.minimum(codes, at.infinite - 1)
        square = codes.astype(np.float32) ** 2
        shape = np.where(log_p == -np.inf, 0, np.exp(-(scale * square).astype(np.float64)))
        offset = np.log(top / total) - np.log(shape.sum(1))
        offset = np.where(top > 0, offset, 0).astype(np.float32)[:, None]
        stored = np.where(log_p == -np.inf, -np.inf, offset - scale * square).astype(np.float64)
        error = np.where(log_p == -np.inf, 0, stored - log_p)
        kl = (np.exp(stored) * error - np.exp(stored) + np.exp(log_p)).sum(1)
    codes = np.where(log_p == -np.inf, at.infinite, codes)
    header = np.concatenate([offset, scale, log_tail.astype(np.float32)[:, None]], 1)
    return codes, header, np.maximum(kl, 0)


def _low_bits(ids: Array, at: Layout) -> Array:
    bits = (ids[:, :, None] >> np.arange(at.low_bits)) & 1
    return np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1, bitorder="little")


def _high_bits(ids: Array, full: Array, at: Layout) -> Array:
    position = np.where(full, (ids >> at.low_bits) + np.arange(at.k), 8 * at.high)
    bits = np.zeros((len(ids), 8 * at.high + 1), np.uint8)
    np.put_along_axis(bits, position, 1, 1)
    return np.packbits(bits[:, :-1], axis=1, bitorder="little")
