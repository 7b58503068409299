"""The rows of `topk_divergence` in the ladder's table.

Forward and backward are several kernels: the sweeps of the row, which know no kind, and those of
the cells. Each has a row of its own from the compilers; bytes are those of a whole direction, on
one row of `VOCAB` logits with `SLOTS` tokens as support, and their floor is the row alone.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from tools.ladder.rows import (
    BYTES_ROWS,
    DTYPES,
    ROWS,
    VOCAB,
    Table,
    bytes_row,
    compiled_rows,
    dtype_of,
)

SLOTS = 64
STREAMS = {"forward": ("student",), "backward": ("student", "grad")}
# Every kind with a cell for the tail, and the other ways to count it.
FORMS = (
    *((kind, "bucket") for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")),
    ("forward_kl", "renormalize"),
    ("forward_kl", "truncate"),
)


def _inputs(rows: int, dtype: str) -> Any:
    import torch

    from pydistill.reference.topk_divergence import Inputs

    g = torch.Generator().manual_seed(5)
    student = torch.randn(rows, VOCAB, generator=g).to(dtype_of(dtype))
    log_p, ids = torch.log_softmax(torch.randn(rows, VOCAB, generator=g), 1).topk(SLOTS)
    return Inputs(student, ids, log_p, torch.log1p(-log_p.exp().sum(1)), None, None)


def _options(kind: str, tail: str) -> Any:
    from pydistill.reference.divergence import KINDS
    from pydistill.reference.topk_divergence import TAILS, Options

    return Options(KINDS[kind].id, TAILS[tail], 1.0, 0.5, False)


def _launch(ops: Any, inputs: Any, options: Any) -> None:
    """Forward and backward of all rows, by the operator's schemas."""
    import torch

    from pydistill.reference.topk_divergence import SAVED

    count = len(inputs.student)
    loss, saved = torch.empty(count), torch.empty(count, SAVED)
    ops.topk_divergence_fwd(*inputs, *options, loss, saved)
    grad = torch.empty_like(inputs.student)
    ops.topk_divergence_bwd(*inputs[:4], None, saved, torch.ones(count), *options, grad)


def triton_rows(target: str) -> Table:
    """Every kernel compiled for `target`."""
    import pydistill.kernels.topk_divergence as kernels

    rows: Table = {}
    for dtype in DTYPES:
        inputs = _inputs(ROWS, dtype)
        for kind, tail in FORMS:
            form = f"{kind} {tail} {dtype}"
            # In the order of their launches. The sweeps know no kind.
            parts = [
                f"outside {dtype}", f"forward {form}", f"support {form}", f"backward {dtype}",
                f"place {dtype}",
            ]  # fmt: skip
            keys = [f"triton topk_divergence {part} {target}" for part in parts]
            launch = partial(_launch, kernels, inputs, _options(kind, tail))
            rows |= compiled_rows(target, launch, keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the Triton kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import pydistill.kernels.topk_divergence as kernels
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for dtype in DTYPES:
        inputs = _inputs(BYTES_ROWS, dtype)
        with strict() as meter:
            _launch(kernels, inputs, _options("forward_kl", "bucket"))
        for direction, launches in (
            ("forward", ("_outside_sums", "_topk_divergence_forward")),
            ("backward", ("_support_gradient", "_outside_gradient", "_place")),
        ):
            moved: dict[str, int] = {}
            for launch in launches:
                for name, seen in meter.of(launch).bytes.items():
                    moved[name] = moved.get(name, 0) + seen.loaded + seen.stored
            key = f"triton topk_divergence {direction} {dtype} bytes"
            rows[key] = bytes_row(STREAMS[direction], moved, inputs.student.dtype.itemsize)
    return rows


def cuda_bytes() -> Table:
    """Bytes that the CUDA kernels move under cusim, counted by its memory hooks."""
    import torch

    from tools.ladder.cuda.sim import CudaSim
    from tools.ladder.cuda.topk_divergence import SOURCE, simulated

    sim = CudaSim.build(SOURCE, hooks=True)
    rows: Table = {}
    for dtype in DTYPES:
        inputs = _inputs(BYTES_ROWS, dtype)
        with simulated(sim) as calls:
            _launch(torch.ops.pydistill_cuda, inputs, _options("forward_kl", "bucket"))
        for direction, call in zip(("forward", "backward"), calls, strict=True):
            moved = {name: seen.bytes_moved for name, seen in call.report.buffers.items()}
            key = f"cuda topk_divergence {direction} {dtype} bytes"
            rows[key] = bytes_row(STREAMS[direction], moved, inputs.student.dtype.itemsize)
    return rows
