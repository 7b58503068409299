"""Tensors surrounded by poison.

A guarded copy lives in the middle of a larger storage, with its strides and its alignment to 64
bytes kept. Everything round it, and the gaps of a strided view, holds NaN (integers: 0xA5 bytes),
so that a value read from outside shows in the result, and a value written there is found by
`check`. The strict interpreter catches both by address already; guards catch them for any backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_ALIGNMENT = 64
_BAND = 256  # elements on either side


@dataclass(frozen=True)
class Guarded:
    """`tensor` is the copy to hand to a kernel."""

    tensor: torch.Tensor
    _whole: torch.Tensor
    _outside: torch.Tensor
    _before: torch.Tensor

    def check_guards(self) -> None:
        """Raise if anything outside the tensor was written since it was made."""
        itemsize = self.tensor.element_size()
        now = self._whole.view(torch.uint8).view(-1, itemsize)
        changed = (now != self._before).any(1) & self._outside
        if changed.any():
            index = int(changed.nonzero()[0]) - self.tensor.storage_offset()
            raise AssertionError(
                f"guard written at element {index} of a tensor of shape "
                f"{tuple(self.tensor.shape)}, strides {self.tensor.stride()}"
            )


def guarded(tensor: torch.Tensor) -> Guarded:
    """Copy a CPU tensor into a storage with guard bands; shape, strides and values are kept."""
    if tensor.device.type != "cpu":
        raise ValueError(f"guarded needs a CPU tensor, got one on {tensor.device}; move it first")
    source = tensor.detach()
    itemsize = source.element_size()
    last = sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True))
    span = last + 1 if source.numel() else 0
    unit = max(_ALIGNMENT // itemsize, 1)
    offset = _BAND * unit + source.data_ptr() % _ALIGNMENT // itemsize
    whole = torch.empty(offset + span + _BAND * unit, dtype=source.dtype)
    _poison(whole)
    outside = torch.ones(whole.numel(), dtype=torch.bool)
    if span:
        layout = (source.shape, source.stride(), offset)
        inside = torch.zeros(whole.numel(), dtype=torch.int8)
        inside.as_strided(*layout).fill_(1)
        outside = inside == 0
        copy = whole.clone()
        copy[offset : offset + span] = source.as_strided((span,), (1,))
        whole = torch.where(outside, whole, copy)
    view = whole.as_strided(source.shape, source.stride(), offset)
    before = whole.view(torch.uint8).view(-1, itemsize).clone()
    return Guarded(view.requires_grad_(tensor.requires_grad), whole, outside, before)


def _poison(whole: torch.Tensor) -> None:
    if whole.dtype.is_floating_point or whole.dtype.is_complex:
        whole.fill_(float("nan"))
    elif whole.dtype == torch.bool:
        whole.fill_(True)
    else:
        whole.view(torch.uint8).fill_(0xA5)


@dataclass
class Guards:
    """Guards for all tensors of a test: `x = guards(x)` for each, `guards.check()` at the end."""

    _guarded: list[Guarded] = field(default_factory=list)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        one = guarded(tensor)
        self._guarded.append(one)
        return one.tensor

    def check(self) -> None:
        for one in self._guarded:
            one.check_guards()
