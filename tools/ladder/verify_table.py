"""The rows of `verify` in the ladder's table.

A request whose one drafted token the target forbids: a row of the target and one of the draft of
`VOCAB` logits are read and compared, and a token is drawn from what is left of p. The floor is both
rows once. What the threads of a request read of its own few numbers, in scratch, is not counted.
"""

from __future__ import annotations

from typing import Any

from tools.ladder.rows import DTYPES, VOCAB, Table, bytes_row, dtype_of

STREAMS = ("target", "draft")
FORMS: dict[str, dict[str, Any]] = {"token": {}, "token top_p": {"top_p": 0.9}}


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
