"""Interpret many programs of a launch at once, for laws that take a hundred thousand of them.

    with lanes(4096):
        launcher(x, y)                          # unmodified host code on CPU tensors

Triton's interpreter runs one program after another, at about ten microseconds an operation. Here an
operation is that of up to 4096 programs: every value has a leading dimension of lanes, one a
program, before the block's own. Where programs take different ways (a condition, the bounds of a
loop), they are split by their answers and run again from the start. So stores wait until a group
has come to its end, and a program that reads what it has written itself raises.

What a program computes is bit for bit what it computes alone. Blocks have one dimension; arithmetic
in bfloat16, dots, atomics and descriptors raise. `strict()` says what a program may not do; this
does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tools.ladder.interpreter.bfloat16 import from_float32, to_float32
from tools.ladder.interpreter.errors import LadderError, UnsupportedError
from tools.ladder.interpreter.session import cause, float_argument, replaced, require_interpreter

Array = np.ndarray[Any, Any]
_REDUCTIONS: dict[Any, Callable[..., Any]] = {
    tl.standard._sum_combine: np.sum,
    tl.standard._elementwise_max: np.nanmax,
    tl.standard._elementwise_min: np.nanmin,
}


class _Split(Exception):
    """The lanes of a group disagree; `answers` has one of each."""

    def __init__(self, answers: Array) -> None:
        super().__init__("lanes disagree")
        self.answers = answers


class LanesBuilder(InterpreterBuilder):  # type: ignore[misc]
    """Triton's NumPy builder on values [lanes, block]; a scalar is a block of one. What is the same
    in all lanes may lack their dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: Array = np.zeros((0, 3), np.int32)  # of the group that runs
        self.stores: list[tuple[Array, Array, Array]] = []

    def create_get_program_id(self, axis: int) -> Any:
        return TensorHandle(self.programs[:, axis : axis + 1], tl.int32)

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        return self.create_broadcast(arg, ret_ty.shape)

    def create_broadcast(self, arg: Any, shape: Any) -> Any:
        if len(shape) > 1:
            raise UnsupportedError(f"a block of shape {shape}: lanes take one dimension")
        return TensorHandle(
            np.broadcast_to(arg.data, (*arg.data.shape[:-1], *(shape or (1,)))), arg.dtype.scalar
        )

    def create_unsplat(self, arg: Any) -> Any:
        return TensorHandle(arg.data[..., :1], arg.dtype.scalar)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        element = ptrs.get_element_ty()
        kind = triton_interpreter._get_np_dtype(element)
        rest = np.zeros(1, kind) if other is None else other.data
        pointers, on, rest = _aligned(ptrs.data, mask.data, rest)
        for written, _values, stored in self.stores:
            if np.isin(pointers[on], written[stored]).any():
                raise UnsupportedError(
                    "a program reads what it has written, which waits for its end"
                )
        loaded = triton_interpreter._interpreter.load(pointers, on, rest, kind)
        return TensorHandle(loaded, element)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *_: Any, **__: Any) -> Any:
        # Of a pointer that is the same in all lanes, every lane stores; the last one's value stays.
        lanes = np.broadcast_to(ptrs.data, (len(self.programs), ptrs.data.shape[-1]))
        pointers, values, on = _aligned(lanes, value.data, mask.data)
        self.stores.append((pointers, values, on))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(to_float32(src.data), tl.float32)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(from_float32(src.data), tl.bfloat16)
        if source != target and tl.bfloat16 in (source, target):
            raise UnsupportedError(f"lanes do not cast {source} to {target}; go through float32")
        return super().cast_impl(src, dst_type)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise UnsupportedError("lanes do not compute in bfloat16; cast to float32 first")
        return super().binary_op(lhs, rhs, op)

    def _unsupported(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("lanes do not interpret this operation; use strict()")

    create_dot = create_dot_scaled = create_atomic_rmw = create_atomic_cas = _unsupported
    create_atomic_load = create_atomic_store = create_atomic_poll = _unsupported
    create_make_tensor_descriptor = create_reshape = create_trans = create_cat = _unsupported
    create_expand_dims = create_join = create_split = create_histogram = _unsupported
    create_gather = create_assert = create_assume = _unsupported


def _aligned(*arrays: Array) -> tuple[Array, ...]:
    return tuple(np.ascontiguousarray(x) for x in np.broadcast_arrays(*arrays))


def _reduced(operation: Any, inputs: Any) -> Any:
    """Stands for ReduceOps.apply_impl."""
    reduction = _REDUCTIONS.get(operation.combine_fn)
    if reduction is None or operation.keep_dims or len(inputs) > 1:
        raise UnsupportedError("lanes reduce by sum, min or max, to scalars")
    (x,) = inputs
    found = reduction(x.handle.data, axis=-1, keepdims=True)
    kind = triton_interpreter._get_np_dtype(x.dtype)
    return tl.core.tensor(TensorHandle(found.astype(kind), x.dtype), x.dtype)


def _scanned(operation: Any, inputs: Any) -> Any:
    """Stands for ScanOps.apply_impl."""
    if operation.combine_fn is not tl.standard._sum_combine or operation.reverse:
        raise UnsupportedError("lanes scan by sums, forwards")
    (x,) = inputs
    kind = triton_interpreter._get_np_dtype(x.dtype)
    found = np.cumsum(x.handle.data, axis=-1).astype(kind)
    return [tl.core.tensor(TensorHandle(found, x.dtype), x.type)]


def _answer(x: Any) -> Any:
    """The one number of a scalar, if all lanes agree on it."""
    data: Array = x.handle.data
    if data.shape[-1] != 1:
        return True  # as Triton's interpreter does: its own code asks whether a block is there
    answers = data.reshape(-1)
    if (answers != answers[0]).any():
        raise _Split(answers)
    return answers[0]


def _run(builder: LanesBuilder, kernel: Callable[[], None], programs: Array) -> None:
    """Runs the kernel for a group of programs, and for its parts where these disagree."""
    waiting = [programs]
    while waiting:
        builder.programs, builder.stores = waiting.pop(), []
        try:
            kernel()
        except (_Split, triton_interpreter.InterpreterError) as error:
            split = cause(error, _Split)
            if split is None:
                raise (cause(error, LadderError) or error) from None
            waiting += [builder.programs[split.answers == x] for x in np.unique(split.answers)]
            continue
        for pointers, values, on in builder.stores:
            triton_interpreter._interpreter.store(pointers, values, on)


@contextmanager
def lanes(width: int = 4096) -> Iterator[None]:
    """Within the block, Triton launches run up to `width` programs at once."""
    require_interpreter()
    module = triton_interpreter
    builder = LanesBuilder()
    patch_tensor = module._patch_lang_tensor

    def convert(argument: Any) -> Any:
        return (
            float_argument(argument) if type(argument) is float else module._implicit_cvt(argument)
        )

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        """Stands for GridExecutor.__call__."""
        spec = inspect.getfullargspec(executor.fn)
        known = {*spec.args, *spec.kwonlyargs}
        kwargs = {name: x for name, x in kwargs.items() if name in known}
        scope = module._patch_lang(executor.fn)
        try:
            bound = inspect.getcallargs(executor.fn, *args, **kwargs)
            bound = {
                name: x if name in executor.constexprs else convert(x) for name, x in bound.items()
            }
            grid = executor.grid(bound) if callable(executor.grid) else executor.grid
            grid = (*grid, 1, 1)[:3]
            builder.set_grid_dim(*grid)
            programs = np.indices(grid, np.int32).reshape(3, -1).T
            with np.errstate(all="ignore"):
                for start in range(0, len(programs), width):
                    group = programs[start : start + width]
                    _run(builder, lambda: executor.fn(**bound), group)
        finally:
            scope.restore()

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__bool__", lambda x: bool(_answer(x)))
        scope.set_attr(tensor, "__index__", lambda x: int(_answer(x)))

    with replaced(
        [
            (module, "interpreter_builder", builder),
            (module.interpreter_semantic, "builder", builder),
            (module.GridExecutor, "__call__", launch),
            (module, "_patch_lang_tensor", patch),
            (module.ReduceOps, "apply_impl", _reduced),
            (module.ScanOps, "apply_impl", _scanned),
        ]
    ):
        yield
