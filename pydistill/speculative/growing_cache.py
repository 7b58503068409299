"""A key-value cache layer that appends in place, and whose rows can be moved.

transformers' own `DynamicLayer` copies all it holds for each new token. This one writes behind what
it holds, in memory that doubles when it is full, and rolls back by forgetting columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

_Layer: Any = cache_utils.DynamicLayer  # its own annotations change between releases


class GrowingLayer(_Layer):
    """`keys` and `values [B, heads, columns, size]` are the first columns of larger buffers."""

    is_initialized: bool
    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        given = (key_states, value_states)
        if not self.is_initialized:
            self.begin(*(x[:, :, :0] for x in given))
        begin = self.keys.shape[2]
        self.extend(key_states.shape[2])
        for buffer, x in zip(self.buffers, given, strict=True):
            buffer[:, :, begin : begin + x.shape[2]] = x
        return self.keys, self.values

    def begin(self, keys: Tensor, values: Tensor | None = None) -> None:
        """Of the dtype, device and sizes of these, `[B, heads, 0, size]`."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = (keys, keys if values is None else values)
        self._show(0)

    def extend(self, count: int) -> None:
        """Adds columns, which whoever calls this writes to `buffers`."""
        end = self.keys.shape[2] + count
        if end > self.buffers[0].shape[2]:
            self._move(lambda x: x, max(2 * end, 64))
        self._show(end)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; a negative number, as in transformers."""
        if self.is_initialized:
            self._show(self.keys.shape[2] - abs(tokens_to_remove))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._move(lambda x: x[indices], self.buffers[0].shape[2])
            self._show(self.keys.shape[2])

    def realign(self, moves: Sequence[tuple[int, int, int, int]], width: int) -> None:
        """Moves columns `begin ... begin + length` of `row` to `to ...`, for each `(row, begin,
        to, length)`, and keeps the first `width` columns."""
        if not self.is_initialized:
            return
        for row, begin, to, length in moves:
            for x in self.buffers:
                x[row, :, to : to + length] = x[row, :, begin : begin + length].clone()
        self._show(width)

    def _move(self, pick: Callable[[Tensor], Tensor], capacity: int) -> None:
        width, moved = self.keys.shape[2], []
        for x in self.buffers:
            kept = pick(x[:, :, :width])
            new = torch.empty(
                (*kept.shape[:2], capacity, kept.shape[3]), dtype=x.dtype, device=x.device
            )
            new[:, :, :width] = kept
            moved.append(new)
        self.buffers = (moved[0], moved[1])

    def _show(self, width: int) -> None:
        self.keys, self.values = (x[:, :, :width] for x in self.buffers)
