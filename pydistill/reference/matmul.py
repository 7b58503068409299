"""The definition of `matmul`: `torch.mm` in fp32 (fp64 if an operand is), on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """`[M, K] x [K, N] -> [M, N]`, fp32, or fp64 if an operand is."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.mm(a.to(dtype), b.to(dtype))


def matmul_out(a: Tensor, b: Tensor, accumulate: bool, narrow: bool, out: Tensor) -> None:
    """The same as an `out` kernel, for torch's dispatcher; it never rounds an operand."""
    if any(shares_memory(x, out) for x in (a, b)):
        raise RuntimeError("out must not share memory with an operand")
    write(matmul_reference(a, b), accumulate, out)


def write(product: Tensor, accumulate: bool, out: Tensor) -> None:
    """`product` to `out`, or added to it."""
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether the spans of two matrices, from first to last element, meet."""
    (x_begin, x_end), (y_begin, y_end) = _span(x), _span(y)
    return x_begin < y_end and y_begin < x_end


def _span(x: Tensor) -> tuple[int, int]:
    if not x.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
