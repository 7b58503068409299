"""The rows of `verify` in the ladder's table.

A request whose one drafted token the target forbids: a row of the target and one of the draft of
`VOCAB` logits are read and compared, and a token is drawn from what is left of p. The floor is both
rows once. What the threads of a request read of its own few numbers, in scratch, is not counted.

In Triton it is `token` of one request with four drafted tokens. `blocks` reads rows, `rows` makes
their numbers (of the target's and of the draft's), `walk` finds the slots that are tested,
`compare` reads their rows again, `decide` and `sample` write the results. The floor is all nine
rows once. Of `accepted` all are tested, of `rejected` one pair.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from tools.ladder.rows import DTYPES, VOCAB, Row, Table, bytes_row, compiled_rows, dtype_of

STREAMS = ("target", "draft")
FORMS: dict[str, dict[str, Any]] = {"token": {}, "token top_p": {"top_p": 0.9}}

TRITON_SLOTS = 4
TRITON_PARTS = (
    "blocks", "rows", "draft_blocks", "draft_rows", "walk", "compare", "decide", "sample",
)  # fmt: skip
_ROWS = ("logits", "target", "draft")  # what kernels call rows of logits


def cuda_bytes() -> Table:
    """Bytes that the CUDA kernels move under cusim, counted by its memory hooks."""
    from pydistill import verify
    from tools.ladder.cuda.sim import CudaSim
    from tools.ladder.cuda.verify import SOURCE, simulated
    from tools.ladder.mutants.verify_cuda import rejected

    sim = CudaSim.build(SOURCE, hooks=True)
    rows: Table = {}
    for dtype in DTYPES:
        inputs = rejected(1, 1, VOCAB, dtype_of(dtype))
        for form, options in FORMS.items():
            with simulated(sim) as calls:
                verify(**inputs, **options, seed=0, position=0, impl="cuda")
            seen = calls[0].report.buffers.items()
            moved = {name: traffic.bytes_moved for name, traffic in seen if name != "scratch"}
            rows[f"cuda verify {form} {dtype} bytes"] = bytes_row(
                STREAMS, moved, dtype_of(dtype).itemsize
            )
    return rows


def _launch(kernels: Any, dtype: str, accepted: bool) -> Any:
    """All kernels on one request; the accepted tokens."""
    import torch

    g = torch.Generator().manual_seed(5)
    target = torch.randn(1, TRITON_SLOTS + 1, VOCAB, generator=g).to(dtype_of(dtype))
    draft = target[:, :-1].clone()
    ids = draft.argmax(-1) if accepted else torch.full((1, TRITON_SLOTS), 7)
    if not accepted:
        target[..., 7], draft[..., 7] = -torch.inf, 20.0
    one, rows, drafted = torch.zeros(1, dtype=torch.int64), (1, TRITON_SLOTS + 1), (1, TRITON_SLOTS)
    off = [1.0, 0.0, 1.0, -torch.inf]
    warpers = torch.tensor([off + off], dtype=torch.float64)
    count = torch.empty(1, dtype=torch.int64)
    kernels.verify_fwd(
        target, draft, ids, one + TRITON_SLOTS, warpers, one, one, None, None, None, 0, 0, 0.0,
        0.0, False,
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
        keys = [f"triton verify {part} {dtype} {target}" for part in TRITON_PARTS]
        rows |= compiled_rows(target, partial(_launch, kernels, dtype, True), keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the kernels ask for, in the strict interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import pydistill.kernels.verify as kernels
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for dtype in DTYPES:
        for name, accepted in (("accepted", TRITON_SLOTS), ("rejected", 0)):
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
    total, floor = meter.total_requested(), (2 * TRITON_SLOTS + 1) * VOCAB * itemsize
    return {
        "logits": logits,
        "small": total - logits,
        "floor": floor,
        "ratio": round(total / floor, 3),
        "sweeps": [round(logits / floor, 3)],
    }
