"""Peak extra memory of a contestant: the resident high-water mark of a process that does nothing
else.

The process sets the contestant up, runs it once (compilation, thread pools and kept workspaces
belong to that run), resets the high-water mark, runs it again, and reports how far the mark rose
above what was resident before, and how many bytes of that the run returned: gradients, which every
contestant must make, unless it writes them over memory that was there. glibc is told to return
every block above 64 KiB at once, so that no buffer of the first run hides the second's.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(
    op: str, case: str, contestant: str, *, quick: bool, threads: int | None
) -> dict[str, Any]:
    """Runs one contestant in a fresh process: bytes `peak`, `returned` and `kept`."""
    arguments = [op, case, contestant, str(int(quick)), str(threads or 0)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=ROOT, env={**os.environ, **_MALLOC}, capture_output=True, text=True,
    )  # fmt: skip
    row: dict[str, Any] = {"case": case, "contestant": contestant}
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-1] if done.stderr else "killed"}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (high-water mark) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(op: str, case: str, contestant: str, quick: bool, threads: int) -> dict[str, int]:
    import torch

    from pydistill.ops import _memory

    if threads:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"benchmarks.bench_{op}")
    found = next(c for c in module.cases(quick=quick) if c.name == case)
    inputs = found.inputs()
    step = next(c for c in found.contestants if c.name == contestant).setup(inputs)
    step.refresh()
    gc.collect()
    start = resident("VmRSS")
    step.run()
    gc.collect()
    _memory.release()  # the first run's blocks, which would hide the second's
    step.refresh()
    reset_high_water()
    there = set(storages(gc.get_objects()))
    before = resident("VmRSS")
    output = step.run()
    peak = resident("VmHWM") - before
    made = {at: size for at, size in storages(flat(output)).items() if at not in there}
    return {
        "peak": max(0, peak),
        "returned": sum(made.values()),
        "kept": max(0, before - start),
    }


def storages(objects: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of the memory of the tensors among `objects`."""
    import torch

    found = {}
    for x in objects:
        if issubclass(type(x), torch.Tensor):  # by its type: asking an object wakes lazy proxies
            with suppress(RuntimeError, NotImplementedError):  # the compiler's tensors have none
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return found


def flat(output: Any) -> Iterator[Any]:
    """The leaves of what a step returned: tuples and lists of them, at any depth."""
    if isinstance(output, tuple | list):
        for part in output:
            yield from flat(part)
    else:
        yield output


if __name__ == "__main__":
    op, case, contestant, quick, threads = sys.argv[1:]
    print(json.dumps(measure_here(op, case, contestant, bool(int(quick)), int(threads))))
