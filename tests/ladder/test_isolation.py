"""Interpreter tests run in their own process and still report as if they did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.ladder import isolation

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tools.ladder import isolation
def pytest_configure(config):
    isolation.install(config)
    isolation.install(config)
"""
TESTS = """
import os, pytest
if "TRITON_INTERPRET" in os.environ:
    with open("children", "a") as file:
        file.write("one ")
@pytest.fixture(scope="module")
def shared():
    yield 1
def test_plain(shared):
    assert "TRITON_INTERPRET" not in os.environ
@pytest.mark.interpreter
@pytest.mark.parametrize("n", [1, 2])
def test_marked(n, shared):
    assert os.environ["TRITON_INTERPRET"] == "1"
@pytest.mark.interpreter
def test_wrong():
    assert 1 == 2, "as expected"
@pytest.mark.interpreter
def test_skipped():
    pytest.skip("for a reason")
def test_plain_again(shared):
    assert shared == 1
@pytest.mark.interpreter
def test_dies():
    os._exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -m 'not nothing'\n")
    return tmp_path


def run(folder: Path, *arguments: str, interpret: bool = False) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout


def test_outcomes_come_back_under_their_own_names(folder: Path) -> None:
    output = run(folder, "-k", "not dies")
    assert "1 failed, 4 passed, 1 skipped, 1 deselected" in output
    for line in ("PASSED test_some.py::test_marked[1]", "FAILED test_some.py::test_wrong"):
        assert line in output
    assert "as expected" in output
    assert "for a reason" in output


def test_a_dead_child_is_a_failure(folder: Path) -> None:
    output = run(folder)
    assert "FAILED test_some.py::test_dies" in output
    assert "ended with status 7" in output
    assert "2 failed, 4 passed, 1 skipped" in output


def test_workers_have_one_child_a_file(folder: Path) -> None:
    (folder / "test_more.py").write_text(TESTS)
    output = run(folder, "-n", "2", "--dist", "loadfile", "-k", "not dies")
    assert "2 failed, 8 passed, 2 skipped" in output
    assert "FAILED test_some.py::test_wrong" in output
    assert (folder / "children").read_text() == "one one "


def test_interpreting_session_runs_marked_tests_only(folder: Path) -> None:
    output = run(folder, "-k", "marked or plain", interpret=True)
    assert "2 passed" in output
    assert "test_plain" not in output


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("true", True)])
def test_interpreting_reads_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert isolation.interpreting() is expected
