"""The compiled library: what it links, how it is switched, and what is said when it is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pydistill import _native

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "pydistill" / "_C.abi3.so"
REPORT = "print(n.available(), n.capability(), n.reason())"


def report(folder: Path = LIBRARY.parent, **environment: str) -> str:
    """What the loader of a folder says in a new process; alone, for the package is slower."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYDISTILL_")}
    code = f"import sys; sys.path.append({str(folder)!r}); import _native as n; {REPORT}"
    return subprocess.check_output([sys.executable, "-c", code], env=env | environment, text=True)


def loader_beside(library: bytes | None, folder: Path) -> Path:
    """The loader alone, beside another library or none."""
    shutil.copy(ROOT / "pydistill" / "_native.py", folder)
    if library is not None:
        (folder / "_C.abi3.so").write_bytes(library)
    return folder


@pytest.fixture(autouse=True)
def _built() -> None:
    assert LIBRARY.exists(), "build the native code first: make build"


def symbols(*options: str) -> list[str]:
    listing = subprocess.check_output(["nm", "-D", *options, LIBRARY], text=True)
    return [line.split()[-1] for line in listing.splitlines()]


def test_no_cxx_symbol_of_torch_is_imported() -> None:
    """Torch's C++ symbols change between releases; the stable ABI is C functions and headers."""
    unstable = re.compile(r"^_ZNK?S?t?\d*(2at|3c10|5torch)|^_ZT[IV]N(2at|3c10|5torch)")
    assert unstable.match("_ZN2at6TensorC1Ev") and unstable.match("_ZNK3c1010TensorImpl4sizeEv")
    assert [name for name in symbols("--undefined-only") if unstable.match(name)] == []


def test_only_the_entry_points_are_exported() -> None:
    """Strong C++ exports would meet another library's; weak ones are the standard library's."""
    listing = subprocess.check_output(["nm", "-D", "--defined-only", LIBRARY], text=True)
    strong = {line.split()[-1] for line in listing.splitlines() if line.split()[-2] in "TDBR"}
    strong -= {"_edata", "_end", "__bss_start"}  # the linker's own
    assert {"PyInit__C", "pydistill_cpu_capability", "pydistill_set_cpu_capability"} <= strong
    assert [name for name in strong if not name.startswith(("PyInit__C", "pydistill_"))] == []


def test_links_nothing_but_torch_and_the_system() -> None:
    listing = subprocess.check_output(["readelf", "-d", LIBRARY], text=True)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", listing))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed <= system | {"libtorch_cpu.so", "libc10.so"}
    assert "RPATH" not in listing and "RUNPATH" not in listing


def test_available_here() -> None:
    assert _native.available(), _native.reason()
    assert _native.reason() is None
    assert _native.capability() in _native.supported_capabilities()


def test_the_package_imports_without_native_code() -> None:
    code = f"import pydistill; from pydistill import _native as n; {REPORT}"
    env = os.environ | {"PYDISTILL_NO_NATIVE": "1"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
    assert said.startswith("False none PYDISTILL_NO_NATIVE is set")


def test_switched_off_at_run_time() -> None:
    assert report(PYDISTILL_NO_NATIVE="1").startswith("False none PYDISTILL_NO_NATIVE is set")


def test_not_built(tmp_path: Path) -> None:
    said = report(loader_beside(None, tmp_path))
    assert said.startswith("False none _C.abi3.so was not built; ")


def test_does_not_load(tmp_path: Path) -> None:
    said = report(loader_beside(b"not a library", tmp_path))
    assert said.startswith("False none _C.abi3.so does not load beside torch ")


def test_older_than_the_package(tmp_path: Path) -> None:
    source, library = tmp_path / "stale.c", tmp_path / "stale.so"
    source.write_text("int unrelated;")
    subprocess.check_call(["cc", "-shared", "-fPIC", source, "-o", library])
    said = report(loader_beside(library.read_bytes(), tmp_path))
    assert said.startswith("False none _C.abi3.so is older than this package; run `make build`")


def test_environment_chooses_the_capability() -> None:
    widest = _native.supported_capabilities()[-1]
    assert report() == f"True {widest} None\n"
    narrow = report(PYDISTILL_CPU_CAPABILITY="default", PYDISTILL_NO_NATIVE="0")
    assert narrow == "True scalar None\n"


def test_a_bad_choice_switches_native_code_off_and_says_so() -> None:
    said = report(PYDISTILL_CPU_CAPABILITY="sse9")
    assert said.startswith("False none PYDISTILL_CPU_CAPABILITY cannot be honoured: ")
    assert "'sse9'" in said and "avx2" in said  # the value and the fix


def test_set_capability() -> None:
    before = _native.capability()
    for name in _native.supported_capabilities():
        with _native.use_capability(name):
            assert _native.capability() == name
    assert _native.capability() == before
    with pytest.raises(ValueError, match="sse9"):
        _native.set_capability("sse9")
    assert _native.capability() == before


def test_capability_fixture_runs_each(capability: str) -> None:
    assert _native.capability() == capability
