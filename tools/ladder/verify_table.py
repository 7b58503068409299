"""The rows of `verify` in the ladder's table: `token` with a dense draft, one request of `SLOTS`
drafted tokens.

`blocks` reads rows, `rows` makes their numbers (of the target's and of the draft's, which are one
kernel twice), `walk` finds the slots that are tested, `compare` reads their rows again, `decide`
and `sample` write the results. Bytes are those of all kernels; their floor is one read of the rows.
In `rejected` the first token is, so that one pair of rows is read twice; in `accepted` none.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from tools.ladder.rows import DTYPES, VOCAB, Row, Table, compiled_rows, dtype_of

SLOTS = 4
PARTS = ("blocks", "rows", "draft_blocks", "draft_rows", "walk", "compare", "decide", "sample")
_ROWS = ("logits", "target", "draft")


def _launch(kernels: Any, dtype: str, accepted: bool) -> Any:
    """All kernels on one request; the accepted tokens."""
    import torch

    g = torch.Generator().manual_seed(5)
    target = torch.randn(1, SLOTS + 1, VOCAB, generator=g).to(dtype_of(dtype))
    draft = target[:, :-1].contiguous()
    ids = draft.argmax(-1) if accepted else torch.full((1, SLOTS), 7)
    if not accepted:
        target[..., 7] = -torch.inf
    one, rows, drafted = torch.zeros(1, dtype=torch.int64), (1, SLOTS + 1), (1, SLOTS)
    off = [1.0, 0.0, 1.0, -torch.inf]
    warpers = torch.tensor([off + off], dtype=torch.float64)
    count = torch.empty(1, dtype=torch.int64)
    kernels.verify_fwd(
        target, draft, ids, one + SLOTS, warpers, one, one, None, None, None, 0, 0, 0.0, 0.0, False,
        torch.empty(rows, dtype=torch.int64), count, torch.empty(rows), torch.empty(drafted),
        torch.empty(drafted), torch.empty(rows), torch.empty(drafted),
        torch.empty(rows, dtype=torch.int32), torch.empty(drafted, dtype=torch.int64),
    )  # fmt: skip
    return count


def triton_rows(target: str) -> Table:
    """Every kernel compiled for `target`."""
    import pydistill.kernels.verify as kernels

    rows: Table = {}
    for dtype in DTYPES:
        keys = [f"triton verify {part} {dtype} {target}" for part in PARTS]
        rows |= compiled_rows(target, partial(_launch, kernels, dtype, True), keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import pydistill.kernels.verify as kernels
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for dtype in DTYPES:
        for name, accepted in (("accepted", SLOTS), ("rejected", 0)):
            with strict() as meter:
                found = _launch(kernels, dtype, bool(accepted))
            assert int(found) == accepted
            rows[f"triton verify {name} {dtype} bytes"] = verify_bytes(
                meter, dtype_of(dtype).itemsize
            )
    return rows


def verify_bytes(meter: Any, itemsize: int) -> Row:
    """What all kernels of a call asked for."""
    logits = sum(launch.bytes[n].loaded for launch in meter.launches for n in _ROWS
                 if n in launch.bytes)  # fmt: skip
    total, floor = meter.total_requested(), (2 * SLOTS + 1) * VOCAB * itemsize
    return {
        "logits": logits,
        "small": total - logits,
        "floor": floor,
        "ratio": round(total / floor, 3),
        "sweeps": [round(logits / floor, 3)],
    }
