"""Rows of a packed teacher cache, as the tensors that `topk_divergence` takes.

A packed row holds K tokens of a vocabulary of V with their log-probabilities, and the mass of all
other tokens: ids by Elias-Fano, log-probabilities as codes of one or two bytes, 182 bytes for
K = 64 of V = 151,936. docs/ops/cache_decode.md gives the format; `pydistill.cache` writes it.

Shapes: packed uint8 [N, stride], of which all rows or R chosen ones are read; ids int64 [R, K],
ascending, -1 in the empty slots at the end; log-probabilities fp32 [R, K]; tail fp32 [R]. Nothing
here has a gradient. Cost: one read of the packed rows, one write of 12 bytes an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.reference.cache_decode import CODES, cache_decode_out, layout

OP = _registry.operator("cache_decode", {torch.uint8})
_registry.kernel(
    OP,
    "cache_decode_fwd",
    "(Tensor packed, Tensor? rows, int vocab_size, int code_bytes, Tensor(a!) ids,"
    " Tensor(b!) log_p, Tensor(c!) log_tail) -> ()",
    cache_decode_out,
)


def cache_decode(
    packed: Tensor,
    vocab_size: int,
    k: int,
    *,
    rows: Tensor | None = None,
    codes: str = "uint8",
    temperature: float = 1.0,
    impl: str = "auto",
) -> TopkTeacher:
    """Unpacks rows of a teacher cache.

    Args:
        packed: uint8 `[N, stride]`, contiguous, with the stride that V, K and `codes` give.
        vocab_size: V, the width of the logits the rows were taken from.
        k: K, the slots of a row.
        rows: int64 `[...]`, which rows; None for all, in order.
        codes: "uint8" or "uint16", how log-probabilities are stored.
        temperature: the teacher's, handed on to the result.
        impl: "auto", "reference" or "cpu"; an explicit choice never falls back.

    Returns:
        A `TopkTeacher` of `[..., K]`, with the prefix of `rows`.

    Raises:
        ValueError, TypeError: a shape, a dtype, a layout or a row that cannot be right. Bytes that
            were damaged are not noticed here: checksums are the cache's.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = getattr(packed, "dtype", type(packed).__name__)
        raise TypeError(f"packed is {got}; pass the uint8 rows of a teacher cache.")
    at = layout(vocab_size, k, codes)
    if packed.ndim != 2 or packed.shape[1] != at.stride or not packed.is_contiguous():
        raise ValueError(
            f"packed has shape {tuple(packed.shape)} and strides {packed.stride()}; rows of K={k}"
            f" of V={vocab_size} tokens in {codes} codes are contiguous [N, {at.stride}]."
        )
    prefix = None if rows is None else rows.shape
    if rows is not None:
        if rows.dtype != torch.int64:
            raise TypeError(f"rows is {rows.dtype}; pass int64 row numbers (rows.long()).")
        if rows.device != packed.device:
            raise ValueError(f"rows is on {rows.device}, packed on {packed.device}; move one.")
        rows = rows.reshape(-1).contiguous()
        if _rows.values_readable(rows) and rows.numel():
            low, high = (int(x) for x in rows.aminmax())
            if low < 0 or high >= len(packed):
                raise ValueError(
                    f"rows holds {low if low < 0 else high}, but packed has {len(packed)} rows;"
                    f" pass 0..{len(packed) - 1}."
                )
    backend = _registry.resolve(OP.name, impl, packed.device.type, packed.dtype)
    count = len(packed) if rows is None else len(rows)
    ids = torch.empty((count, k), dtype=torch.int64, device=packed.device)
    log_p = torch.empty((count, k), dtype=torch.float32, device=packed.device)
    tail = torch.empty(count, dtype=torch.float32, device=packed.device)
    reference = backend == "reference"
    kernel = cache_decode_out if reference else _registry.overload("cache_decode_fwd", backend)
    kernel(packed, rows, vocab_size, CODES[codes], ids, log_p, tail)
    teacher = TopkTeacher(log_p, ids, tail, temperature, vocab_size)
    return teacher if prefix is None else teacher.reshape(*prefix)
