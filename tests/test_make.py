"""`make room`: the whole room and nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ATTENTION = [
    "csrc/cpu/attention-inl.h",
    "csrc/cpu/attention_bwd-inl.h",
    "csrc/tests/attention_test.cc",
    "kernels/configs/attention/device.json",
    "pydistill/ops/_attention_call.py",
    "pydistill/ops/attention.py",
    "tests/ops/test_attention.py",
]
OTHERS = [
    "csrc/cpu/attention_transfer-inl.h",
    "pydistill/ops/attention_transfer.py",
    "pydistill/ops/linear_attention.py",
    "tests/ops/test_attention_transfer.py",
    "tests/ops/test_linear_attention.py",
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ATTENTION + OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.check_call(["git", "init", "--quiet"], cwd=tmp_path)
    subprocess.check_call(["git", "add", "."], cwd=tmp_path)
    return tmp_path


def room(repository: Path, op: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "room", f"OP={op}"]
    return subprocess.run(command, cwd=repository, text=True, capture_output=True)


def test_the_whole_room_and_nothing_else(repository: Path) -> None:
    assert room(repository, "attention").stdout.split() == ATTENTION
    transfer = [name for name in OTHERS if "attention_transfer" in name]
    assert room(repository, "attention_transfer").stdout.split() == transfer


@pytest.mark.parametrize("op", ["", "nothing", "transfer"])
def test_no_such_room(repository: Path, op: str) -> None:
    done = room(repository, op)
    assert done.returncode != 0 and ("usage" in done.stdout or "no operator" in done.stdout)
