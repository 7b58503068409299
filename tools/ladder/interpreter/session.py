"""Put the strict builder into Triton's interpreter, and take it out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tools.ladder.interpreter.builder import StrictBuilder, ViewPointer, is_bfloat16
from tools.ladder.interpreter.errors import LadderError, RaceError, UnsupportedError
from tools.ladder.interpreter.memory import LaunchMemory
from tools.ladder.interpreter.meter import Launch, Meter


def require_interpreter() -> None:
    """Raise unless Triton decorates kernels for the interpreter in this process."""
    if not isinstance(tl.standard._sum_combine, InterpretedFunction):
        raise RuntimeError(
            "triton was imported without TRITON_INTERPRET=1: set it before the process starts, or "
            "mark the test with @pytest.mark.interpreter"
        )


class _Session:
    def __init__(self, raise_on_conflict: bool) -> None:
        self.meter = Meter()
        self.builder = StrictBuilder()
        self.raise_on_conflict = raise_on_conflict
        self.memory = LaunchMemory(Launch(""))
        self._names: Iterator[str] = iter(())

    def run(self, original: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
        """Stands for GridExecutor.__call__: one launch."""
        launch = Launch(executor.fn.__name__)
        self.memory = LaunchMemory(launch)
        self._names = iter(_tensor_names(executor, args, kwargs))
        self.meter.launches.append(launch)
        self.builder.begin(self.memory)
        try:
            with np.errstate(all="ignore"):
                original(executor, *args, **kwargs)
        except triton_interpreter.InterpreterError as error:
            fault = cause(error, LadderError)
            if fault is None:
                raise
            raise fault from None
        finally:
            self.builder.begin(None)
        if launch.conflicts and self.raise_on_conflict:
            more = len(launch.conflicts) - 1
            raise RaceError(f"{launch.conflicts[0]}" + (f" (and {more} more)" if more else ""))

    def convert(self, original: Callable[[Any], Any], argument: Any) -> Any:
        """Stands for _implicit_cvt: an argument as the kernel sees it."""
        if type(argument) is float:
            return float_argument(argument)
        result = original(argument)
        if hasattr(argument, "data_ptr"):
            tensor = getattr(argument, "base", argument)
            view = self.memory.add(next(self._names), tensor)
            result.handle.dtype = ViewPointer(result.handle.dtype, view)
        return result

    def reduce(self, original: Callable[..., Any], operation: Any, inputs: Any) -> Any:
        """Stands for apply_impl of reductions and scans."""
        if any(is_bfloat16(x.handle) for x in inputs):
            raise UnsupportedError("a reduction of raw bfloat16: upcast to fp32 first")
        self.memory.launch.reduced += sum(x.handle.data.size for x in inputs)
        return original(operation, inputs)


def float_argument(x: float) -> Any:
    """The JIT passes a float as fp32; left as a Python number it would not promote bf16."""
    return tl.tensor(TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)


def _tensor_names(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the tensors among a kernel's arguments, in the order they are converted."""
    spec = inspect.getfullargspec(executor.fn)
    known = {*spec.args, *spec.kwonlyargs}
    bound = inspect.getcallargs(
        executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
    )

    def names(name: str, value: Any) -> Iterator[str]:
        if hasattr(value, "data_ptr") or isinstance(value, TensorDescriptor):
            yield name
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from names(f"{name}[{i}]", item)

    return [n for k, v in bound.items() if k not in executor.constexprs for n in names(k, v)]


Fault = TypeVar("Fault", bound=BaseException)


def cause(error: BaseException | None, kind: type[Fault]) -> Fault | None:
    """The error of this kind inside the interpreter's nested wrappers."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None


@contextmanager
def replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    originals = [(target, name, getattr(target, name)) for target, name, _ in changes]
    for target, name, value in changes:
        setattr(target, name, value)
    try:
        yield
    finally:
        for target, name, value in originals:
            setattr(target, name, value)


@contextmanager
def _poisoned_empty() -> Iterator[None]:
    """Let torch fill `torch.empty` with NaN (integers: their maximum)."""
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # The public function imports torch's compiler first, which takes seconds.
    switch = torch._C._set_deterministic_algorithms
    switch(True, warn_only=True)
    try:
        yield
    finally:
        switch(was, warn_only=warned)


@contextmanager
def strict(*, raise_on_conflict: bool = True) -> Iterator[Meter]:
    """Within the block, Triton launches are checked and metered; see the package's docstring.

    Blocks may nest: launches then go to the inner meter only. On exit Triton is as it was.
    `raise_on_conflict=False` leaves races in `meter.conflicts`, for kernels that order programs by
    means that the interpreter does not see.
    """
    require_interpreter()
    module = triton_interpreter
    session = _Session(raise_on_conflict)
    call, convert = _unpatched(module.GridExecutor.__call__), _unpatched(module._implicit_cvt)
    reduce, scan = module.ReduceOps.apply_impl, module.ScanOps.apply_impl
    reduce, scan = _unpatched(reduce), _unpatched(scan)
    changes = [
        (module, "interpreter_builder", session.builder),
        (module.interpreter_semantic, "builder", session.builder),
        (module.GridExecutor, "__call__", _patch(call, session.run)),
        (module, "_implicit_cvt", _patch(convert, session.convert)),
        (module.ReduceOps, "apply_impl", _patch(reduce, session.reduce)),
        (module.ScanOps, "apply_impl", _patch(scan, session.reduce)),
    ]
    with replaced(changes), _poisoned_empty():
        yield session.meter


def _patch(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    def patched(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    patched.__wrapped__ = original  # type: ignore[attr-defined]
    return patched


def _unpatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's own function, also when a strict block is already open."""
    original: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return original
