"""`divergence`'s Triton kernels compiled for every target: no spills, 16-byte loads and stores."""

from __future__ import annotations

import pytest
import torch

from pydistill.reference.divergence import KINDS, Options
from tools.ladder.dry_run import GATE, KernelReport, dry_run

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, VOCAB, LONG = 64, 32000, 151936
BARE, FULL = "bare", "full"
# The demanding kinds and the common one; the full ladder takes all of them.
QUICK = [("forward_kl", "sm_90"), ("adaptive_kl", "sm_80"), ("alpha_beta", "gfx942")]


def compiled(
    kind: str,
    target: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    scope: str,
    vocab: int = VOCAB,
) -> list[KernelReport]:
    """Reports of forward, backward and, in full scope with every option on, backward by pairs."""
    import pydistill.kernels.divergence as kernels

    s, t = (torch.empty(ROWS, vocab, dtype=d) for d in dtypes)
    loss, saved, index = torch.empty(ROWS), torch.empty(ROWS, 8), torch.arange(ROWS)
    if scope == BARE:
        options = Options(KINDS[kind].id, 1.0, 0.3, 0.6, False, 0.0, 0.0, vocab)
        rows = counted = labels = params = None
        stats = saved[:0]
    else:
        options = Options(KINDS[kind].id, 2.0, 0.3, 0.6, True, 0.3, 0.01, vocab)
        rows, labels, counted = index, index, index > 0
        params, stats = torch.empty(ROWS, 3), torch.empty(ROWS, 6)
    with dry_run(target) as log:
        kernels.divergence_fwd(
            s, t, rows, rows, counted, labels, params, *options, loss, saved, stats
        )
        kernels.divergence_bwd(
            s, t, None, rows, None, None, labels, params, saved, loss, *options, s
        )  # fmt: skip
        if scope == FULL:
            start = torch.arange(ROWS + 1)
            kernels.divergence_bwd(
                s, t, rows, rows, start, index, labels, params, saved, loss, *options, s
            )  # fmt: skip
    return log.kernels


def assert_lean(reports: list[KernelReport]) -> None:
    assert {r.kernel for r in reports} == {"_divergence_forward", "_divergence_backward"}
    for report in reports:
        resources = report.resources
        assert report.spills == 0, report
        assert resources.wide_loads >= 2, report
        if report.kernel == "_divergence_backward":
            assert resources.wide_stores >= 1, report
        assert resources.atomics == 0, report
        assert report.shared <= 8192, report  # mixed dtypes exchange a block between layouts


@pytest.mark.ladder
@pytest.mark.triton
@pytest.mark.parametrize(("kind", "target"), QUICK)
def test_some_kinds_compile_without_spills(kind: str, target: str) -> None:
    assert_lean(compiled(kind, target, (FP32, BF16), FULL))


@pytest.mark.ladder_full
@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtypes", "scope"), [((FP32, FP32), FULL), ((BF16, BF16), FULL), ((BF16, BF16), BARE)], ids=str
)
@pytest.mark.parametrize("target", GATE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_compiles_without_spills(
    kind: str, target: str, dtypes: tuple[torch.dtype, torch.dtype], scope: str
) -> None:
    assert_lean(compiled(kind, target, dtypes, scope))


@pytest.mark.ladder_full
@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtypes", "scope"), [((FP32, FP32), FULL), ((BF16, BF16), FULL), ((BF16, BF16), BARE)], ids=str
)
@pytest.mark.parametrize("target", GATE)
def test_adaptive_kl_of_rows_that_are_not_kept_compiles_without_spills(
    target: str, dtypes: tuple[torch.dtype, torch.dtype], scope: str
) -> None:
    assert_lean(compiled("adaptive_kl", target, dtypes, scope, LONG))
