"""Loads the compiled kernels and remembers why they are missing.

Loading `_C.abi3.so` registers its kernels with torch's dispatcher; without it every operator keeps
its reference, so a pure-Python install works and only this module knows the difference.
Nothing here raises at import: `reason()` keeps the sentence that an explicit `impl="cpu"` needs.

The instruction set is chosen once, at load: the widest that the machine has, or the one named by
`PYDISTILL_CPU_CAPABILITY`. A name that cannot be honoured switches the native code off, because a
quiet second choice would be measured or tested in place of the one asked for.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CAPABILITIES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
_ENV = "PYDISTILL_CPU_CAPABILITY"


class _Library:
    """One shared library: loaded, or the reason why not."""

    def __init__(self, stem: str, how_to_build: str) -> None:
        self.handle: ctypes.CDLL | None = None
        self.reason: str | None = None
        path = Path(__file__).with_name(f"{stem}.abi3.so")
        if os.environ.get("PYDISTILL_NO_NATIVE", "0") not in ("", "0"):
            self.reason = "PYDISTILL_NO_NATIVE is set; unset it to use the compiled kernels"
        elif not path.exists():
            self.reason = f"{path.name} was not built; {how_to_build}"
        else:
            try:
                self.handle = ctypes.CDLL(str(path))
            except OSError as error:
                self.reason = f"{path.name} does not load beside torch {torch.__version__}: {error}"

    def drop(self, reason: str) -> None:
        self.handle, self.reason = None, reason


_cpu = _Library(
    "_C", "reinstall pydistill-kernels without PYDISTILL_NO_NATIVE, or run `make build`"
)
_cuda = _Library("_cuda", "reinstall pydistill-kernels from source with PYDISTILL_BUILD_CUDA=1")


def available() -> bool:
    """Whether the CPU kernels are loaded."""
    return _cpu.handle is not None


def reason() -> str | None:
    """Why the CPU kernels are not loaded, or None when they are."""
    return _cpu.reason


def cuda_available() -> bool:
    """Whether the CUDA C++ kernels are loaded; says nothing about the presence of a GPU."""
    return _cuda.handle is not None


def cuda_reason() -> str | None:
    """Why the CUDA C++ kernels are not loaded, or None when they are."""
    return _cuda.reason


def capability() -> str:
    """The instruction set in use, one of `CAPABILITIES`; "none" without native code."""
    if _cpu.handle is None:
        return "none"
    name: bytes = _cpu.handle.pydistill_cpu_capability()
    return name.decode()


def set_capability(name: str) -> None:
    """Switches every CPU kernel of this process to one instruction set.

    `name` is one of `CAPABILITIES`, or "default" for the scalar code. Raises ValueError for a name
    that is unknown or that this machine cannot run, RuntimeError without native code.
    """
    if _cpu.handle is None:
        raise RuntimeError(f"no CPU kernels are loaded: {_cpu.reason}")
    error: bytes | None = _cpu.handle.pydistill_set_cpu_capability(name.encode())
    if error is not None:
        raise ValueError(f"CPU capability {name!r} cannot be used: {error.decode()}")


@contextmanager
def use_capability(name: str) -> Iterator[None]:
    """`set_capability` for the length of a `with` block."""
    before = capability()
    set_capability(name)
    try:
        yield
    finally:
        set_capability(before)


def supported_capabilities() -> list[str]:
    """The instruction sets that this machine runs, narrowest first; none without native code."""
    if not available():
        return []
    supported = []
    before = capability()
    for name in CAPABILITIES:
        try:
            set_capability(name)
        except ValueError:
            continue
        supported.append(name)
    set_capability(before)
    return supported


def _prepare() -> None:
    """Declares the library's C functions and honours the environment's choice."""
    if _cpu.handle is None:
        return
    try:
        _cpu.handle.pydistill_cpu_capability.restype = ctypes.c_char_p
        _cpu.handle.pydistill_set_cpu_capability.restype = ctypes.c_char_p
        _cpu.handle.pydistill_set_cpu_capability.argtypes = [ctypes.c_char_p]
    except AttributeError as error:
        _cpu.drop(f"_C.abi3.so is older than this package; run `make build` ({error})")
        return
    if wanted := os.environ.get(_ENV):
        try:
            set_capability(wanted)
        except ValueError as error:
            _cpu.drop(f"{_ENV} cannot be honoured: {error}")


_prepare()
