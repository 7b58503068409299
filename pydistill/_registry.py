"""Where an operator's kernels are registered, and which of them a call uses.

An operator's kernels are `out` ops that return nothing. Each is defined once, here, with one schema
in three namespaces, so that torch's own dispatcher holds the backends and `torch.compile` sees
every one of them:

| namespace | dispatch key | kernel |
|---|---|---|
| `pydistill` | `CompositeExplicitAutograd` | the reference |
| `pydistill` | `CPU` | C++ (`csrc/ops/<op>.cpp`, present when the native library is loaded) |
| `pydistill_triton` | `CompositeExplicitAutograd` | Triton (`kernels/<op>.py`, on first call) |
| `pydistill_cuda` | `CUDA` | CUDA C++ (present when the optional CUDA library is loaded) |

`impl="auto"` is resolved in Python by `resolve`, in the order of `Operator.order`; an explicit
`impl` never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pydistill import _native

BACKENDS = ("reference", "cpu", "triton", "cuda")
IMPLS = ("auto", *BACKENDS)
_NAMESPACE = {
    "reference": "pydistill",
    "cpu": "pydistill",
    "triton": "pydistill_triton",
    "cuda": "pydistill_cuda",
}
_libraries = {ns: torch.library.Library(ns, "FRAGMENT") for ns in set(_NAMESPACE.values())}


@dataclass(frozen=True)
class Operator:
    """An operator: its name (the stem of its room), the dtypes its kernels take and the values of
    its argument `kind`, if it has one. An internal one serves others and is not exported. `lacks`
    names, by backend, what else an operator does that its kernels there do not."""

    name: str
    dtypes: frozenset[torch.dtype]
    kinds: tuple[str, ...] = ()
    internal: bool = False
    lacks: Mapping[str, frozenset[str]] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """The backend a call will use on a device, and why."""

    backend: str
    reason: str


_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # what "auto" tries, by device type

OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    dtypes: set[torch.dtype],
    kinds: Iterable[str] = (),
    *,
    internal: bool = False,
    lacks: Mapping[str, Iterable[str]] | None = None,
) -> Operator:
    """Declares an operator; its kernels follow with `kernel`."""
    missing = {backend: frozenset(parts) for backend, parts in (lacks or {}).items()}
    OPERATORS[name] = Operator(name, frozenset(dtypes), tuple(kinds), internal, missing)
    return OPERATORS[name]


def public() -> dict[str, Operator]:
    """The operators that the package exports, by name in alphabetical order."""
    return {name: op for name, op in sorted(OPERATORS.items()) if not op.internal}


def kernel(op: Operator, name: str, schema: str, reference: Callable[..., None]) -> None:
    """Defines the `out` op `name` with `schema` in every namespace; `reference` is its meaning."""
    op.kernels.append(name)

    def launch(*args: Any) -> None:
        getattr(importlib.import_module(f"pydistill.kernels.{op.name}"), name)(*args)

    for library in _libraries.values():
        library.define(name + schema)
    _libraries["pydistill"].impl(name, reference, "CompositeExplicitAutograd")
    _libraries["pydistill_triton"].impl(name, launch, "CompositeExplicitAutograd")
    for namespace in _libraries:
        torch.library.register_fake(f"{namespace}::{name}", _fake_out)


def eager_kernel(name: str, schema: str) -> None:
    """Defines an op that native CPU code alone has, and that allocates its results: a form of a
    `kernel` for eager calls whose cost is that of the call. Nothing traces it."""
    _libraries["pydistill"].define(name + schema)


def has_eager() -> bool:
    """Whether the native library is loaded, which alone has the ops of `eager_kernel`."""
    return _native.available()


def eager(name: str) -> Callable[..., Any]:
    """The bound overload of an `eager_kernel`."""
    found: Callable[..., Any] = getattr(torch.ops.pydistill, name).default
    return found


_made_of: dict[str, str] = {}
_runs: dict[str, Callable[..., None]] = {}


def composed_kernel(
    op: Operator,
    name: str,
    schema: str,
    reference: Callable[..., None],
    run: Callable[..., None],
    of: str,
) -> None:
    """A `kernel` that is Python over the kernels of another operator, on every backend that has
    those: `run(backend, *args)`. `of` is the one of them that says where they exist; elsewhere a
    call raises."""
    _made_of[name], _runs[name] = of, run

    def on(backend: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if has_kernel(of, backend):
                run(backend, *args)
            elif backend == "cpu" and not _native.available():
                reference(*args)  # the namespace is the reference's too, and nobody chose "cpu"
            else:
                raise RuntimeError(
                    f"{name} is made of {of}, of which impl={backend!r} has no kernel here; choose"
                    " another impl."
                )

        return call

    op.kernels.append(name)
    keys = {"cpu": "CPU", "triton": "CompositeExplicitAutograd", "cuda": "CUDA"}
    for library in _libraries.values():
        library.define(name + schema)
    _libraries["pydistill"].impl(name, reference, "CompositeExplicitAutograd")
    for backend, key in keys.items():
        _libraries[_NAMESPACE[backend]].impl(name, on(backend), key)
    for namespace in _libraries:
        torch.library.register_fake(f"{namespace}::{name}", _fake_out)


def _fake_out(*args: Any) -> None:
    """Every kernel writes into tensors the caller made, so nothing is to be inferred."""


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Autograd inside a reference that the dispatcher called: it runs such a kernel with the
    autograd keys switched off, and a gradient taken there would not exist."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(torch._C._dispatch_key_parse(key))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def overload(name: str, backend: str) -> Callable[..., None]:
    """The bound overload of kernel `name` for `backend`."""
    found: Callable[..., None] = getattr(getattr(torch.ops, _NAMESPACE[backend]), name).default
    return found


def composed_run(name: str) -> Callable[..., None]:
    """`run` of a composed kernel, for what a schema cannot take."""
    return _runs[name]


def has_kernel(name: str, backend: str) -> bool:
    """Whether `backend` has an implementation of kernel `name` in this process."""
    name = _made_of.get(name, name)
    if backend == "cpu":
        return _native.available() and (name in _native_ops or _finds_native(name))
    if backend == "cuda":
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"pydistill_cuda::{name}", "CUDA")
    if backend == "triton":
        room = next(op.name for op in OPERATORS.values() if name in op.kernels)
        return _finds("triton") and _finds(f"pydistill.kernels.{room}")
    return True


_native_ops: set[str] = set()  # found once: asking torch takes longer than a small call


def _finds_native(name: str) -> bool:
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"pydistill::{name}", "CPU")
    if found:
        _native_ops.add(name)
    return found


def _finds(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def resolve(name: str, impl: str, device: str, dtype: torch.dtype, part: str = "") -> str:
    """The backend for a call of operator `name` on tensors of `dtype` on device type `device`, of
    the `part` of it that some backends may lack.

    Raises `ValueError` for an unknown `impl`, or for an explicit one that cannot serve this tensor
    here: an explicit choice never falls back. `auto` warns once when it lands on the reference
    although a kernel exists for the dtype.
    """
    op = OPERATORS[name]
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not known; use one of {', '.join(IMPLS)}.")
    if impl == "auto":
        for backend in _ORDER.get(device, ()):
            if _unavailable(op, backend, device, dtype, part) is None:
                return backend
        if dtype in op.dtypes:
            why = explain(op, device, dtype, part).reason
            _warn_once(f"pydistill.{op.name} uses the slow reference: {why}")
        return "reference"
    reason = _unavailable(op, impl, device, dtype, part)
    if reason:
        raise ValueError(f"impl={impl!r} cannot run {op.name} here: {reason}")
    return impl


# What torch.compiler.assume_constant_result does, without importing Dynamo with the package.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(op: Operator, device: str, dtype: torch.dtype | None = None, part: str = "") -> Choice:
    """What `impl="auto"` picks for tensors of `dtype` (fp32 where it takes that) on `device`, and
    why."""
    if dtype is None:
        dtype = torch.float32 if torch.float32 in op.dtypes else min(op.dtypes, key=str)
    reasons = []
    for backend in _ORDER.get(device, ()):
        reason = _unavailable(op, backend, device, dtype, part)
        if reason is None:
            return Choice(backend, _capability() if backend == "cpu" else "kernel found")
        reasons.append(f"{backend}: {reason}")
    return Choice(
        "reference", "; ".join(reasons) or f"no kernels are written for device type {device!r}."
    )


def _capability() -> str:
    return f"native library loaded, capability {_native.capability()}"


def _unavailable(
    op: Operator, backend: str, device: str, dtype: torch.dtype, part: str = ""
) -> str | None:
    """Why `backend` cannot serve a tensor of `dtype` on `device`; None if it can."""
    if backend == "reference":
        return None
    if dtype not in op.dtypes:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in op.dtypes))
        return f"dtype {dtype} has no kernel; cast to one of {names}, or pass impl='reference'."
    if part in op.lacks.get(backend, ()):
        return f"{op.name} has no {backend} kernel for {part!r}; pass impl='reference'."
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    wanted = "cpu" if backend == "cpu" or interpreted else "cuda"
    if device != wanted:
        return (
            f"the tensors are on device type {device!r}; move them to {wanted!r} or choose another"
            " impl."
        )
    if not has_kernel(op.kernels[0], backend):
        if backend == "cpu":
            return (
                _native.reason()
                or "the native library has no such kernel; rebuild it (pip install -e .)."
            )
        if backend == "triton" and not _finds("triton"):
            return "the package triton is not installed; install pydistill-kernels[triton]."
        if backend == "triton" or torch._C._dispatch_has_kernel_for_dispatch_key(
            "pydistill_cuda::divergence_fwd", "CUDA"
        ):
            return f"{op.name} has no {backend} kernel yet; choose another impl."
        return "the CUDA library is not built; build with PYDISTILL_BUILD_CUDA=1."
    return None


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
