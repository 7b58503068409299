"""Every known way to break `verify`'s Triton kernels is noticed."""

from __future__ import annotations

import pytest

from tools.ladder.mutants import verify_triton as mutants
from tools.ladder.mutation import KERNELS, assert_triton_mutants_die

FILES = dict.fromkeys(mutants.PARTS, "verify.py") | {"rows": "verify_rows.py"}


@pytest.mark.ladder
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_mutants_apply(part: str) -> None:
    """A change of the kernels is a change of their mutants too; running these takes minutes."""
    text = (KERNELS / FILES[part]).read_text()
    assert len({mutant.apply(text) for mutant in mutants.PARTS[part]}) == len(mutants.PARTS[part])


@pytest.mark.ladder_full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_all_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    check = getattr(mutants, f"check_{part}")
    assert_triton_mutants_die(FILES[part], mutants.PARTS[part], check)
