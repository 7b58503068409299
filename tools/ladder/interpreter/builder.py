"""Triton's NumPy builder with every memory access checked and bfloat16 made right.

The interpreter executes a kernel by calling one builder method per operation, so a subclass sees
everything. Which tensor a pointer belongs to travels in its type: Triton hands a handle's type
through every pointer operation (addition, broadcast, reshape), and only a cast to another pointer
type or a select between two tensors needs help.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tools.ladder.interpreter.bfloat16 import from_float32, from_float64, to_float32
from tools.ladder.interpreter.errors import UnsupportedError
from tools.ladder.interpreter.memory import (
    ATOMIC,
    LOAD,
    STORE,
    LaunchMemory,
    View,
    active_addresses,
)
from tools.ladder.interpreter.meter import Launch

Array = np.ndarray[Any, Any]
Operation = Callable[..., Any]

_FLOPS = frozenset(
    {np.add, np.subtract, np.multiply, np.divide, np.fmod}
    | {np.minimum, np.maximum, np.fmin, np.fmax}
)
_TRANSCENDENTALS = frozenset({np.exp, np.exp2, np.log, np.log2, np.sqrt, np.sin, np.cos})


class ViewPointer(tl.pointer_type):  # type: ignore[misc]
    """A pointer type that remembers the tensor argument it came from."""

    def __init__(self, plain: Any, view: View) -> None:
        super().__init__(plain.element_ty, plain.address_space, plain.const)
        self.view = view


def is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Any) -> Array:
    """Numbers to compute with."""
    data: Array = handle.data
    return to_float32(data) if is_bfloat16(handle) else data


def _view(handle: Any) -> View | None:
    pointer = handle.dtype.scalar
    return pointer.view if isinstance(pointer, ViewPointer) else None


class StrictBuilder(InterpreterBuilder):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._memory: LaunchMemory | None = None

    def begin(self, memory: LaunchMemory | None) -> None:
        self._memory = memory

    @property
    def memory(self) -> LaunchMemory:
        if self._memory is None:
            raise RuntimeError("a kernel operation ran outside of a launch")
        return self._memory

    @property
    def launch(self) -> Launch:
        return self.memory.launch

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self.launch.grid = (nx, ny, nz)

    # Memory. Unmasked, descriptor and atomic_load/store accesses all arrive at the masked ones.

    def _access(self, kind: str, pointers: Any, mask: Any) -> Any:
        element = pointers.get_element_ty()
        size = triton_interpreter._get_np_dtype(element).itemsize
        if not isinstance(mask, TensorHandle):
            mask = TensorHandle(np.asarray(mask), tl.int1)
        addresses = active_addresses(pointers.data, mask.data)
        self.memory.access(kind, _view(pointers), addresses, size, self.grid_idx)
        return mask

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        mask = self._access(LOAD, ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *rest, **named)

    def create_masked_store(
        self, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        mask = self._access(STORE, ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest, **named)

    def create_atomic_load(self, ptr: Any, mask: Any, sem: Any, scope: Any) -> Any:
        mask = self._access(ATOMIC, ptr, mask)
        return InterpreterBuilder.create_masked_load(self, ptr, mask, None, None, True)

    def create_atomic_store(self, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        mask = self._access(ATOMIC, ptr, mask)
        return InterpreterBuilder.create_masked_store(self, ptr, val, mask, None)

    def create_atomic_poll(self, *_: Any) -> Any:
        raise UnsupportedError("atomic_poll waits for another program, but programs run in turn")

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        if is_bfloat16(val):
            raise UnsupportedError("atomics on bfloat16 are not interpreted: accumulate in fp32")
        mask = self._access(ATOMIC, ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        self._access(ATOMIC, ptr, np.ones_like(ptr.data, dtype=bool))
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    def create_descriptor_load(self, desc: Any, *rest: Any) -> Any:
        nan = triton_interpreter._ir.PADDING_OPTION.PAD_NAN
        if desc.base.get_element_ty() == tl.bfloat16 and desc.padding == nan:
            raise UnsupportedError("a bfloat16 descriptor padded with NaN is not interpreted")
        return super().create_descriptor_load(desc, *rest)

    # Pointers.

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        result = super().create_bitcast(src, dst_type)
        view = _view(src)
        if view is not None and isinstance(result.dtype, tl.pointer_type):
            result.dtype = ViewPointer(result.dtype, view)
        return result

    def create_select(self, cond: Any, lhs: Any, rhs: Any) -> Any:
        result = super().create_select(cond, lhs, rhs)
        if isinstance(result.dtype, ViewPointer) and _view(lhs) is not _view(rhs):
            plain = result.dtype
            result.dtype = tl.pointer_type(plain.element_ty, plain.address_space, plain.const)
        return result

    # Arithmetic.

    def binary_op(self, lhs: Any, rhs: Any, op: Operation) -> Any:
        if op in _FLOPS and lhs.dtype.scalar.is_floating():
            self.launch.flops += np.broadcast(lhs.data, rhs.data).size
        if not (is_bfloat16(lhs) or is_bfloat16(rhs)):
            return super().binary_op(lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(from_float32(result), tl.bfloat16)

    # A GPU's minimum and maximum return the number when the other operand is NaN; early versions
    # of the interpreter return the NaN.
    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Operation) -> Any:
        if op is np.where or not is_bfloat16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return TensorHandle(
            from_float32(op(_values(lhs), _values(rhs), _values(other))), tl.bfloat16
        )

    def unary_op(self, arg: Any, op: Operation) -> Any:
        if op in _TRANSCENDENTALS:
            self.launch.transcendentals += arg.data.size
        if is_bfloat16(arg):
            return TensorHandle(from_float32(op(_values(arg))), tl.bfloat16)
        return super().unary_op(arg, op)

    def create_erf(self, arg: Any) -> Any:
        self.launch.transcendentals += arg.data.size
        return super().create_erf(arg)

    def create_rsqrt(self, arg: Any) -> Any:
        self.launch.transcendentals += arg.data.size
        return super().create_rsqrt(arg)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        self.launch.flops += 2 * np.broadcast(x.data, y.data, z.data).size
        if not is_bfloat16(z):
            return super().create_fma(x, y, z)
        product = _values(x).astype(np.float64) * _values(y)
        return TensorHandle(from_float64(product + _values(z)), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        self.launch.dot_flops += 2 * a.data.size * b.data.shape[-1]
        if not (is_bfloat16(a) or is_bfloat16(b)):
            return super().create_dot(a, b, d, *rest)
        product = np.matmul(_values(a), _values(b), dtype=np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def create_dot_scaled(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("dot_scaled is not interpreted")

    # Casts. All of Triton's int/float conversions arrive at cast_impl.

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source != target and tl.bfloat16 in (source, target):
            wide = TensorHandle(_values(src), tl.float32) if source == tl.bfloat16 else src
            if target == tl.bfloat16:
                return TensorHandle(from_float32(wide.data.astype(np.float32)), tl.bfloat16)
            return wide if target == tl.float32 else super().cast_impl(wide, dst_type)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16:
            src = TensorHandle(_values(src), tl.float32)
            return (
                src if target == tl.float32 else self.create_fp_to_fp(src, dst_type, rounding_mode)
            )
        if target == tl.bfloat16:
            if source.primitive_bitwidth == 8:
                src = super().create_fp_to_fp(src, tl.float32, rounding_mode)
            truncate = rounding_mode == triton_interpreter._ir.ROUNDING_MODE.RTZ
            return TensorHandle(
                from_float32(src.data.astype(np.float32), truncate=truncate), tl.bfloat16
            )
        return super().create_fp_to_fp(src, dst_type, rounding_mode)
