"""What is shipped: one copy of the kernels, one library, and nothing else native.

The tests marked `packaging` build from a copy of the tracked files, as a release would.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
# Which of the two names reaches the isolated build depends on pip's version.
PINS = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
IMPORT = "import pydistill; from pydistill import _native as n; print(n.available(), n.reason())"


def run(*command: object, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYDISTILL_", "PYTHON"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("as_module", [False, True])
def test_hugging_faces_kernels_is_not_shadowed(tmp_path: Path, as_module: bool) -> None:
    """Our directory `kernels/` must lose to a package of that name, even from the repository."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("")
    code = "import kernels; print(kernels.__file__)"
    command = ["-c", code] if as_module else [tmp_path / "main.py"]
    (tmp_path / "main.py").write_text(code)
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    found = run(sys.executable, *command, cwd=ROOT, PYTHONPATH=path).strip()
    assert found == str(other / "__init__.py")


def test_kernels_are_importable_and_are_the_same_files() -> None:
    import pydistill.kernels._common as common

    assert common.__file__ is not None
    assert Path(common.__file__).resolve() == ROOT / "kernels" / "_common" / "__init__.py"


def leave_behind(project: Path) -> None:
    """Leftovers of development, which must not travel."""
    (project / "pydistill" / "_testing.so").write_bytes(b"")
    (project / "pydistill" / "_C.abi3.so").write_bytes(b"stale")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, tracked.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    leave_behind(copy)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


def kernels_of(source: Path) -> set[str]:
    found = {f"pydistill/{path.relative_to(source)}" for path in source.glob("kernels/**/*.py")}
    assert len(found) > 4
    return found


def wheel_from(project: Path, to: Path, *options: str, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "-w", to]
    run(*pip, project, cwd=to, **environment)
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip install` makes it from the index's sdist: in isolation, torch and build tools fetched
    by pip, among leftovers of development. Asking for the development module must not put it into a
    wheel."""
    to = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(to / "unpacked", filter="data")
    (project,) = (to / "unpacked").iterdir()
    leave_behind(project)
    return wheel_from(project, to, PYDISTILL_BUILD_TESTING="1", MAX_JOBS="2", **PINS)


def install_in_clean_environment(wheel: Path, to: Path) -> Path:
    """A new environment with this wheel; torch and NumPy are seen where they already are."""
    import torch

    venv.create(to, with_pip=True)
    (site,) = to.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = [to / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", wheel, cwd=to)
    return to / "bin/python"


@pytest.mark.packaging
def test_sdist(source: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"} <= set(names)
    csrc = [p for p in (source / "csrc").rglob("*") if p.is_file()]
    assert len(csrc) > 50 and {str(p.relative_to(source)) for p in csrc} <= set(names)
    assert names.count("pydistill/kernels/_common/__init__.py") == 1
    assert [name for name in names if name.startswith(("kernels", "tests", "tools"))] == []
    assert [name for name in names if name.endswith(".so")] == []


@pytest.mark.packaging
@pytest.mark.timeout(1200)  # the library is compiled
def test_wheel(source: Path, wheel: Path) -> None:
    assert re.fullmatch(r"pydistill_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("pydistill/_C.abi3.so")
    assert library.startswith(b"\x7fELF")
    assert [n for n in names if n.endswith(".so")] == ["pydistill/_C.abi3.so"]
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "pydistill",
        "pydistill_kernels",
    }
    assert kernels_of(source) <= set(names)
    assert "pydistill/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.packaging
def test_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    python = install_in_clean_environment(wheel, tmp_path / "venv")
    assert run(python, "-c", IMPORT, cwd=tmp_path).split() == ["True", "None"]
    said = run(python, "-c", IMPORT, cwd=tmp_path, PYDISTILL_NO_NATIVE="1")
    assert said.startswith("False PYDISTILL_NO_NATIVE is set")
    assert "pydistill" in run(tmp_path / "venv/bin/pydistill", "--help", cwd=tmp_path)


@pytest.mark.packaging
@pytest.mark.parametrize("project", ["source", "sdist"])
def test_pure_python_wheel(
    project: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From the tree, where `pydistill/kernels` is a link, and from the sdist, where it is not."""
    # No compiler at all: the build must not even look for one.
    native = {"PYDISTILL_NO_NATIVE": "1", "CXX": "no-such-compiler"}
    found = request.getfixturevalue(project)
    wheel = wheel_from(found, tmp_path, "--no-build-isolation", **native)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert kernels_of(source) <= set(names)
    python = install_in_clean_environment(wheel, tmp_path / "venv")
    said = run(python, "-c", IMPORT, cwd=tmp_path)
    assert said.startswith("False _C.abi3.so was not built; ")


@pytest.mark.packaging
def test_no_compiler_is_one_sentence_with_both_remedies(source: Path) -> None:
    env = dict(os.environ, CXX="no-such-compiler")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env=env, text=True, capture_output=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "install g++ or clang++" in done.stderr and "PYDISTILL_NO_NATIVE=1" in done.stderr


@pytest.mark.packaging
def test_install_with_dependencies(wheel: Path, tmp_path: Path) -> None:
    """As a stranger installs it: into an empty environment, torch fetched by pip."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path, **PINS)
    assert run(python, "-c", IMPORT, cwd=tmp_path).split() == ["True", "None"]
