"""The scaffold: legal code that fails its own tests, and no file overwritten."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.new_op import write

ROOT = Path(__file__).parents[1]


def test_the_skeleton_is_lint_free_and_fails_its_own_tests(tmp_path: Path) -> None:
    for folder in ("pydistill", "kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    paths = write("made_up", tmp_path)
    for path in paths:
        if path.suffix == ".py":
            ast.parse(path.read_text())
    python = [path for path in paths if path.suffix == ".py"]
    lint = [sys.executable, "-m", "ruff"]
    subprocess.check_call([*lint, "check", "--quiet", *python], cwd=tmp_path)
    subprocess.check_call([*lint, "format", "--quiet", "--check", *python], cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 1, done.stdout  # 1: collected, and some failed
    failed = {line.split("::")[1].split("[")[0].split()[0]
              for line in done.stdout.splitlines() if line.startswith("FAILED")}  # fmt: skip
    assert failed == {
        "test_the_room_is_written",
        "test_closed_form",
        "test_gradcheck",
        "test_there_are_cases_of_every_dtype",
    }


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    first = write("made_up", tmp_path)
    first[0].write_text("mine")
    with pytest.raises(ValueError, match="'made_up' is taken"):
        write("made_up", tmp_path)
    assert first[0].read_text() == "mine"


@pytest.mark.parametrize("name", ["", "Upper", "with-dash", "../escape", "lambda", "1st"])
def test_bad_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name an operator"):
        write(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
