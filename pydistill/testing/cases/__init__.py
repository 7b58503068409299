"""One module an operator: `CASES`, and how to run one and what is right (`run`, `truth`)."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pydistill.testing.case import Case


def names() -> list[str]:
    """The operators that have a table."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def module(op: str) -> Any:
    """The table's module: `CASES`, `run(case, inputs, impl, seed)`, `truth(case, inputs, seed)`."""
    if op not in names():
        raise ValueError(f"op={op!r} has no table of cases; use one of {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{op}")


def load(op: str, mark: str | None = None) -> list[Case]:
    """The cases of operator `op`; with `mark`, those that carry it."""
    cases: list[Case] = module(op).CASES
    return [case for case in cases if mark is None or mark in case.marks]
