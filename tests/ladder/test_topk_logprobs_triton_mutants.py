"""Every known way to break `topk_logprobs`' Triton kernels is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.ladder.mutants import topk_logprobs_triton as mutants
from tools.ladder.mutation import Mutant, assert_all_killed, run_mutants

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "topk_logprobs.py"


def run(chosen: list[Mutant]) -> None:
    name = "pydistill.kernels.topk_logprobs"
    assert_all_killed(run_mutants(KERNELS, chosen, mutants.check_kernels, module_name=name))


@pytest.mark.ladder
def test_some_mutants_die() -> None:
    run([mutants.CHOICE[2], mutants.RESULTS[0]])


@pytest.mark.ladder_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_all_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    run(mutants.PARTS[part])
