"""The row kernels as the driver of the operators from hidden states launches them, compiled for
every target: no spills, and 16-byte accesses in its tiles too, whatever the vocabulary's size."""

from __future__ import annotations

import pytest
import torch

from pydistill import _registry
from pydistill.ops import _linear_head as linear
from pydistill.reference.divergence import KINDS, SAVED
from tools.ladder.dry_run import GATE, KernelReport, dry_run

ROWS, BLOCK_ROWS, HIDDEN = 9, 5, 8  # two blocks, the second not at a multiple of four rows


def compiled(kind: str, target: str, vocab: int, *, full: bool) -> list[KernelReport]:
    """Reports of forward, backward and both at once; `full`: with every option on."""
    weight = (torch.empty(vocab, HIDDEN), None)
    hidden, ones = torch.empty(ROWS, HIDDEN), torch.ones(ROWS)
    labels, params = (ones.long(), torch.ones(ROWS, 3)) if full else (None, None)
    tensors = (hidden, *weight, None, hidden, *weight, labels, params)
    numbers = (1.0, 0.0, 1.0, 0.0, KINDS[kind].id, 1.0, 0.3, 0.6, full, *([0.1 * full] * 2), vocab)
    loss, saved = torch.empty(ROWS), torch.empty(ROWS, SAVED)
    grads = (torch.empty_like(hidden), torch.empty_like(weight[0]), torch.empty(0))
    fwd, bwd, both = (
        _registry.overload(f"linear_divergence_{name}", "triton")
        for name in ("fwd", "bwd", "gradients")
    )
    with pytest.MonkeyPatch.context() as patch, dry_run(target) as log:
        patch.setattr(linear, "BLOCK_ROWS", BLOCK_ROWS)
        fwd(*tensors, *numbers, loss, saved)
        bwd(*tensors, saved, ones, *numbers, *grads)
        both(*tensors, ones, *numbers, loss, *grads)
    return log.kernels


# 151936 columns are 74 tiles and a part: even parts of it would be rows of 2025 and 2026 numbers.
@pytest.mark.triton
@pytest.mark.parametrize(
    ("kind", "vocab", "full"),
    [
        pytest.param("jsd", 151936, True, marks=pytest.mark.ladder),
        pytest.param("jsd", 151936, False, marks=pytest.mark.ladder_full),
        pytest.param("adaptive_kl", 32000, True, marks=pytest.mark.ladder_full),
    ],
)
@pytest.mark.parametrize("target", GATE)
def test_compiles_without_spills(kind: str, vocab: int, full: bool, target: str) -> None:
    reports = compiled(kind, target, vocab, full=full)
    assert {r.kernel for r in reports} == {"_divergence_forward", "_divergence_backward"}
    for report in reports:
        assert report.spills == 0, report
        assert report.resources.wide_loads >= 2, report
        assert report.resources.wide_stores >= (report.kernel == "_divergence_backward"), report
        assert report.resources.atomics == 0, report
        assert report.shared <= 4096, report


@pytest.mark.ladder
@pytest.mark.parametrize("vocab", [1, 50257, 32000, 128256, 151936, 262144])
def test_tiles_are_cut_where_wide_words_begin(vocab: int) -> None:
    tiles = list(linear.column_tiles(vocab))
    assert [i for t in tiles for i in (t.start, t.stop)][1:-1:2] == [t.start for t in tiles[1:]]
    assert tiles[0].start == 0 and tiles[-1].stop == vocab
    assert len(tiles) == -(-vocab // linear.TILE_COLUMNS)
    assert all(t.start % 16 == 0 and 0 < t.stop - t.start <= linear.TILE_COLUMNS for t in tiles)
