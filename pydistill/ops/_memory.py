"""Memory for big gradients on the CPU, kept from one step to the next.

A training step makes the gradient of its logits, uses it once and frees it. The C library returns a
block of that size to the system, and the next step pays for its pages again, which costs about as
much as computing the gradient. So the block freed last is kept for the next request. It is marked
MADV_FREE: the system takes its pages as soon as it needs memory, and until then they count as
resident.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from pydistill.ops._rows import values_readable

LEAST = 32 << 20  # bytes; smaller blocks the C library keeps itself
_HUGE_PAGE = 2 << 20

_kept: list[mmap.mmap] = []  # at most one


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous, of the shape, dtype and device of `x`. Elsewhere than in eager
    calls on the CPU, and for small blocks, it is torch's own memory."""
    size = x.numel() * x.element_size()
    if size < LEAST or not hasattr(mmap, "MADV_FREE") or not values_readable(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    try:
        block = _kept.pop()
    except IndexError:
        block = None
    if block is None or not size <= len(block) <= 2 * size:
        block = None  # unmapped before the next one is mapped
        rounded = -(-size // _HUGE_PAGE) * _HUGE_PAGE
        block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(block)  # the tensor's storage holds it, so it dies with the storage
    weakref.finalize(view, _keep, block).atexit = False
    return torch.frombuffer(view, dtype=x.dtype, count=x.numel()).view(x.shape)


def _keep(block: mmap.mmap) -> None:
    with suppress(OSError):
        block.madvise(mmap.MADV_FREE)
    _kept[:] = [block]


def release() -> None:
    """Gives the kept block back to the system now."""
    _kept.clear()
