"""The roof of this machine, now and when it is quiet.

The roof is what plain torch reaches with the same threads: GB/s of an in-place add and of a copy
(buffers far beyond the caches; bytes read plus bytes written), GFLOP/s of `torch.mm` in fp32 and
bf16. The quiet roof is the best ever seen on this kind of machine, kept in the user's cache, so
that a run can tell that it was disturbed even if it was disturbed from its first moment to its
last. It only ever rises.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

UNITS = {"add": "GB/s", "copy": "GB/s", "mm_fp32": "GFLOP/s", "mm_bf16": "GFLOP/s"}
QUIET_SHARE = 0.85  # a roof below this share of the quiet one voids the run
_NUMEL = 1 << 25  # fp32: 128 MiB a buffer
_MM = 2048


@dataclass
class Roof:
    """One measurement; the keys are those of `UNITS`."""

    rates: dict[str, float]

    def __getitem__(self, metric: str) -> float:
        return self.rates[metric]

    def best_of(self, other: Roof) -> Roof:
        return Roof({m: max(rate, other[m]) for m, rate in self.rates.items()})


@dataclass
class Quiet:
    """The best roof known for `machine`; `first_seen`: metrics never measured before this run."""

    machine: str
    rates: dict[str, float]
    first_seen: list[str]


def _buffer(numel: int) -> torch.Tensor:
    """fp32 on huge pages where the system has them: on small ones the same machine, just as quiet,
    reaches 43 GB/s or 77, as the pages happen to lie."""
    memory = mmap.mmap(-1, 4 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not Linux, or a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def take(
    clock: Callable[[], float] = time.perf_counter,
    *,
    repeats: int = 12,
    numel: int = _NUMEL,
    mm: int = _MM,
) -> Roof:
    """The best of `repeats` with torch's current number of threads: about two seconds.

    bf16 products are measured on small matrices where those show that the processor has none: torch
    then takes a minute for the large ones.
    """
    a, b = _buffer(numel).zero_(), _buffer(numel).fill_(1.0)
    x, y, z = torch.randn(mm, mm), torch.randn(mm, mm), torch.empty(mm, mm)
    half = [m.bfloat16() for m in (x, y, z)]
    small = [m[: mm // 8, : mm // 8].contiguous() for m in half]

    def product(m: list[torch.Tensor]) -> tuple[float, Callable[[], object]]:
        return 2.0 * len(m[0]) ** 3, lambda: torch.mm(m[0], m[1], out=m[2])

    def rate(amount: float, run: Callable[[], object]) -> float:
        run()
        best = float("inf")
        for _ in range(repeats):
            start = clock()
            run()
            best = min(best, clock() - start)
        return amount / best / 1e9

    with torch.no_grad():
        rates = {
            "add": rate(12.0 * numel, lambda: a.add_(b)),
            "copy": rate(8.0 * numel, lambda: a.copy_(b)),
            "mm_fp32": rate(*product([x, y, z])),
        }
        few = rate(*product(small))
        slow = few < rates["mm_fp32"] / 4
        rates["mm_bf16"] = few if slow else rate(*product(half))
    return Roof(rates)


def machine() -> str:
    """The key of a quiet roof: CPU model, threads, and torch, whose kernels the roof is made of."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        fields["model name"] = platform.processor() or platform.machine()
    # A virtual machine may hide the model's number in its name; family, model and flags still tell.
    numbers = "/".join(fields.get(k, "?") for k in ("cpu family", "model", "stepping"))
    flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:6]
    return (
        f"{fields.get('model name', '?')} ({numbers}, flags {flags}), {os.cpu_count()} CPUs,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pydistill" / "roofs.json"


def update_quiet(seen: Roof, *, path: Path | None = None, key: str | None = None) -> Quiet:
    """Raises the stored quiet roof to `seen` where that is higher, and returns it."""
    path, key = path or cache_file(), key or machine()
    try:
        stored: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError):
        stored = {}
    known = stored.get(key, {})
    rates = {m: max(rate, known.get(m, 0.0)) for m, rate in seen.rates.items()}
    if rates != known:
        stored[key] = rates
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".json", delete=False
        ) as file:
            json.dump(stored, file, indent=1)
        os.replace(file.name, path)
    return Quiet(key, rates, sorted(set(rates) - set(known)))


def void_reasons(before: Roof, after: Roof, quiet: Quiet) -> list[str]:
    """One sentence for each roof below `QUIET_SHARE` of the quiet one."""
    return [
        f"{metric} {when} the run is {roof[metric]:.1f} {UNITS.get(metric, '')},"
        f" {roof[metric] / best:.0%} of the quiet {best:.1f}"
        for when, roof in (("before", before), ("after", after))
        for metric, best in quiet.rates.items()
        if not roof[metric] >= QUIET_SHARE * best
    ]
