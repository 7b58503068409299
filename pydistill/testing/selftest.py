"""Runs the tables of cases on the devices and backends of this machine, a group at a time.

A group is one kind of one operator on one backend: what a user reads as one line. A case that
raises has failed like one that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pydistill import _registry
from pydistill.testing.case import Case, check, expected
from pydistill.testing.cases import load

_HEAVY = frozenset({"slow", "bench"})


@dataclass(frozen=True)
class Group:
    """`worst`: the largest error over what is allowed; `failures`: one sentence a failed case."""

    op: str
    device: str
    backend: str
    kind: str
    cases: int
    worst: float
    failures: list[str]


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def groups(ops: Sequence[str], *, heavy: bool = False) -> Iterator[Group]:
    """One `Group` after the other, as they finish; `heavy` adds the cases that take seconds."""
    for op in ops:
        cases = [case for case in load(op) if heavy or not case.marks & _HEAVY]
        for kind in dict.fromkeys(case.kind for case in cases):
            todo = [(device, backend) for device in devices() for backend in _registry.BACKENDS]
            found = {place: _Tally() for place in todo}
            for case in (case for case in cases if case.kind == kind):
                able = [place for place in todo if _serves(case, *place)]
                _try(case, {place: found[place] for place in able})
            for (device, backend), tally in found.items():
                if tally.cases:
                    yield Group(op, device, backend, kind, tally.cases, tally.worst, tally.failures)


class _Tally:
    def __init__(self) -> None:
        self.cases, self.worst = 0, 0.0
        self.failures: list[str] = []


def _serves(case: Case, device: str, backend: str) -> bool:
    try:
        for dtype in case.dtypes:
            _registry.resolve(case.op, backend, device, dtype, case.kind)
    except ValueError:
        return False
    return True


def _try(case: Case, places: dict[tuple[str, str], _Tally]) -> None:
    """Checks one case everywhere, against a truth that is computed once."""
    want = expected(case)
    for (device, backend), tally in places.items():
        tally.cases += 1
        try:
            report = check(case, backend, device, want=want)
        except Exception as error:
            tally.worst = float("inf")
            tally.failures.append(f"{case.op}[{case.id}] impl={backend}: {error!r}")
            continue
        tally.worst = max(tally.worst, *report.errors.values())
        if not report.ok:
            tally.failures.append(report.message)
