"""Every known way to break `token_logprob`'s Triton kernels is noticed."""

from __future__ import annotations

import pytest

from tools.ladder.mutants import token_logprob_triton as mutants
from tools.ladder.mutation import Mutant, assert_triton_mutants_die


def run(chosen: list[Mutant]) -> None:
    assert_triton_mutants_die("token_logprob.py", chosen, mutants.check_kernels)


@pytest.mark.ladder
@pytest.mark.slow
def test_a_mutant_dies() -> None:
    run([mutants.FORWARD[11]])


@pytest.mark.ladder_full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_all_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    run(mutants.PARTS[part])
