"""`matmul`: a matrix product with fp32 sums, whatever the dtypes of its operands and its result.

    out[i, j] = sum over k of a[i, k] b[k, j]      [M, K] x [K, N] -> [M, N]

Internal: operators on hidden states and weights call it, the package does not export it. `torch.mm`
on the CPU gives a 16-bit result for 16-bit operands, and is many times slower on them than on fp32
where the processor has no 16-bit products; casting the operands first would cost a copy of the
weights. Here they are widened a tile at a time, in the first- and second-level cache, or multiplied
as bf16, with fp32 sums, where the processor can. On every other device this is `torch.mm`. It has
no gradient: it is called inside autograd Functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops._rows import has_tangent
from pydistill.reference.matmul import matmul_out, matmul_reference, shares_memory, write

OP = _registry.operator("matmul", {torch.float32, torch.bfloat16, torch.float16}, internal=True)
_registry.kernel(
    OP,
    "matmul_out",
    "(Tensor a, Tensor b, bool accumulate, bool narrow, Tensor(a!) out) -> ()",
    matmul_out,
)


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    narrow: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The product of two matrices with fp32 sums.

    Args:
        a: `[M, K]`, fp32, bf16 or fp16 (fp64: see `impl`). Either stride may be 1; if neither is,
            it is copied. b may have another dtype.
        b: `[K, N]`, the same.
        out: `[M, N]` to write to, one of its strides 1; it shares no memory with `a` or `b`.
        accumulate: add the product to `out`, which is fp32 (fp64 with an fp64 operand).
        narrow: an fp32 operand beside a bf16 one may be rounded to bf16, and is where the processor
            multiplies bf16 (AVX512-BF16): relative errors of 2^-8 in its numbers, twice the speed.
        out_dtype: of the result; fp32 (fp64 with an fp64 operand) unless `out` is given.
        impl: "auto", "reference" or "cpu". "auto" is the CPU kernel on the CPU and `torch.mm`
            elsewhere; operands of fp64 always go to `torch.mm`. "reference" is `torch.mm` in fp32.

    Returns:
        `out`, or a new contiguous `[M, N]`.

    Raises:
        ValueError: the shapes do not agree, devices differ, or `out` is not what it should be.
        TypeError: a dtype is not floating point.
        RuntimeError: an operand or `out` needs a gradient or has a tangent.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}; they must be [M, K] and"
            " [K, N]."
        )
    exact = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    out = _output(a, b, out, accumulate, out_dtype, exact)
    for name, x in (("a", a), ("b", b), ("out", out)):
        _check(name, x, a.device)
        if name != "out" and not torch.compiler.is_compiling() and shares_memory(x, out):
            raise ValueError(f"out shares memory with {name}; give it memory of its own.")
    backend = "torch"
    if impl != "auto" or a.device.type == "cpu":
        dtype = torch.float64 if exact == torch.float64 or out.dtype == torch.float64 else a.dtype
        backend = _registry.resolve("matmul", impl, a.device.type, dtype)
    if backend == "reference":
        write(matmul_reference(a, b), accumulate, out)
    elif backend == "torch":
        _torch_mm(a, b, accumulate, out)
    else:
        _registry.overload("matmul_out", backend)(_unit(a), _unit(b), accumulate, narrow, out)
    torch.autograd.graph.increment_version(out)
    return out


def _output(
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    accumulate: bool,
    out_dtype: torch.dtype | None,
    exact: torch.dtype,
) -> Tensor:
    """`out`, checked, or a new one."""
    shape = (a.shape[0], b.shape[1])
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs out, the tensor to add the product to.")
        return torch.empty(shape, dtype=out_dtype or exact, device=a.device)
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {shape}.")
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype={out_dtype} is not out's, {out.dtype}; leave it away.")
    if accumulate and out.dtype != exact:
        raise ValueError(f"accumulate=True needs an out of {exact}, not {out.dtype}.")
    (rows, columns), (down, across) = shape, out.stride()
    by_rows = (across == 1 or columns <= 1) and (down >= columns or rows <= 1)
    by_columns = (down == 1 or rows <= 1) and (across >= rows or columns <= 1)
    if out.numel() and not (by_rows or by_columns):
        raise ValueError(
            f"out has strides {(down, across)}; one must be 1 and no element there twice."
        )
    return out


def _check(name: str, x: Tensor, device: torch.device) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {x.dtype}; cast it to fp32, bf16 or fp16.")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and a on {device}; move it there.")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"matmul has no gradient; detach {name}, or use torch.mm.")
    if has_tangent(x):
        raise RuntimeError(f"matmul drops tangents, and {name} has one; use torch.mm.")


def _unit(x: Tensor) -> Tensor:
    """`x`, or its contiguous copy if no stride is 1."""
    (rows, columns), (down, across) = x.shape, x.stride()
    return x if down == 1 or across == 1 or rows <= 1 or columns <= 1 else x.contiguous()


def _torch_mm(a: Tensor, b: Tensor, accumulate: bool, out: Tensor) -> None:
    """`torch.mm` as the device has it: with a wider result where it can, else widened first."""
    mm, addmm = torch.ops.aten.mm, torch.ops.aten.addmm
    if a.dtype == b.dtype == out.dtype:
        addmm.out(out, a, b, out=out) if accumulate else mm.out(a, b, out=out)
    elif a.dtype == b.dtype and out.dtype == torch.float32 and a.is_cuda and _WIDER_RESULT:
        if accumulate:
            addmm.dtype_out(out, a, b, torch.float32, out=out)
        else:
            mm.dtype_out(a, b, torch.float32, out=out)
    else:
        write(matmul_reference(a, b), accumulate, out)


_WIDER_RESULT = hasattr(torch.ops.aten.mm, "dtype_out")
