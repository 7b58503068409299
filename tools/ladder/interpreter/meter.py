"""What a strict run measured: traffic by tensor, conflicts, arithmetic.

All counts are exact integers, so a test can state a kernel's byte budget as an equation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SECTOR = 32
Program = tuple[int, int, int]


@dataclass
class Traffic:
    """Bytes one kernel parameter moved.

    `loaded`, `stored` and `atomic` are the bytes of all active lanes of all accesses. The `sector`
    counts are in bytes of 32-byte sectors, each counted once for every program that touched it
    (what leaves the L1 cache at least); the `footprint` counts each sector once (DRAM at least).
    """

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    sectors_loaded: int = 0
    sectors_stored: int = 0
    footprint_loaded: int = 0
    footprint_stored: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass(frozen=True)
class Conflict:
    """`program` made the access named second in `kind`; `other` the first (None: several did)."""

    kind: str
    kernel: str
    tensor: str
    element: int
    program: Program
    other: Program | None

    def __str__(self) -> str:
        other = "several programs" if self.other is None else f"program {self.other}"
        return (
            f"{self.kind} in kernel {self.kernel!r}: program {self.program} and {other} "
            f"share element {self.element} of {self.tensor!r}"
        )


@dataclass
class Launch:
    """One kernel launch. `reduced` counts the elements that entered reductions and scans."""

    kernel: str
    grid: Program = (1, 1, 1)
    bytes: dict[str, Traffic] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)
    flops: int = 0
    dot_flops: int = 0
    transcendentals: int = 0
    reduced: int = 0


@dataclass
class Meter:
    """Everything since `strict()` was entered."""

    launches: list[Launch] = field(default_factory=list)

    def of(self, kernel: str) -> Meter:
        """The launches of one kernel only."""
        return Meter([launch for launch in self.launches if launch.kernel == kernel])

    @property
    def bytes(self) -> dict[str, Traffic]:
        """Traffic by parameter name, summed over launches; untouched tensors are there with 0."""
        total: dict[str, Traffic] = {}
        for launch in self.launches:
            for name, traffic in launch.bytes.items():
                total.setdefault(name, Traffic()).__iadd__(traffic)
        return total

    def total_requested(self, names: Iterable[str] | None = None) -> int:
        """Bytes loaded, stored and updated atomically, by all parameters or by `names`."""
        by_name = self.bytes
        chosen = [by_name[n] for n in (by_name if names is None else names)]
        return sum(t.loaded + t.stored + t.atomic for t in chosen)

    @property
    def conflicts(self) -> list[Conflict]:
        return [c for launch in self.launches for c in launch.conflicts]

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        return sum(launch.dot_flops for launch in self.launches)

    @property
    def transcendentals(self) -> int:
        return sum(launch.transcendentals for launch in self.launches)

    @property
    def reduced(self) -> int:
        return sum(launch.reduced for launch in self.launches)
