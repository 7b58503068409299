"""What the fused loss saves on given logits: time and peak memory against eager PyTorch.

Each way computes mean forward KL and its gradient. Times come from this process, one way after the
other in turn, so that a disturbance meets all of them; what a call allocates is freed inside its
time, as in a training step. Memory comes from a fresh process a way (`python -m
pydistill.recipes.compare`): the rise of the resident high-water mark above what was there before
the call, with the gradient still held. It is None where the system does not report one.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pydistill

Loss = Callable[[Tensor, Tensor], Tensor]


def _eager(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _overwriting(student: Tensor, teacher: Tensor) -> Tensor:
    return pydistill.divergence(student, teacher, overwrite_logits=True)


WAYS: dict[str, Loss] = {
    "eager PyTorch": _eager,
    "pydistill": pydistill.divergence,
    "pydistill, overwrite_logits": _overwriting,
}


@dataclass(frozen=True)
class Measurement:
    """One way: seconds of forward and backward, bytes above the inputs, and the loss it found."""

    way: str
    minimum: float
    median: float
    peak_bytes: int | None
    loss: float


def compare(student: Tensor, teacher: Tensor, rounds: int = 5) -> list[Measurement]:
    """Measures every way on logits `[rows, V]`, which are left as they were."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    scratch = student.detach().clone()
    for round_ in range(rounds + 1):
        for way, loss in WAYS.items():
            scratch.copy_(student)
            start = time.perf_counter()
            losses[way] = _step(loss, scratch, teacher)
            if round_:  # the first one warms up
                seconds[way].append(time.perf_counter() - start)
    peaks = _peaks(student, teacher)
    return [
        Measurement(way, min(s), statistics.median(s), peaks[way], losses[way])
        for way, s in seconds.items()
    ]


def _step(loss: Loss, logits: Tensor, teacher: Tensor) -> float:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, teacher)
    value.backward()
    return value.item()


def _peaks(student: Tensor, teacher: Tensor) -> dict[str, int | None]:
    # glibc returns blocks above the threshold at once, so no freed buffer hides a later one.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory(prefix="pydistill-") as folder:
        torch.save((student.detach(), teacher.detach()), Path(folder) / "logits.pt")
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, "-m", __name__, folder, way, str(torch.get_num_threads())],
                env={**os.environ, **malloc},
                capture_output=True,
                text=True,
            )
            peaks[way] = json.loads(done.stdout) if done.returncode == 0 else None
    return peaks


def _peak_here(folder: str, way: str) -> int:
    student, teacher = torch.load(Path(folder) / "logits.pt")
    few = student[:2].clone()
    _step(WAYS[way], few, teacher[:2])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = _resident("VmRSS")
    _step(WAYS[way], student, teacher)
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_peak_here(*sys.argv[1:3])))
