"""What the rows of the ladder's table are made of, whichever operator's they are.

A row of the compilers holds registers, spills, shared memory and occupancy of one kernel on one
target; a row of the simulators holds the bytes that one direction asks for and their floor, the
bytes of logits and gradient moved once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Table = dict[str, Row]

DTYPES = ("fp32", "bf16")
DIRECTIONS = ("forward", "backward")
ROWS, VOCAB = 64, 32000
BYTES_ROWS = 1  # the simulators run every thread


def dtype_of(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def compiled_row(registers: int, spills: int, shared: int, occupancy: float) -> Row:
    return {
        "compiles": True,
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "occupancy": round(occupancy, 3),
    }


def compiled_rows(target: str, launch: Callable[[], object], keys: Sequence[str]) -> Table:
    """A row for each kernel, in the order in which `launch` launches them, compiled by Triton for
    `target`. If one does not compile, the first key says so, and stderr why."""
    from triton.errors import TritonError

    from tools.ladder.dry_run import dry_run

    try:
        with dry_run(target) as log:
            launch()
    except (TritonError, RuntimeError) as error:
        print(f"{keys[0]}: {error}", file=sys.stderr)
        return {keys[0]: {"compiles": False}}
    return {
        key: compiled_row(
            report.resources.registers, report.spills, report.shared, report.occupancy.fraction
        )
        for key, report in zip(keys, log.kernels, strict=True)
    }


def bytes_row(
    streams: tuple[str, ...], traffic: Mapping[str, int], itemsize: int, vocab: int = VOCAB
) -> Row:
    """`traffic` is every byte asked for, by tensor; the floor moves `streams`, rows of logits or
    their gradient, once.

    `logits` are those of the streams, `small` all others; a small number that every thread of a
    block reads counts once a thread.
    """
    stream = BYTES_ROWS * vocab * itemsize
    logits, total = sum(traffic[name] for name in streams), sum(traffic.values())
    return {
        "logits": logits,
        "small": total - logits,
        "floor": len(streams) * stream,
        "ratio": round(total / (len(streams) * stream), 3),
        "sweeps": [round(traffic[name] / stream, 3) for name in streams],
    }
