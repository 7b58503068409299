"""The full ladder: every case and every mutant, and the record that it was climbed.

    rows = climb(None)   # None unless all tests marked ladder_full pass; minutes on two cores
    rows == records()    # {"cuda divergence proof": {"sources": "3f..", "cases": 351, ...}, ...}

The full ladder is every test function that has cases or mutants marked `ladder_full`, with all its
parameters; two functions run at a time. Those that passed are noted, so that a climb that was ended
goes on where it was, unless a source has changed. A record names by hash the sources of the kernels
and of their mutants, so that a changed kernel does not keep the proof of the old one, and those of
the reference and the table of cases, a change of which asks for the cases again but not for the
mutants; it counts both. The operator's own Python, by which the cases call either side, is in
neither hash: `make test` runs it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "ladder"
KERNELS = ROOT / "kernels"
MUTANTS = Path(__file__).with_name("mutants")
NOTES = ROOT / "build" / "ladder-passed.json"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m")


def climb(
    keys: set[str] | None, without_mutants: Collection[str] = ()
) -> dict[str, dict[str, Any]] | None:
    """Runs the full ladder's tests of the records `keys` (None: all), and of the records
    `without_mutants` all but those of mutants, and prints their reports; the records if all
    pass."""
    before = records()
    tests = [
        test
        for test in _test_functions()
        if keys is None
        or _concerns(test, keys)
        or (_concerns(test, without_mutants) and "mutants" not in test)
    ]
    notes = Notes(NOTES, fingerprint(everything()))

    def passes(test: str) -> bool:
        if test in notes:
            print(f"{test}: passed before", flush=True)
            return True
        if passed := _run(test):
            notes.add(test)
        return passed

    with ThreadPoolExecutor(2) as pool:
        passed = all(list(pool.map(passes, tests)))
    if records() != before:
        print("what the records name changed while the tests ran", file=sys.stderr)
        return None
    found = list(before) if keys is None else [*keys, *without_mutants]
    return {key: before[key] for key in found} if passed else None


class Notes:
    """The test functions that passed on sources of one fingerprint, in a file that is replaced as
    each is added."""

    def __init__(self, path: Path, sources: str) -> None:
        self._path, self._sources, self._lock = path, sources, threading.Lock()
        self._passed: list[str] = []
        try:
            kept = json.loads(path.read_text())
            if kept["sources"] == sources:
                self._passed = kept["passed"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or written half by another program

    def __contains__(self, test: str) -> bool:
        return test in self._passed

    def add(self, test: str) -> None:
        with self._lock:
            self._passed.append(test)
            self._path.parent.mkdir(exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"sources": self._sources, "passed": self._passed}, indent=1))
            os.replace(new, self._path)


def everything() -> set[Path]:
    """Every source that a test of the ladder may run."""
    found = set((ROOT / "tests").glob("*.py"))
    for folder in ("csrc", "kernels", "pydistill", "tests/ladder", "tests/support", "tools/ladder"):
        for suffix in ("py", "cu", "cuh", "h", "cpp", "toml"):
            found |= set((ROOT / folder).rglob(f"*.{suffix}"))
    return found


def same_kernels(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether `old` says of the kernels and mutants of `new` that they have climbed."""
    if old is None or not old.get("climbed", True):
        return False
    return all(old[name] == new[name] for name in ("sources", "mutants"))


def deferred(record: dict[str, Any]) -> dict[str, Any]:
    """The record of kernels that have not climbed yet."""
    return {**record, "climbed": False}


def _concerns(test: str, keys: Collection[str]) -> bool:
    """Whether a test function is of one of these records' kernels, or of the ladder itself."""
    from pydistill._registry import OPERATORS

    stem = Path(test.partition("::")[0]).stem
    of = [key for op in OPERATORS for key in (f"triton {op} proof", f"cuda {op} proof")
          if stem.startswith("test_{1}_{0}".format(*key.split()))]  # fmt: skip
    return not of or bool(set(keys) & set(of))


def _test_functions() -> list[str]:
    command = [*PYTEST, "ladder_full", "--collect-only", str(TESTS)]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tests = (line.partition("[")[0] for line in listing.splitlines() if "::" in line)
    return list(dict.fromkeys(tests))


def _run(test: str) -> bool:
    start = time.monotonic()
    command = [*PYTEST, "ladder or ladder_full", test]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    report = done.stdout.splitlines()[-1:] if done.returncode == 0 else [done.stdout, done.stderr]
    print(f"{test}, {time.monotonic() - start:.0f} s:", *report, flush=True)
    return done.returncode == 0


def records() -> dict[str, dict[str, Any]]:
    """What a full climb of the present sources proves, for every operator with mutants."""
    import pydistill  # noqa: F401  declares the operators
    from pydistill._registry import OPERATORS
    from pydistill.testing.cases import load
    from tools.ladder.cuda.sim import CSRC, source_closure

    rows = {}
    for op in OPERATORS:
        for backend in ("triton", "cuda"):
            if not (MUTANTS / f"{op}_{backend}.py").exists():
                continue
            if backend == "triton":
                sources = [KERNELS / f"{op}.py", *KERNELS.glob(f"{op}_*.py")]
                sources += (KERNELS / "_common").glob("*.py")
            else:
                sources = source_closure(CSRC / "cuda" / f"{op}.cu", [CSRC])
            checks = [MUTANTS / f"{op}_{part}.py" for part in (backend, "check")]
            parts = importlib.import_module(f"tools.ladder.mutants.{op}_{backend}").PARTS
            rows[f"{backend} {op} proof"] = {
                "sources": fingerprint([*sources, *filter(Path.exists, checks)]),
                "definition": fingerprint(definition(op)),
                "cases": sum(not case.marks & {"slow", "bench"} for case in load(op)),
                "mutants": {name: len(mutants) for name, mutants in parts.items()},
            }
    return rows


def definition(op: str) -> set[Path]:
    """The files that say what the operator's kernels have to compute: its table of cases, the
    checker, its reference, and every other reference that these or the operator's module import."""
    folders = ("pydistill.reference", "pydistill.testing")
    of_op = f"pydistill.ops.{op}"
    waiting, found = [of_op, f"pydistill.reference.{op}", f"pydistill.testing.cases.{op}"], set()
    while waiting:
        name = waiting.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(folders):
                waiting += [f"{node.module}", *(f"{node.module}.{x.name}" for x in node.names)]
    return found - {ROOT / "pydistill" / "ops" / f"{op}.py"}


def fingerprint(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
