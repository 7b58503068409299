"""The rows of `token_logprob` in the ladder's table: forward and backward, of `VOCAB` logits a row.

The floor is the row, read once, and backward the gradient, written once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tools.ladder.table import BYTES_ROWS, DTYPES, ROWS, VOCAB, Table, _dtype, compiled_row
from tools.ladder.topk_divergence_table import bytes_row

KERNELS = {"_token_logprob_forward": "forward", "_token_logprob_backward": "backward"}


def _launch(kernels: Any, count: int, dtype: str) -> Any:
    """Forward and backward of `count` rows; the logits."""
    import torch

    z = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(5)).to(_dtype(dtype))
    ids, ones = torch.zeros(count, dtype=torch.int64), torch.ones(count)
    logprob, entropy = torch.empty(count), torch.empty(count)
    saved = torch.empty(count, kernels.SAVED.value)
    kernels.token_logprob_fwd(z, ids, None, None, 1.0, logprob, entropy, saved)
    kernels.token_logprob_bwd(z, ids, None, saved, ones, ones, 1.0, torch.empty_like(z))
    return z


def triton_rows(target: str) -> Table:
    """Both kernels compiled for `target`."""
    from triton.errors import TritonError

    import pydistill.kernels.token_logprob as kernels
    from tools.ladder.dry_run import dry_run

    rows: Table = {}
    for dtype in DTYPES:
        try:
            with dry_run(target) as log:
                _launch(kernels, ROWS, dtype)
        except (TritonError, RuntimeError) as error:
            print(f"token_logprob {dtype} {target}: {error}", file=sys.stderr)
            rows[f"triton token_logprob forward {dtype} {target}"] = {"compiles": False}
            continue
        for report in log.kernels:
            rows[f"triton token_logprob {KERNELS[report.kernel]} {dtype} {target}"] = compiled_row(
                report.resources.registers,
                report.spills,
                report.shared,
                report.occupancy.fraction,
            )
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
            rows[key] = bytes_row(direction, moved, z.dtype.itemsize, ("logits", "grad"))
    return rows
