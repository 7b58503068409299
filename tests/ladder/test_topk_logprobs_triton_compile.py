"""`topk_logprobs`' Triton kernels compiled for every target: no spills, 16-byte loads of rows."""

from __future__ import annotations

import pytest
import torch

from tools.ladder.dry_run import GATE, KernelReport, dry_run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = 64


def compiled(target: str, dtype: torch.dtype, vocab: int, k: int) -> list[KernelReport]:
    import pydistill.kernels.topk_logprobs as kernels

    z, ids = torch.empty(ROWS, vocab, dtype=dtype), torch.empty(ROWS, k).long()
    with dry_run(target) as log:
        kernels.topk_logprobs_fwd(
            z, k, 1.0, ids, torch.empty(ROWS, k), torch.empty(ROWS), torch.empty(ROWS)
        )
    return log.kernels


# Few candidates in groups, as many as fit into registers, too many; a row in registers, and one
# that is not.
@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "vocab", "k"),
    [
        pytest.param(BF16, 151936, 64, marks=pytest.mark.ladder),
        pytest.param(FP32, 16384, 50, marks=pytest.mark.ladder),
        pytest.param(FP16, 32000, 64, marks=pytest.mark.ladder_full),
        pytest.param(FP32, 151936, 512, marks=pytest.mark.ladder_full),
        pytest.param(BF16, 151936, 1000, marks=pytest.mark.ladder_full),
        pytest.param(FP32, 151936, 3000, marks=pytest.mark.ladder_full),
        pytest.param(BF16, 1024, 1, marks=pytest.mark.ladder_full),
        pytest.param(BF16, 16384, 50, marks=pytest.mark.ladder_full),
        pytest.param(FP32, 151936, 20000, marks=pytest.mark.ladder_full),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", GATE)
def test_compiles_without_spills(target: str, dtype: torch.dtype, vocab: int, k: int) -> None:
    reports = compiled(target, dtype, vocab, k)
    assert {r.kernel for r in reports} - {"_reduce_groups"} == {"_choose", "_write"}
    for report in reports:
        assert report.spills == 0, report
        assert report.resources.wide_loads >= (report.kernel != "_write"), report
        assert report.resources.atomics == 0, report
        assert report.shared <= 32768, report
