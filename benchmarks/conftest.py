"""Runs a `bench_<op>.py` under pytest-benchmark: one test for each contestant of each case.

The first contestant of a case to be asked measures the whole case, interleaved; the others read the
result. Their samples reach pytest-benchmark through a clock that plays them back, so its JSON,
tables and comparisons hold times that were really taken in turn. `extra_info` carries the rest of
the result, and `benchmarks.report` reads it from there. Choosing tests with -k chooses what is
listed: a case is always measured with all of its contestants.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks import harness

ROUNDS, QUICK_ROUNDS = 20, 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pydistill benchmarks")
    group.addoption(
        "--quick", action="store_true", help="few rows and few rounds: a check, no measurement"
    )
    group.addoption(
        "--rounds", type=int, help=f"interleaved rounds ({ROUNDS}; {QUICK_ROUNDS} with --quick)"
    )
    group.addoption(
        "--retries", type=int, default=0, help="how often a void case is measured again (0)"
    )
    group.addoption("--threads", type=int, help="torch threads (torch's own default)")


def pytest_configure(config: pytest.Config) -> None:
    # A contestant that is left out, or whose case failed, has nothing to hand to pytest-benchmark.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        if threads := metafunc.config.getoption("--threads"):
            torch.set_num_threads(threads)
        entries = [
            pytest.param((case, contestant.name), id=f"{case.name} | {contestant.name}")
            for case in metafunc.module.cases(quick=metafunc.config.getoption("--quick"))
            for contestant in case.contestants
        ]
        metafunc.parametrize("entry", entries)


class Playback:
    """A clock that advances by the next sample whenever `step` runs."""

    now = 0.0
    pending: list[float]

    def load(self, samples: list[float]) -> None:
        self.pending = list(samples)

    def rewind(self) -> None:
        self.now = 0.0  # each sample starts at zero, so that no digit of it is lost

    def step(self) -> None:
        self.now = self.pending.pop(0)


PLAYBACK = Playback()


def played_back() -> float:
    """Seconds on the playback clock."""
    return PLAYBACK.now


@pytest.fixture(scope="session")
def results() -> dict[str, harness.Result | Exception]:
    return {}


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: Any, results: dict[str, harness.Result | Exception]
) -> Callable[[tuple[harness.Case, str]], None]:
    """`record(entry)` measures the entry's case, once, and hands over the entry's samples."""

    def record(entry: tuple[harness.Case, str]) -> None:
        case, name = entry
        if case.name not in results:
            capture = request.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                results[case.name] = _measure(case, request.config.option)
        result = results[case.name]
        if isinstance(result, Exception):
            raise result
        timing = result.timing(name)
        if timing.absent:
            pytest.skip(f"{name} is left out: {timing.absent}")
        PLAYBACK.load(timing.samples)
        benchmark.group = case.name
        benchmark.extra_info.update(contestant=name, result=result.to_json())
        benchmark.pedantic(PLAYBACK.step, setup=PLAYBACK.rewind, rounds=len(timing.samples))
        if timing.refused and timing.role == "subject":
            pytest.fail(f"{name} is wrong, its speed means nothing: {timing.gate}", pytrace=False)

    return record


def _measure(case: harness.Case, options: Any) -> harness.Result | Exception:
    def tell(line: str) -> None:
        print(
            f"\r\033[K{line}" if sys.stderr.isatty() else ".", end="", file=sys.stderr, flush=True
        )

    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    try:
        return harness.measure_again(case, options.retries, rounds=rounds, tell=tell)
    except Exception as error:  # raised again by every contestant of the case
        return error
    finally:
        print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)
