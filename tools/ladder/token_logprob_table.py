"""The rows of `token_logprob` in the ladder's table: forward and backward, of `VOCAB` logits a row.

The floor is the row, read once, and backward the gradient, written once.
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

STREAMS = {"forward": ("logits",), "backward": ("logits", "grad")}
KERNELS = {"_token_logprob_forward": "forward", "_token_logprob_backward": "backward"}


def _launch(kernels: Any, count: int, dtype: str) -> Any:
    """Forward and backward of `count` rows; the logits."""
    import torch

    z = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(5)).to(dtype_of(dtype))
    ids, ones = torch.zeros(count, dtype=torch.int64), torch.ones(count)
    logprob, entropy = torch.empty(count), torch.empty(count)
    saved = torch.empty(count, kernels.SAVED.value)
    kernels.token_logprob_fwd(z, ids, None, None, 1.0, logprob, entropy, saved)
    kernels.token_logprob_bwd(z, ids, None, saved, ones, ones, 1.0, torch.empty_like(z))
    return z


def triton_rows(target: str) -> Table:
    """Both kernels compiled for `target`."""
    import pydistill.kernels.token_logprob as kernels

    rows: Table = {}
    for dtype in DTYPES:
        keys = [f"triton token_logprob {way} {dtype} {target}" for way in KERNELS.values()]
        rows |= compiled_rows(target, partial(_launch, kernels, ROWS, dtype), keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import pydistill.kernels.token_logprob as kernels
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for dtype in DTYPES:
        with strict() as meter:
            z = _launch(kernels, BYTES_ROWS, dtype)
        for kernel, direction in KERNELS.items():
            seen = meter.of(kernel).bytes
            moved = {name: traffic.loaded + traffic.stored for name, traffic in seen.items()}
            key = f"triton token_logprob {direction} {dtype} bytes"
            rows[key] = bytes_row(STREAMS[direction], moved, z.dtype.itemsize)
    return rows
