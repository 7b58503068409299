"""Every known way to break `topk_divergence`'s Triton kernels is noticed."""

from __future__ import annotations

import pytest

from tools.ladder.mutants import topk_divergence_triton as mutants
from tools.ladder.mutation import Mutant, assert_triton_mutants_die


def run(chosen: list[Mutant]) -> None:
    assert_triton_mutants_die("topk_divergence.py", chosen, mutants.check_kernels)


@pytest.mark.ladder
@pytest.mark.slow
def test_a_mutant_dies() -> None:
    run([mutants.CELLS[0]])


@pytest.mark.ladder_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_all_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    run(mutants.PARTS[part])
