"""An operator's case table as the parameters of a ladder test: its subset for every run, the rest
for the full climb."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from _pytest.mark import ParameterSet

from pydistill.testing.cases import load


def ladder_cases(op: str, kinds: Collection[str] | None = None) -> list[ParameterSet]:
    return [
        pytest.param(
            case,
            id=case.id,
            marks=pytest.mark.ladder if "ladder" in case.marks else pytest.mark.ladder_full,
        )
        for case in load(op)
        if not case.marks & {"bench", "slow"} and (kinds is None or case.kind in kinds)
    ]
