"""The rows of `divergence` in the ladder's table: every kind, forward and backward."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from tools.ladder.rows import (
    BYTES_ROWS,
    DIRECTIONS,
    DTYPES,
    ROWS,
    VOCAB,
    Table,
    bytes_row,
    compiled_rows,
    dtype_of,
)

LONG = 151936  # adaptive_kl's forward has another way for rows that no chip keeps
STREAMS = {"forward": ("student", "teacher"), "backward": ("student", "teacher", "grad")}


def kernels() -> list[tuple[str, str, str, int]]:
    """Kind, dtype, direction and vocabulary of every kernel that the table has."""
    from pydistill.reference.divergence import KINDS

    each = [(kind, dtype, way, VOCAB) for kind in KINDS for dtype in DTYPES for way in DIRECTIONS]
    return each + [("adaptive_kl", dtype, "forward", LONG) for dtype in DTYPES]


def key_of(backend: str, kind: str, dtype: str, direction: str, vocab: int, column: str) -> str:
    length = "" if vocab == VOCAB else f" V={vocab}"
    return f"{backend} {direction} {kind} {dtype}{length} {column}"


def _launch(direction: str, s: Any, t: Any, options: Any) -> None:
    """One direction over all pairs, without row indices, labels or statistics."""
    import torch

    from pydistill.kernels import divergence

    kernels: Any = divergence
    none = (None,) * 5
    loss, saved = torch.zeros(len(s)), torch.zeros(len(s), 8)
    if direction == "forward":
        kernels.divergence_fwd(s, t, *none, *options, loss, saved, loss[:0])
        return
    saved[:, 1] = saved[:, 3] = 1.0
    grad = torch.empty_like(s)
    kernels.divergence_bwd(s, t, *none, None, saved, torch.ones(len(s)), *options, grad)


def triton_rows(target: str) -> Table:
    """Every kind, direction and dtype compiled for `target`, with temperature 1."""
    import torch

    from pydistill.reference.divergence import KINDS, Options

    rows: Table = {}
    for kind, dtype, direction, vocab in kernels():
        options = Options(KINDS[kind].id, 1.0, 0.3, 0.6, False, 0.0, 0.0, vocab)
        s, t = (torch.empty(ROWS, vocab, dtype=dtype_of(dtype)) for _ in range(2))
        key = key_of("triton", kind, dtype, direction, vocab, target)
        rows |= compiled_rows(target, partial(_launch, direction, s, t, options), [key])
    return rows


def _logits(dtype: str, vocab: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(5)
    draws = (torch.randn(BYTES_ROWS, vocab, generator=generator) for _ in range(2))
    return tuple(draw.to(dtype_of(dtype)) for draw in draws)


def triton_bytes() -> Table:
    """Bytes that the Triton kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    from pydistill.reference.divergence import KINDS, Options
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for kind, dtype, direction, vocab in kernels():
        spec = KINDS[kind]
        alpha, beta = spec.alpha or 0.0, spec.beta or 0.0
        options = Options(spec.id, 1.0, alpha, beta, False, 0.0, 0.0, vocab)
        s, t = _logits(dtype, vocab)
        with strict() as meter:
            _launch(direction, s, t, options)
        moved = {name: seen.loaded + seen.stored for name, seen in meter.bytes.items()}
        key = key_of("triton", kind, dtype, direction, vocab, "bytes")
        rows[key] = bytes_row(STREAMS[direction], moved, s.dtype.itemsize, vocab)
    return rows


def cuda_bytes() -> Table:
    """Bytes that the CUDA kernels move under cusim, counted by its memory hooks."""
    from pydistill.ops.divergence import divergence
    from tools.ladder.cuda.divergence import SOURCE, simulated
    from tools.ladder.cuda.sim import CudaSim

    sim = CudaSim.build(SOURCE, hooks=True)
    rows: Table = {}
    for kind, dtype, direction, vocab in kernels():
        s, t = _logits(dtype, vocab)
        with simulated(sim) as calls:
            loss = divergence(s.requires_grad_(), t, kind, reduction="sum", impl="cuda")
            if direction == "backward":
                loss.backward()
        moved = {name: seen.bytes_moved for name, seen in calls[-1].report.buffers.items()}
        key = key_of("cuda", kind, dtype, direction, vocab, "bytes")
        rows[key] = bytes_row(STREAMS[direction], moved, s.dtype.itemsize, vocab)
    return rows
