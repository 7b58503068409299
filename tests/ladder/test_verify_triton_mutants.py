"""Every known way to break `verify`'s Triton kernels is noticed."""

from __future__ import annotations

import pytest

from tools.ladder.mutants import verify_triton as mutants
from tools.ladder.mutation import KERNELS, Mutant, assert_triton_mutants_die

FILES = {"rows": ("verify_rows.py", mutants.check_rows)}


def run(part: str, chosen: list[Mutant]) -> None:
    file, check = FILES.get(part, ("verify.py", mutants.check_kernels))
    assert_triton_mutants_die(file, chosen, check)


@pytest.mark.ladder
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_mutants_apply(part: str) -> None:
    """A change of the kernels is a change of their mutants too; running these takes minutes."""
    text = (KERNELS / FILES.get(part, ("verify.py",))[0]).read_text()
    assert len({mutant.apply(text) for mutant in mutants.PARTS[part]}) == len(mutants.PARTS[part])


@pytest.mark.ladder_full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_all_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    run(part, mutants.PARTS[part])
