"""`token_logprob`'s Triton kernels compiled for every target: no spills, 16-byte accesses."""

from __future__ import annotations

import pytest
import torch

from pydistill.reference.token_logprob import SAVED
from tools.ladder.dry_run import GATE, KernelReport, dry_run

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, VOCAB = 64, 32000


def compiled(target: str, dtype: torch.dtype, *, full: bool) -> list[KernelReport]:
    """Reports of forward and backward; `full`: with a mask and a temperature a row."""
    import pydistill.kernels.token_logprob as kernels

    z, ids, row = torch.empty(ROWS, VOCAB, dtype=dtype), torch.zeros(ROWS).long(), torch.ones(ROWS)
    counted, params = (row > 0, row) if full else (None, None)
    saved = torch.empty(ROWS, SAVED)
    with dry_run(target) as log:
        kernels.token_logprob_fwd(z, ids, counted, params, 1.0, row, row, saved)
        kernels.token_logprob_bwd(z, ids, params, saved, row, row, 1.0, z)
    return log.kernels


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "full"),
    [
        pytest.param(BF16, True, marks=pytest.mark.ladder),
        pytest.param(FP32, True, marks=pytest.mark.ladder_full),
        pytest.param(BF16, False, marks=pytest.mark.ladder_full),
        pytest.param(FP32, False, marks=pytest.mark.ladder_full),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", GATE)
def test_compiles_without_spills(target: str, dtype: torch.dtype, full: bool) -> None:
    reports = compiled(target, dtype, full=full)
    assert {r.kernel for r in reports} == {"_token_logprob_forward", "_token_logprob_backward"}
    for report in reports:
        assert report.spills == 0, report
        assert report.resources.wide_loads >= 1, report
        assert report.resources.wide_stores >= (report.kernel == "_token_logprob_backward"), report
        assert report.resources.atomics == 0, report
        assert report.shared <= 512, report
