"""`topk_divergence`'s Triton kernels compiled for every target: no spills, 16-byte loads and stores
where a row is swept."""

from __future__ import annotations

import pytest
import torch

from pydistill.reference.divergence import KINDS
from pydistill.reference.topk_divergence import SAVED, TAILS, TOPK_KINDS, Options
from tools.ladder.dry_run import GATE, KernelReport, dry_run

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, VOCAB = 64, 32000
SWEEPS = {"_outside_sums", "_outside_gradient"}
# The demanding kind on every target; the full ladder takes all of them.
QUICK = [("jsd", "bucket", target) for target in GATE]


def compiled(
    kind: str, tail: str, target: str, dtype: torch.dtype, *, slots: int = 64, full: bool = True
) -> list[KernelReport]:
    """Reports of forward and backward; `full`: with every option on."""
    import pydistill.kernels.topk_divergence as kernels

    s, ids = torch.empty(ROWS, VOCAB, dtype=dtype), torch.zeros(ROWS, slots, dtype=torch.int64)
    log_p, loss, saved = torch.empty(ROWS, slots), torch.empty(ROWS), torch.empty(ROWS, SAVED)
    tail_mass = torch.empty(ROWS) if tail == "bucket" else None
    counted, params = (torch.ones(ROWS).bool(), torch.ones(ROWS, 2)) if full else (None, None)
    options = Options(KINDS[kind].id, TAILS[tail], 1.0, 0.5, full)
    with dry_run(target) as log:
        kernels.topk_divergence_fwd(
            s, ids, log_p, tail_mass, counted, params, *options, loss, saved
        )
        kernels.topk_divergence_bwd(s, ids, log_p, tail_mass, params, saved, loss, *options, s)
    return log.kernels


def assert_lean(reports: list[KernelReport]) -> None:
    assert {r.kernel for r in reports} == {
        *SWEEPS, "_topk_divergence_forward", "_support_gradient", "_place",
    }  # fmt: skip
    for report in reports:
        resources = report.resources
        assert report.spills == 0, report
        assert resources.wide_loads >= (report.kernel in SWEEPS), report
        assert resources.wide_stores >= (report.kernel == "_outside_gradient"), report
        assert resources.atomics == 0, report
        assert report.shared <= 512, report


@pytest.mark.ladder
@pytest.mark.triton
@pytest.mark.parametrize(("kind", "tail", "target"), QUICK)
def test_a_kind_compiles_without_spills(kind: str, tail: str, target: str) -> None:
    assert_lean(compiled(kind, tail, target, BF16))


@pytest.mark.ladder_full
@pytest.mark.triton
@pytest.mark.parametrize(("dtype", "slots"), [(FP32, 2048), (BF16, 32)], ids=str)
@pytest.mark.parametrize("target", GATE)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_every_kind_compiles_without_spills(
    kind: str, tail: str, target: str, dtype: torch.dtype, slots: int
) -> None:
    assert_lean(compiled(kind, tail, target, dtype, slots=slots, full=dtype == FP32))
