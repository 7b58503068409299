"""Compile what a Triton launcher launches, for a GPU that is not there.

    with dry_run("sm_90") as log:
        launcher(torch.empty(...), ...)        # unmodified host code, CPU or meta tensors
    log.kernels                                # one KernelReport per kernel specialisation

A driver of our own tells Triton's JIT that a device of the asked architecture is active. Every
launch is then specialised on the arguments (divisibility by 16, ones, pointer ranges) and compiled
to a binary exactly as on that device; only the last step, the launch, records instead of running.
Compiling ahead of time without the JIT's specialisation would lose every wide load, so reports
made that way would describe kernels that no user runs. Asking for more shared memory than the
target has raises Triton's OutOfResources.

Needs a process in which TRITON_INTERPRET is unset. Launchers must ask for device facts through
`triton.runtime.driver.active`, not through `torch.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tools.ladder.occupancy import Occupancy, limits, occupancy
from tools.ladder.resources import Resources, analyse_amdgcn, analyse_cubin

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Target:
    """`device` is the id the JIT caches binaries under, so no two targets may share one."""

    gpu: GPUTarget
    device: int
    multiprocessors: int


TARGETS: dict[str, Target] = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 75, 40),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 80, 108),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 86, 84),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 89, 142),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 90, 132),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 100, 148),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 120, 188),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 942, 304),
}
GATE: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class KernelReport:
    """One specialisation of one kernel on one target.

    `arguments` maps each parameter to its type, or to its value where the specialisation made it
    a constant. `shared` is all shared memory a block takes. `grids` lists the grid of every launch.
    """

    kernel: str
    target: str
    warps: int
    stages: int
    shared: int
    arguments: dict[str, str]
    resources: Resources
    occupancy: Occupancy
    grids: list[Grid] = field(default_factory=list, compare=False)

    @property
    def spills(self) -> int:
        return self.resources.spill_loads + self.resources.spill_stores

    def as_dict(self) -> dict[str, Any]:
        """A flat record for a JSON table; launches are left out, they are not the compiler's."""
        skipped = {"arch", "name", "shared"}
        resources = {k: v for k, v in self.resources.as_dict().items() if k not in skipped}
        return {
            "kernel": self.kernel,
            "target": self.target,
            "warps": self.warps,
            "stages": self.stages,
            "shared": self.shared,
            **resources,
            "occupancy": self.occupancy.fraction,
            "limiter": self.occupancy.limiter,
            "arguments": dict(self.arguments),
        }


@dataclass
class DryRunLog:
    """What was launched while a `dry_run` was active, in the order of first launch."""

    target: str
    _reports: dict[str, KernelReport] = field(default_factory=dict)

    @property
    def kernels(self) -> list[KernelReport]:
        return list(self._reports.values())

    def __getitem__(self, kernel: str) -> KernelReport:
        """The one report of `kernel`; several specialisations must be told apart by the caller."""
        found = [r for r in self.kernels if r.kernel == kernel]
        if len(found) != 1:
            names = [r.kernel for r in self.kernels]
            raise KeyError(f"{len(found)} reports for kernel {kernel!r} among {names}")
        return found[0]

    def record(self, launcher: _RecordingLauncher, grid: Grid) -> None:
        key = launcher.metadata.hash
        if key not in self._reports:
            self._reports[key] = _report(self.target, launcher.source, launcher.metadata)
        self._reports[key].grids.append(grid)


# Files of every stage of compilation, by kernel hash: the JIT keeps loaded kernels for the life of
# the process, so a second dry run of a target must still find the first one's assembly.
_stage_files: dict[str, dict[str, str]] = {}


def _remember_stages(
    module: object, function: object, name: str, metadata_group: dict[str, str], hash: str
) -> None:
    _stage_files[hash] = metadata_group


def _stage(kernel_hash: str, extension: str) -> Path:
    files = _stage_files[kernel_hash]
    return Path(next(path for name, path in files.items() if name.endswith(f".{extension}")))


def _report(target: str, source: Any, metadata: Any) -> KernelReport:
    if TARGETS[target].gpu.backend == "cuda":
        (resources,) = analyse_cubin(_stage(metadata.hash, "cubin")).values()
    else:
        resources = analyse_amdgcn(_stage(metadata.hash, "amdgcn").read_text(), target)
    # Triton allocates shared memory at launch, so the binary itself usually declares none.
    shared = max(metadata.shared, resources.shared)
    return KernelReport(
        kernel=metadata.name,
        target=target,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared=shared,
        arguments=_arguments(source),
        resources=resources,
        occupancy=occupancy(
            target,
            threads=metadata.num_warps * metadata.warp_size,
            registers=resources.registers,
            shared=shared,
            scalar_registers=resources.scalar_registers,
        ),
    )


def _arguments(source: Any) -> dict[str, str]:
    names = source.fn.arg_names
    arguments = {name: str(kind) for name, kind in source.signature.items()}
    for path, value in source.constants.items():
        arguments[names[path[0]]] = str(getattr(value, "value", value))
    return arguments


class _RecordingLauncher:
    """Stands where the compiled C launcher would; logs to whichever dry run is active."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        driver = triton.runtime.driver.active
        if not isinstance(driver, DryDriver):
            raise RuntimeError("a kernel compiled by dry_run was launched outside of it")
        driver.log.record(self, (x, y, z))


class _Utils:
    def __init__(self, name: str) -> None:
        self._name = name

    def get_device_properties(self, device: int) -> dict[str, Any]:
        del device
        target, device_limits = TARGETS[self._name], limits(self._name)
        return {
            "arch": target.gpu.arch,
            "max_shared_mem": device_limits.shared_per_block,
            "multiprocessor_count": target.multiprocessors,
            "max_num_regs": device_limits.registers_per_subpartition * device_limits.subpartitions,
            "warpSize": device_limits.warp_size,
            "cooperativeLaunch": True,
        }

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        # No module handle: Triton would otherwise unload it through whatever driver is active
        # when the kernel dies.
        return (None, 0, 0, 0, limits(self._name).max_threads_per_block)


class DryDriver(DriverBase):  # type: ignore[misc]
    """The driver the JIT talks to during a dry run."""

    launcher_cls = _RecordingLauncher

    def __init__(self, log: DryRunLog) -> None:
        self.log = log
        self.utils = _Utils(log.target)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.log.target].gpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return TARGETS[self.log.target].device

    def set_current_device(self, device: int) -> None:
        del device

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_device_interface(self) -> None:
        return None

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def compile_once(call: Callable[[], object], **_: Any) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return compile_once


@contextmanager
def dry_run(target: str) -> Iterator[DryRunLog]:
    """Within the block, Triton launches compile for `target` and are logged, not run."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "dry_run compiles, but TRITON_INTERPRET is set: unset it before triton is imported"
        )
    log = DryRunLog(target)
    config = triton.runtime.driver
    previous = config._active
    config.set_active(DryDriver(log))
    triton.knobs.runtime.kernel_load_start_hook.add(_remember_stages)
    try:
        yield log
    finally:
        config._active = previous
        triton.knobs.runtime.kernel_load_start_hook.remove(_remember_stages)


def compile_for(
    launch: Callable[[], object], targets: Sequence[str] = GATE
) -> dict[str, list[KernelReport]]:
    """Reports of every kernel that `launch` launches, by target."""
    reports: dict[str, list[KernelReport]] = {}
    for target in targets:
        with dry_run(target) as log:
            launch()
        reports[target] = log.kernels
    return reports
