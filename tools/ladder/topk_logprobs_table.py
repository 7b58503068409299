"""The rows of `topk_logprobs` in the ladder's table, for the best `SLOTS` tokens of a row.

A row of `VOCAB` logits takes four kernels: `groups` reads it, `pick` chooses groups, `choose`
tokens in them, `write` the results. A shorter one, of `SHORT`, takes the last two, of which the
first reads it twice. Bytes are those of all kernels, and their floor is one read of the row and the
results.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from tools.ladder.rows import BYTES_ROWS, DTYPES, ROWS, VOCAB, Row, Table, compiled_rows, dtype_of

SLOTS = 64
SHORT = 16384
# The kernels' parts, in the order of their launches, and which parameter is the logits.
PARTS = {
    VOCAB: (("groups", "logits"), ("pick", None), ("choose", "values"), ("write", None)),
    SHORT: (("row", "values"), ("write", None)),
}


def _launch(kernels: Any, count: int, vocab: int, dtype: str) -> Any:
    """All kernels on `count` rows; the logits."""
    import torch

    z = torch.randn(count, vocab, generator=torch.Generator().manual_seed(5)).to(dtype_of(dtype))
    ids, logprobs = torch.empty(count, SLOTS).long(), torch.empty(count, SLOTS)
    kernels.topk_logprobs_fwd(z, SLOTS, 1.0, ids, logprobs, torch.empty(count), torch.empty(count))
    return z


def triton_rows(target: str) -> Table:
    """Every kernel compiled for `target`."""
    import pydistill.kernels.topk_logprobs as kernels

    rows: Table = {}
    for dtype in DTYPES:
        for vocab, parts in PARTS.items():
            keys = [f"triton topk_logprobs {part} {dtype} {target}" for part, _ in parts]
            rows |= compiled_rows(target, partial(_launch, kernels, ROWS, vocab, dtype), keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import pydistill.kernels.topk_logprobs as kernels
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for dtype in DTYPES:
        for vocab, name in ((VOCAB, "forward"), (SHORT, "row")):
            with strict() as meter:
                z = _launch(kernels, BYTES_ROWS, vocab, dtype)
            rows[f"triton topk_logprobs {name} {dtype} bytes"] = forward_bytes(
                meter, vocab, z.dtype.itemsize
            )
    return rows


def forward_bytes(meter: Any, vocab: int, itemsize: int) -> Row:
    """What all kernels of a forward asked for."""
    logits = 0
    for (_, source), launch in zip(PARTS[vocab], meter.launches, strict=True):
        logits += launch.bytes[source].loaded if source else 0
    stream, total = BYTES_ROWS * vocab * itemsize, meter.total_requested()
    floor = stream + BYTES_ROWS * (12 * SLOTS + 8)
    return {
        "logits": logits,
        "small": total - logits,
        "floor": floor,
        "ratio": round(total / floor, 3),
        "sweeps": [round(logits / stream, 3)],
    }
