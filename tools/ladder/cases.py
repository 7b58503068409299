"""An operator's case table as the parameters of a ladder test: a subset for every run, the rest for
the full climb.

The subset covers the cases that the table marks as small enough for emulated GPUs: every sort of
input once ("odd", "poisoned", ...), and every variant once (a kind, a tail, a dtype), with no two
cases where one will do.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import pytest
from _pytest.mark import ParameterSet

from pydistill.testing import Case
from pydistill.testing.cases import load

# [<kind>-[<tail>-]]<sort>-<dtypes>-<shape>
ID = re.compile(r"(?P<variant>(?:\w+-)*?)(?P<sort>\w+)-(?P<dtypes>(?:fp|bf)\d[^-]*)-.*")


def emulated(op: str) -> list[Case]:
    """The cases of the full climb."""
    return [case for case in load(op) if not case.marks & {"bench", "slow"}]


def covering(op: str) -> list[Case]:
    """The subset of every run."""
    chosen: list[Case] = []
    seen: set[str] = set()
    for case in load(op, "ladder"):
        found = ID.fullmatch(case.id)
        assert found is not None, f"{case.id!r} has no sort of input before its dtype"
        new = {found["sort"], found["variant"] + found["dtypes"]} - seen
        if new:
            chosen.append(case)
            seen |= new
    return chosen


def ladder_cases(op: str, kinds: Collection[str] | None = None) -> list[ParameterSet]:
    quick = {case.id for case in covering(op)}
    return [
        pytest.param(
            case,
            id=case.id,
            marks=pytest.mark.ladder if case.id in quick else pytest.mark.ladder_full,
        )
        for case in emulated(op)
        if kinds is None or case.kind in kinds
    ]
