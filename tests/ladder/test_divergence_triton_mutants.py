"""Every known way to break `divergence`'s Triton kernels is noticed."""

from __future__ import annotations

import pytest

from tools.ladder.mutants import divergence_triton as mutants
from tools.ladder.mutation import Mutant, assert_triton_mutants_die

CHECKS = {"divergence.py": mutants.check_kernels, "_common/head.py": mutants.check_searches}


def run(file: str, chosen: list[Mutant]) -> None:
    assert_triton_mutants_die(file, chosen, CHECKS.get(file, mutants.check_functions))


@pytest.mark.ladder
@pytest.mark.slow
def test_some_mutants_die() -> None:
    run("divergence.py", [mutants.FORWARD[4], mutants.BACKWARD[4]])


@pytest.mark.ladder_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("divergence.py", mutants.FORWARD),
        ("divergence.py", mutants.BACKWARD),
        ("_common/divergences.py", mutants.KINDS),
        ("_common/head.py", mutants.HEAD),
        ("_common/numerics.py", mutants.NUMERICS),
    ],
    ids=["forward", "backward", "kinds", "head", "numerics"],
)
def test_all_mutants_die(file: str, chosen: list[Mutant]) -> None:
    assert len(chosen) >= 10 or file.endswith("numerics.py")
    run(file, chosen)
