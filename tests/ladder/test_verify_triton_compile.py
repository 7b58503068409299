"""`verify`'s Triton kernels compiled for every target: no spills, 16-byte loads of rows."""

from __future__ import annotations

import pytest
import torch

from pydistill.reference.verify import LENIENCES, METHODS
from tools.ladder.dry_run import GATE, KernelReport, dry_run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH, SLOTS, VOCAB, SUPPORT = 8, 4, 151936, 64
READS_ROWS = ("_reduce_blocks", "_finish_rows", "_compare", "_sample")


def compiled(target: str, dtype: torch.dtype, method: str, lenience: str, draft: str,
             biased: bool) -> list[KernelReport]:  # fmt: skip
    import pydistill.kernels.verify as kernels

    whole = lambda *shape: torch.zeros(shape, dtype=torch.int64)
    sizes = {"dense": VOCAB, "sparse": SUPPORT, "none": 0}
    q = torch.empty(BATCH, SLOTS, sizes[draft], dtype=dtype)
    support = torch.arange(SUPPORT).expand(BATCH, SLOTS, -1) if draft == "sparse" else None
    rows, drafted = (BATCH, SLOTS + 1), (BATCH, SLOTS)
    with dry_run(target) as log:
        kernels.verify_fwd(
            torch.empty(*rows, VOCAB, dtype=dtype), None if draft == "none" else q, whole(*drafted),
            whole(1), torch.ones(1, 8, dtype=torch.float64), whole(1), whole(BATCH),
            torch.empty(1, VOCAB) if biased else None, None, support, METHODS.index(method),
            LENIENCES.index(lenience), 0.3, 0.1, False, whole(*rows), whole(BATCH),
            torch.empty(rows), torch.empty(drafted), torch.empty(drafted), torch.empty(rows),
            torch.empty(drafted), whole(*rows).int(), whole(*drafted),
        )  # fmt: skip
    return log.kernels


@pytest.mark.triton
@pytest.mark.ladder_full
@pytest.mark.parametrize(
    ("dtype", "method", "lenience", "draft", "biased"),
    [
        (BF16, "token", "none", "dense", False),
        (FP32, "block", "none", "dense", True),
        (FP16, "typical", "none", "sparse", False),
        (BF16, "token", "exponential", "dense", False),
        (BF16, "token", "tv_budget", "none", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", GATE)
def test_compiles_without_spills(
    target: str, dtype: torch.dtype, method: str, lenience: str, draft: str, biased: bool
) -> None:
    reports = compiled(target, dtype, method, lenience, draft, biased)
    assert {r.kernel for r in reports} == {*READS_ROWS, "_walk", "_decide"}
    for report in reports:
        assert report.spills == 0, report
        assert report.resources.wide_loads >= (report.kernel in READS_ROWS), report
        assert report.resources.atomics == 0, report
        assert report.shared <= 32768, report
