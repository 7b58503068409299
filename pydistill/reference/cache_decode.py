"""The definition of `cache_decode`: a packed row of a teacher cache, read in plain torch.

A row is K slots of a vocabulary of V tokens, in `Layout.stride` bytes that depend on K and V alone,
so that any row is found by multiplication. docs/ops/cache_decode.md gives the format:

    low     the l low bits of each id, ids ascending, packed from the lowest bit up
    high    a bitmap in which the i-th one stands at bit (id_i >> l) + i      (Elias-Fano)
    codes   one code c a slot: log p = offset - scale c^2, the largest code meaning -inf
    offset, scale, tail log-probability: three fp32 numbers
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CODES = {"uint8": 1, "uint16": 2}  # bytes a code
MAX_LOW_BITS = 24  # of which with a shift by up to 7 four bytes hold all
HEADER = 12
VOCAB_LIMIT = 2**31
_CHUNK = 4096  # rows at a time: bits take 8 bytes each here


class Layout(NamedTuple):
    """Where the parts of a packed row are; sizes in bytes but for `low_bits` and `high_bits`."""

    k: int
    low_bits: int
    low: int
    high_bits: int
    high: int
    code: int

    @property
    def codes(self) -> int:
        """The bytes of all codes of a row."""
        return self.k * self.code

    @property
    def stride(self) -> int:
        """The bytes of a row."""
        return self.low + self.high + self.codes + HEADER

    @property
    def infinite(self) -> int:
        """The code of log-probability -inf."""
        return int(256**self.code - 1)


def layout(vocab_size: int, k: int, codes: str = "uint8") -> Layout:
    """The layout of rows of K of V tokens; ValueError for what no row can be."""
    if codes not in CODES:
        raise ValueError(f"codes={codes!r} is not known; use one of {', '.join(CODES)}.")
    if not 1 <= vocab_size <= VOCAB_LIMIT:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..2^31; pass the logits' width.")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k={k} is outside 1..{vocab_size}, the vocabulary; choose a smaller k.")
    low_bits = min((vocab_size // k).bit_length() - 1, MAX_LOW_BITS)
    high_bits = k + ((vocab_size - 1) >> low_bits)
    return Layout(
        k, low_bits, _whole_bytes(k * low_bits), high_bits, _whole_bytes(high_bits), CODES[codes]
    )


def _whole_bytes(bits: int) -> int:
    return (bits + 7) // 8


def cache_decode_reference(packed: Tensor, at: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 `[R, stride]` -> ids int64 `[R, K]`, log-probabilities fp32 `[R, K]` and the tail's
    `[R]`. Empty slots come last, as id -1 and -inf."""
    rows, device = packed.shape[0], packed.device
    _, high, codes, header = packed.split([at.low, at.high, at.codes, HEADER], 1)

    bit = torch.arange(8, device=device)
    ones = ((high[:, :, None] >> bit) & 1).flatten(1)[:, : at.high_bits].long()
    rank = ones.cumsum(1) - 1
    position = torch.arange(at.high_bits, device=device) - rank
    slot = torch.where((ones == 1) & (rank < at.k), rank, at.k)
    ids = torch.full((rows, at.k + 1), -1, dtype=torch.int64, device=device)
    ids = ids.scatter(1, slot, position << at.low_bits)[:, : at.k]
    if at.low_bits:
        start = torch.arange(at.k, device=device) * at.low_bits
        four = packed.long()[:, (start // 8)[:, None] + torch.arange(4, device=device)]
        word = (four << (8 * torch.arange(4, device=device))).sum(-1)
        ids = torch.where(ids < 0, -1, ids | ((word >> start % 8) & ((1 << at.low_bits) - 1)))

    offset, scale, tail = (
        header.clone(memory_format=torch.contiguous_format).view(torch.float32).unbind(1)
    )
    c = codes.reshape(rows, at.k, at.code).long()
    c = (c << (8 * torch.arange(at.code, device=device))).sum(-1)
    square = c.float() * c.float()
    log_p = offset[:, None] - scale[:, None] * square
    log_p = torch.where((c == at.infinite) | (ids < 0), -math.inf, log_p)
    return ids, log_p, tail


def cache_decode_out(
    packed: Tensor,
    rows: Tensor | None,
    vocab_size: int,
    code_bytes: int,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor,
) -> None:
    """The same as an `out` kernel, for torch's dispatcher."""
    codes = next(name for name, size in CODES.items() if size == code_bytes)
    at = layout(vocab_size, ids.shape[1], codes)
    chosen = packed if rows is None else packed[rows]
    for begin in range(0, len(chosen), _CHUNK):
        some = slice(begin, begin + _CHUNK)
        parts = cache_decode_reference(chosen[some], at)
        for out, part in zip((ids, log_p, log_tail), parts, strict=True):
            out[some] = part
