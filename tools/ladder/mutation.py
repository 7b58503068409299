"""Mutation testing: break a kernel in known ways and see that its check notices.

    def check(source: Path) -> None:           # raises when the kernel is wrong
        ...

    outcomes = run_mutants("csrc/cuda/divergence.cu",
                           [Mutant("start < n", "start <= n"), Mutant("-INFINITY", "0.0f", 1)],
                           check)
    assert_all_killed(outcomes)

Each mutant is one textual substitution in a temporary copy. The check is a top-level function: for
a `.py` source (a Triton kernel) it gets the copy imported as a module, with TRITON_INTERPRET=1; for
anything else the copy's path. It may also be a command, a list of words of which "{source}" is
replaced by that path. The untouched source is checked first and must pass.

A worker process imports the check once and forks for every mutant, so that mutants that hang, crash
or corrupt memory harm nobody; both count as killed. A mutant that does not compile or import proves
nothing: it is reported as invalid and fails `assert_all_killed` like a survivor.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
KILLED, SURVIVED, INVALID = "killed", "survived", "invalid"
INVALID_ERRORS = ("CudaBuildError", "SyntaxError", "IndentationError")


@dataclass(frozen=True)
class Mutant:
    """Replaces `old` by `new`. Several matches need an `occurrence`, counted from 0."""

    old: str
    new: str
    occurrence: int | None = None

    def apply(self, text: str) -> str:
        starts = [match.start() for match in re.finditer(re.escape(self.old), text)]
        if not starts or (self.occurrence is None and len(starts) > 1):
            raise ValueError(
                f"{self.old!r} occurs {len(starts)} times; it must occur once or name an occurrence"
            )
        if self.occurrence is not None and not 0 <= self.occurrence < len(starts):
            raise ValueError(
                f"occurrence {self.occurrence} of {self.old!r} asked for, there are {len(starts)}"
            )
        if self.old == self.new:
            raise ValueError(f"the mutant replaces {self.old!r} by itself")
        start = starts[self.occurrence or 0]
        return text[:start] + self.new + text[start + len(self.old) :]

    def __str__(self) -> str:
        which = "" if self.occurrence is None else f" (occurrence {self.occurrence})"
        return f"{self.old!r} -> {self.new!r}{which}"


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    verdict: str  # killed, survived or invalid
    detail: str  # the error that killed it
    seconds: float


def run_mutants(
    source: str | os.PathLike[str],
    mutants: Sequence[Mutant],
    check: Callable[[Any], None] | Sequence[str],
    *,
    module_name: str | None = None,
    timeout: float = 120.0,
) -> list[Outcome]:
    """Runs `check` on the source, which must pass, then on every mutant.

    `module_name` imports the copies of a `.py` source under that name, so that code which imports
    the kernel by name meets the mutant. `timeout` is seconds a mutant.
    """
    path = Path(source)
    text = path.read_text()
    texts = [text, *(mutant.apply(text) for mutant in mutants)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = []
        for number, mutated in enumerate(texts):
            copy = Path(folder) / str(number) / path.name
            copy.parent.mkdir()
            copy.write_text(mutated)
            copies.append(str(copy))
        job = {
            "copies": copies,
            "check": _describe_check(check),
            "module_name": module_name or f"mutant_{path.stem}",
            "timeout": timeout,
        }
        results = _run_worker(job, Path(folder), interpret=path.suffix == ".py")
    if results[0][0] != SURVIVED:
        raise RuntimeError(f"the check fails on the untouched {path.name}: {results[0][1]}")
    return [
        Outcome(mutant, verdict, detail, seconds)
        for mutant, (verdict, detail, seconds) in zip(mutants, results[1:], strict=True)
    ]


def assert_all_killed(outcomes: Sequence[Outcome]) -> None:
    alive = [outcome for outcome in outcomes if outcome.verdict != KILLED]
    if alive:
        lines = [f"  {o.verdict}: {o.mutant} {o.detail}".rstrip() for o in alive]
        raise AssertionError(
            f"{len(alive)} of {len(outcomes)} mutants were not killed:\n" + "\n".join(lines)
        )


def assert_triton_mutants_die(
    file: str, mutants: Sequence[Mutant], check: Callable[[Any], None]
) -> None:
    """`file` is below kernels/; its mutants go by the name that the launchers import."""
    name = f"pydistill.kernels.{file.removesuffix('.py').replace('/', '.')}"
    assert_all_killed(run_mutants(KERNELS / file, mutants, check, module_name=name))


def _describe_check(check: Callable[[Any], None] | Sequence[str]) -> Any:
    if not callable(check):
        return list(check)
    if "<" in check.__qualname__ or check.__module__ == "__main__":
        raise ValueError(f"the check {check.__qualname__} must be a top-level function of a module")
    return {
        "file": inspect.getfile(check),
        "module": check.__module__,
        "function": check.__qualname__,
    }


def _run_worker(
    job: dict[str, Any], folder: Path, *, interpret: bool
) -> list[tuple[str, str, float]]:
    (folder / "job.json").write_text(json.dumps(job))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), *(p or os.getcwd() for p in sys.path)]
    )
    # A thread pool started before the fork would be missing after it.
    environment["OMP_NUM_THREADS"] = "1"
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tools.ladder.mutation", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the mutation worker failed:\n{done.stdout}{done.stderr}")
    results = json.loads((folder / "results.json").read_text())
    return [(str(verdict), str(detail), float(seconds)) for verdict, detail, seconds in results]


def _load(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _judge(job: dict[str, Any], check: Callable[[Any], None] | None, copy: str) -> tuple[str, str]:
    if check is None:
        command = [word.replace("{source}", copy) for word in job["check"]]
        done = subprocess.run(command, capture_output=True, text=True)
        return (KILLED, done.stdout[-2000:]) if done.returncode else (SURVIVED, "")
    subject: Any = Path(copy)
    if copy.endswith(".py"):
        try:
            subject = _load(copy, job["module_name"])
        except Exception as error:
            return INVALID, f"{type(error).__name__}: {error}"
    try:
        check(subject)
    except BaseException as error:  # pytest's outcomes are not Exceptions
        name = type(error).__name__
        return INVALID if name in INVALID_ERRORS else KILLED, f"{name}: {str(error)[:2000]}"
    return SURVIVED, ""


def _run_forked(judge: Callable[[], tuple[str, str]], timeout: float) -> tuple[str, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()  # a command's own children die with it
        os.close(reader)
        with os.fdopen(writer, "w") as stream:
            json.dump(judge(), stream)
            stream.flush()
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + timeout
    status = None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.01)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    if status is None:
        return KILLED, f"no answer within {timeout} s"
    if not answer:
        return KILLED, f"died with signal {os.WTERMSIG(status)}"
    verdict, detail = json.loads(answer)
    return verdict, detail


def _work(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    described = job["check"]
    check = None
    if isinstance(described, dict):
        check = _load(described["file"], described["module"])
        for part in described["function"].split("."):
            check = getattr(check, part)
    results = []
    for copy in job["copies"]:
        start = time.monotonic()
        verdict, detail = _run_forked(partial(_judge, job, check, copy), job["timeout"])
        results.append((verdict, detail, time.monotonic() - start))
        if len(results) == 1 and verdict != SURVIVED:
            break
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
