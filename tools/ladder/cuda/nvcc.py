"""Compile a CUDA source file for every target and read what the compiler made of it.

    gate = compile_targets("csrc/cuda/divergence.cu")
    gate["sm_90a"]["divergence_forward<float, 256>"].resources.registers

Nothing is run, so no GPU is needed, only nvcc. Cubins are cached by content, as in `sim`.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.ladder.cuda.sim import (
    CSRC,
    CudaBuildError,
    cache_folder,
    content_key,
    run_compiler,
    source_closure,
)
from tools.ladder.occupancy import Occupancy
from tools.ladder.resources import Resources, analyse_cubin, find_binary_tool

TARGETS = ("sm_80", "sm_90a", "sm_100a")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel on one target; `threads` is its launch bound."""

    resources: Resources
    threads: int
    occupancy: Occupancy


def find_nvcc() -> str | None:
    """nvcc on PATH or in CUDA_HOME; None means that the CUDA compiler is not installed."""
    found = shutil.which("nvcc")
    if found is None and "CUDA_HOME" in os.environ:
        found = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return found


@functools.cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def release() -> str | None:
    """nvcc's version, 13.0.88 say, or None without nvcc."""
    nvcc = find_nvcc()
    found = re.search(r"\bV([\d.]+)", _version(nvcc)) if nvcc else None
    return found[1] if found else None


def compile_cubin(
    source: str | os.PathLike[str],
    arch: str,
    *,
    include_dirs: Sequence[str | os.PathLike[str]] = (),
    defines: Sequence[str] = (),
) -> Path:
    """Path of the cubin of `source` for `arch`. Warnings are errors; raises `CudaBuildError`."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc not found: put the CUDA toolkit on PATH or set CUDA_HOME")
    path = Path(source).resolve()
    if not path.is_file():
        raise ValueError(f"no CUDA source at {path}")
    folders = [*(Path(folder).resolve() for folder in include_dirs), CSRC]
    command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", "-cubin", "-Xcompiler", "-Wall,-Wextra"]
    command += ["-Werror", "all-warnings", *(f"-I{folder}" for folder in folders)]
    command += [f"-D{define}" for define in defines]
    key = content_key(source_closure(path, folders), [_version(nvcc), *command])
    out = cache_folder() / f"{path.stem}-{arch}-{key}.cubin"
    return run_compiler([*command, str(path)], out)


def compile_targets(
    source: str | os.PathLike[str],
    targets: Sequence[str] = TARGETS,
    *,
    include_dirs: Sequence[str | os.PathLike[str]] = (),
    defines: Sequence[str] = (),
) -> dict[str, dict[str, CompiledKernel]]:
    """Every kernel of `source` on every target, keyed by target and readable kernel name.

    Each kernel must state its block size with `__launch_bounds__`: the register budget and the
    occupancy depend on it.
    """
    return {
        arch: read_cubin(compile_cubin(source, arch, include_dirs=include_dirs, defines=defines))
        for arch in targets
    }


def read_cubin(cubin: Path) -> dict[str, CompiledKernel]:
    """The kernels of one cubin by readable name; occupancy counts static shared memory only."""
    found = analyse_cubin(cubin)
    threads = _launch_bounds(cubin)
    kernels: dict[str, CompiledKernel] = {}
    for symbol, name in zip(found, _readable(list(found)), strict=True):
        if symbol not in threads:
            raise CudaBuildError(f"kernel {name} has no __launch_bounds__; state its block size")
        if name in kernels:
            raise CudaBuildError(f"two kernels are called {name}; give one another name")
        resources = replace(found[symbol], name=name)  # the symbol depends on the file's path
        kernels[name] = CompiledKernel(
            resources, threads[symbol], resources.occupancy(threads[symbol])
        )
    return dict(sorted(kernels.items()))


def _launch_bounds(cubin: Path) -> dict[str, int]:
    command = [find_binary_tool("cuobjdump"), "-elf", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.nv\.info\.(\S+)$", listing, flags=re.MULTILINE)
    bounds: dict[str, int] = {}
    for symbol, body in zip(sections[1::2], sections[2::2], strict=True):
        found = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+.*\s+Value:\s+([^\n]*)", body)
        if found:
            x, y, z = (int(size, 16) for size in found[1].split()[:3])
            bounds[symbol] = x * y * z
    return bounds


def _readable(symbols: Sequence[str]) -> list[str]:
    """`row_sum<float, 128>` for a mangled symbol: no namespaces, return type or parameters."""
    if not symbols:
        return []
    command = ["c++filt", "--no-params", *symbols]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        re.sub(r"^(void )?((\(anonymous namespace\)|\w+)::)*", "", line.replace("(int)", ""))
        for line in lines
    ]
