"""Big blocks of memory on the CPU, kept from one step to the next: gradients of logits and of
weights, and the buffers of the fused-linear operators.

A training step makes such a block, uses it once and frees it. The C library returns a block of that
size to the system, and the next step pays for its pages again, which costs about as much as
computing what goes into it, and several times as much on a virtual machine whose host has taken
them back. So freed blocks are kept for later requests, as long as all blocks together are no more
than were once in use at the same time. They are marked MADV_FREE: the system takes their pages as
soon as it needs memory, and until then they count as resident.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from pydistill.ops._rows import values_readable

LEAST = 16 << 20  # bytes; smaller blocks the C library keeps itself, or are cheap
_HUGE_PAGE = 2 << 20


class _Blocks:
    """The blocks that are mapped, of which some are free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._freed: deque[mmap.mmap] = deque()  # filled by finalizers, which may take no lock
        self._free: list[mmap.mmap] = []  # the one freed last comes last
        self._mapped = 0  # bytes, of free blocks and of those in use
        self._most = 0  # bytes in use at one moment

    def take(self, size: int) -> mmap.mmap:
        with self._lock:
            self._collect()
            if fitting := [b for b in reversed(self._free) if len(b) >= size]:
                block = min(fitting, key=len)  # what it has beyond `size` the system may take
                self._free.remove(block)
                return block
            used = self._mapped - sum(len(b) for b in self._free)
            self._most = max(self._most, used + size)
            while self._free and self._mapped + size > self._most:
                self._mapped -= len(self._free.pop(0))  # unmapped before the next one is mapped
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._mapped += size
        with suppress(AttributeError, OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give(self, block: mmap.mmap) -> None:
        with suppress(OSError):
            block.madvise(mmap.MADV_FREE)
        self._freed.append(block)

    def _collect(self) -> None:
        while self._freed:
            self._free.append(self._freed.popleft())

    def sizes(self) -> list[int]:
        with self._lock:
            self._collect()
            return [len(b) for b in self._free]

    def release(self) -> None:
        with self._lock:
            self._collect()
            self._mapped -= sum(len(b) for b in self._free)
            self._most = self._mapped
            self._free.clear()


_blocks = _Blocks()


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous, of the shape, dtype and device of `x`. Elsewhere than in eager
    calls on the CPU, and for small blocks, it is torch's own memory."""
    size = x.numel() * x.element_size()
    if size < LEAST or not hasattr(mmap, "MADV_FREE") or not values_readable(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = _blocks.take(-(-size // _HUGE_PAGE) * _HUGE_PAGE)
    view = memoryview(block)  # the tensor's storage holds it, so it dies with the storage
    weakref.finalize(view, _blocks.give, block).atexit = False
    return torch.frombuffer(view, dtype=x.dtype, count=x.numel()).view(x.shape)


def kept() -> list[int]:
    """Bytes of each kept block."""
    return _blocks.sizes()


def release() -> None:
    """Gives the kept blocks back to the system now."""
    _blocks.release()
