"""The memory of one launch: which elements each tensor owns, and which program touched them.

A `View` is one tensor argument. A `Shadow` covers a whole storage, because two arguments may be
views of one buffer and still race; it holds for every element the program that last wrote it, read
it, or updated it atomically. Everything here dies with the launch, so a tensor that an earlier
launch was given is out of bounds in the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.ladder.interpreter.errors import OutOfBoundsError
from tools.ladder.interpreter.meter import SECTOR, Conflict, Launch, Program, Traffic

Addresses = NDArray[np.int64]

LOAD, STORE, ATOMIC = "load", "store", "atomic"
_SEVERAL = -1


class View:
    """The bytes that one tensor argument may touch."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.itemsize = tensor.element_size()
        self.shape = tuple(tensor.shape)
        self.strides = tuple(tensor.stride())
        self.storage = tensor.untyped_storage().data_ptr()
        self.start = tensor.data_ptr()
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.elements = last + 1 if tensor.numel() else 0
        self.end = self.start + self.elements * self.itemsize
        self._owned = None if tensor.is_contiguous() else self._owned_elements()
        sectors = (self.end - 1) // SECTOR - self.start // SECTOR + 1 if self.elements else 0
        # Last program to touch each sector, plus one; 0 for none.
        self._sectors = {kind: np.zeros(sectors, np.int64) for kind in (LOAD, STORE)}

    def _owned_elements(self) -> NDArray[np.bool_] | None:
        """Which elements of a strided view are its own, and not in the gaps; None if all are."""
        offsets = np.zeros(self.shape, np.int64)
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = np.arange(size) * stride
            offsets += steps.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
        owned = np.zeros(self.elements, bool)
        owned[offsets.ravel()] = True
        return None if owned.all() else owned

    def misses(self, addresses: Addresses, size: int) -> NDArray[np.bool_]:
        """Which accesses of `size` bytes do not fall, aligned, on elements of this view."""
        offsets = addresses - self.start
        bad = (offsets < 0) | (offsets > self.end - self.start - size)
        bad |= offsets % min(size, self.itemsize) != 0
        if self._owned is not None and not bad.all():
            inside = np.where(bad, 0, offsets)
            bad |= ~self._owned[inside // self.itemsize]
            bad |= ~self._owned[(inside + size - 1) // self.itemsize]
        return bad

    def count_sectors(self, kind: str, addresses: Addresses, program: int) -> tuple[int, int]:
        """Sectors new to this program, and new to the launch."""
        seen = self._sectors[kind]
        touched = np.unique(addresses // SECTOR - self.start // SECTOR)
        before = seen[touched]
        seen[touched] = program
        return int((before != program).sum()), int((before == 0).sum())

    def __str__(self) -> str:
        return f"{self.name!r} (shape {self.shape}, strides {self.strides})"


class Shadow:
    """Who touched each granule of one storage. Program numbers start at 1; -1 means several."""

    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start, self.granule = start, granule
        count = -(-(end - start) // granule)
        self.state = {kind: np.zeros(count, np.int64) for kind in (LOAD, STORE, ATOMIC)}

    def touch(
        self, kind: str, addresses: Addresses, size: int, program: int
    ) -> dict[str, tuple[int, int]]:
        """Enter an access; for each kind it conflicts with, the first address and the other."""
        first = (addresses - self.start) // self.granule
        index = first
        if size > self.granule:
            index = (first[:, None] + np.arange(size // self.granule)).ravel()
        conflicts: dict[str, tuple[int, int]] = {}
        for earlier in _CONFLICTS_WITH[kind]:
            owner = self.state[earlier][index]
            clash = (owner != 0) & (owner != program)
            if clash.any():
                where = int(clash.argmax())
                conflicts[earlier] = (
                    self.start + int(index[where]) * self.granule,
                    int(owner[where]),
                )
        mine = self.state[kind]
        owner = mine[index]
        mine[index] = np.where((owner == 0) | (owner == program), program, _SEVERAL)
        return conflicts


_CONFLICTS_WITH = {LOAD: (STORE, ATOMIC), STORE: (LOAD, STORE, ATOMIC), ATOMIC: (LOAD, STORE)}
_VERB = {LOAD: "read", STORE: "write", ATOMIC: "atomic update"}


class LaunchMemory:
    """Bounds, races and traffic of one launch."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.views: list[View] = []
        self._shadows: dict[int, Shadow] = {}

    def add(self, name: str, tensor: torch.Tensor) -> View:
        view = View(name, tensor)
        self.views.append(view)
        self.launch.bytes[name] = Traffic()
        return view

    def access(
        self,
        kind: str,
        view: View | None,
        addresses: Addresses,
        size: int,
        program: Program,
    ) -> None:
        """Check and count the active lanes of one access; `view` is None for a bare address."""
        if not addresses.size:
            return
        view = self._find(kind, addresses, size, program) if view is None else view
        bad = view.misses(addresses, size)
        if bad.any():
            self._fail(kind, view, int(addresses[bad.argmax()]), program)
        self._count(kind, view, addresses, size, program)
        if self.launch.grid != (1, 1, 1):
            self._check_races(kind, view, addresses, size, program)

    def _find(self, kind: str, addresses: Addresses, size: int, program: Program) -> View:
        for view in self.views:
            if not view.misses(addresses, size).any():
                return view
        raise OutOfBoundsError(
            f"kernel {self.launch.kernel!r}, program {program}: {kind} at address "
            f"{int(addresses[0]):#x} hits no tensor of this launch; "
            f"they are {', '.join(str(v) for v in self.views)}"
        )

    def _fail(self, kind: str, view: View, address: int, program: Program) -> None:
        index, rest = divmod(address - view.start, view.itemsize)
        where = f"element {index}" + (f" plus {rest} bytes" if rest else "")
        inside = 0 <= index < view.elements
        reason = (
            "which is not an element of the view"
            if inside
            else f"outside its {view.elements} addressable elements"
        )
        raise OutOfBoundsError(
            f"kernel {self.launch.kernel!r}, program {program}: {kind} of {view} at {where}, "
            f"{reason}"
        )

    def _linear(self, program: Program) -> int:
        x, y, z = program
        return 1 + x + self.launch.grid[0] * (y + self.launch.grid[1] * z)

    def _program(self, linear: int) -> Program | None:
        if linear == _SEVERAL:
            return None
        rest, x = divmod(linear - 1, self.launch.grid[0])
        z, y = divmod(rest, self.launch.grid[1])
        return x, y, z

    def _count(
        self, kind: str, view: View, addresses: Addresses, size: int, program: Program
    ) -> None:
        traffic = self.launch.bytes[view.name]
        requested = int(addresses.size) * size
        number = self._linear(program)
        if kind == ATOMIC:
            traffic.atomic += requested
            return
        fresh, first = view.count_sectors(kind, addresses, number)
        if kind == LOAD:
            traffic.loaded += requested
            traffic.sectors_loaded += SECTOR * fresh
            traffic.footprint_loaded += SECTOR * first
        else:
            traffic.stored += requested
            traffic.sectors_stored += SECTOR * fresh
            traffic.footprint_stored += SECTOR * first

    def _shadow(self, view: View) -> Shadow:
        if view.storage not in self._shadows:
            group = [v for v in self.views if v.storage == view.storage and v.elements]
            self._shadows[view.storage] = Shadow(
                min(v.start for v in group),
                max(v.end for v in group),
                min(v.itemsize for v in group),
            )
        return self._shadows[view.storage]

    def _check_races(
        self, kind: str, view: View, addresses: Addresses, size: int, program: Program
    ) -> None:
        shadow = self._shadow(view)
        for earlier, (address, other) in shadow.touch(
            kind, addresses, size, self._linear(program)
        ).items():
            self.launch.conflicts.append(
                Conflict(
                    f"{_VERB[kind]} after {_VERB[earlier]}",
                    self.launch.kernel,
                    view.name,
                    (address - view.start) // view.itemsize,
                    program,
                    self._program(other),
                )
            )


def active_addresses(pointers: NDArray[Any], mask: NDArray[Any]) -> Addresses:
    """Addresses of the lanes that a mask leaves on."""
    pointers, mask = np.broadcast_arrays(pointers, mask)
    active: Addresses = pointers[mask.astype(bool)].astype(np.int64)
    return active
