"""The mutation runner tells killed, surviving and meaningless mutants apart."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tools.ladder.mutation import Mutant, assert_all_killed, run_mutants

pytestmark = pytest.mark.ladder

SOURCE = "def double(x):\n    return x + x\n\n\ndef unused():\n    return 0\n"


def check_double(module: ModuleType) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert module.double(3) == 6
    assert sys.modules[module.__name__] is module


def check_text(path: Path) -> None:
    text = path.read_text()
    if "hang" in text:
        time.sleep(60)
    if "crash" in text:
        os.kill(os.getpid(), 11)
    assert "good" in text


def test_python_sources_are_imported(tmp_path: Path) -> None:
    source = tmp_path / "doubling.py"
    source.write_text(SOURCE)
    mutants = [
        Mutant("x + x", "x * x"),
        Mutant("return 0", "return 1"),
        Mutant("return", "retrun", 1),
        Mutant("x + x", "y + x"),
    ]
    outcomes = run_mutants(source, mutants, check_double)
    assert [o.verdict for o in outcomes] == ["killed", "survived", "invalid", "killed"]
    assert "NameError" in outcomes[3].detail
    with pytest.raises(AssertionError, match="2 of 4 mutants were not killed") as caught:
        assert_all_killed(outcomes)
    assert "survived: 'return 0' -> 'return 1'" in str(caught.value)
    assert "invalid: 'return' -> 'retrun' (occurrence 1)" in str(caught.value)
    assert source.read_text() == SOURCE


def test_other_sources_travel_by_path_and_hangs_and_crashes_kill(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("good kernel")
    mutants = [Mutant("kernel", "hang"), Mutant("kernel", "crash"), Mutant("good", "bad")]
    outcomes = run_mutants(source, mutants, check_text, timeout=2)
    assert_all_killed(outcomes)
    assert "no answer within 2" in outcomes[0].detail
    assert "signal 11" in outcomes[1].detail


def test_a_command_may_be_the_check(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("good kernel")
    command = ["grep", "-q", "good", "{source}"]
    outcomes = run_mutants(source, [Mutant("good", "bad"), Mutant("kernel", "k")], command)
    assert [o.verdict for o in outcomes] == ["killed", "survived"]


def test_the_untouched_source_must_pass(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("no kernel")
    with pytest.raises(RuntimeError, match=r"fails on the untouched kernel\.cu: AssertionError"):
        run_mutants(source, [Mutant("no", "bad")], check_text)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (Mutant("absent", ""), "'absent' occurs 0 times"),
        (Mutant("x", "y"), "'x' occurs 3 times"),
        (Mutant("x", "y", 3), "occurrence 3 of 'x' asked for, there are 3"),
        (Mutant("return 0", "return 0"), "by itself"),
    ],
)
def test_a_mutant_must_be_definite(tmp_path: Path, mutant: Mutant, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mutant.apply(SOURCE)


def test_a_local_function_is_no_check(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("good")
    with pytest.raises(ValueError, match="must be a top-level function"):
        run_mutants(source, [], lambda path: None)
