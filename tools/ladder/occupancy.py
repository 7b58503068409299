"""Occupancy: how many blocks of a kernel fit on one multiprocessor, and what limits them.

    blocks = min(warp slots, register file, shared memory, block slots)

each divided by what one block takes after rounding up to the hardware's allocation unit.
The NVIDIA formula and limits are those of `cuda_occupancy.h` with the opt-in shared-memory limit
and the default carve-out; a test compares the two over a grid of inputs. The AMD formula follows
LLVM's for CDNA3: VGPRs and AGPRs share one file, and a workgroup of more than one wave takes one
of 16 barriers. It is plain Python so that reading a report needs no compiler.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

KIB = 1024


@dataclass(frozen=True)
class DeviceLimits:
    """What one multiprocessor (SM or CU) offers, and the units it is handed out in."""

    warp_size: int
    max_threads_per_block: int
    max_warps: int
    max_blocks: int
    subpartitions: int
    registers_per_subpartition: int  # 32-bit registers per lane times lanes
    register_unit: int  # per warp
    max_registers_per_thread: int
    shared_per_block: int  # opt-in maximum
    shared_per_multiprocessor: int
    shared_unit: int
    shared_reserved: int  # taken by the driver from every block
    scalar_registers_per_subpartition: int = 0  # AMD only; 0 means no limit


def _nvidia(threads: int, blocks: int, shared_kib: int, reserved: int = KIB) -> DeviceLimits:
    return DeviceLimits(
        warp_size=32,
        max_threads_per_block=1024,
        max_warps=threads // 32,
        max_blocks=blocks,
        subpartitions=4,
        registers_per_subpartition=65536 // 4,
        register_unit=256,
        max_registers_per_thread=256,
        shared_per_block=shared_kib * KIB - reserved,
        shared_per_multiprocessor=shared_kib * KIB,
        shared_unit=128 if reserved else 256,
        shared_reserved=reserved,
    )


LIMITS: dict[str, DeviceLimits] = {
    "sm_75": _nvidia(1024, 16, 64, reserved=0),
    "sm_80": _nvidia(2048, 32, 164),
    "sm_86": _nvidia(1536, 16, 100),
    "sm_89": _nvidia(1536, 24, 100),
    "sm_90": _nvidia(2048, 32, 228),
    "sm_100": _nvidia(2048, 32, 228),
    "sm_120": _nvidia(1536, 24, 100),
    "gfx942": DeviceLimits(
        warp_size=64,
        max_threads_per_block=1024,
        max_warps=32,
        max_blocks=16,
        subpartitions=4,
        registers_per_subpartition=512 * 64,
        register_unit=8 * 64,
        max_registers_per_thread=512,
        shared_per_block=64 * KIB,
        shared_per_multiprocessor=64 * KIB,
        shared_unit=512,
        shared_reserved=0,
        scalar_registers_per_subpartition=800,
    ),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps resident on one multiprocessor; `limiter` names the scarce resource."""

    blocks: int
    warps: int
    fraction: float
    limiter: str

    def as_dict(self) -> dict[str, int | float | str]:
        return asdict(self)


def limits(arch: str) -> DeviceLimits:
    """Limits of `arch`; the suffix of `sm_90a` or `sm_100a` does not change them."""
    name = arch.rstrip("af") if arch.startswith("sm_") else arch
    if name not in LIMITS:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(LIMITS)}")
    return LIMITS[name]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(
    arch: str, *, threads: int, registers: int, shared: int, scalar_registers: int = 0
) -> Occupancy:
    """Occupancy of a kernel of `threads` threads a block.

    `registers` are per thread (on AMD vector plus accumulation registers), `shared` is static plus
    dynamic bytes a block, `scalar_registers` are per wave (AMD only).
    Zero blocks means that the kernel cannot be launched at all.
    """
    device = limits(arch)
    if threads <= 0:
        raise ValueError(f"threads must be positive, got {threads}")
    warps = -(-threads // device.warp_size)
    bounds = {
        "warps": device.max_warps // warps if threads <= device.max_threads_per_block else 0,
        "registers": _blocks_by_registers(device, warps, registers, scalar_registers),
        "shared": _blocks_by_shared(device, shared),
        "blocks": _block_slots(device, arch, warps),
    }
    limiter = min(bounds, key=lambda name: bounds[name])
    blocks = bounds[limiter]
    return Occupancy(blocks, blocks * warps, blocks * warps / device.max_warps, limiter)


def _block_slots(device: DeviceLimits, arch: str, warps: int) -> int:
    needs_no_barrier = arch.startswith("gfx") and warps == 1
    return device.max_warps if needs_no_barrier else device.max_blocks


def _blocks_by_registers(
    device: DeviceLimits, warps: int, registers: int, scalar_registers: int
) -> int:
    if registers > device.max_registers_per_thread:
        return 0
    per_warp = max(_round_up(registers * device.warp_size, device.register_unit), 1)
    warps_per_subpartition = device.registers_per_subpartition // per_warp
    if scalar_registers and device.scalar_registers_per_subpartition:
        scalar_warps = device.scalar_registers_per_subpartition // _round_up(scalar_registers, 16)
        warps_per_subpartition = min(warps_per_subpartition, scalar_warps)
    # The launch check assumes that a block spreads evenly over the subpartitions.
    if warps_per_subpartition < -(-warps // device.subpartitions):
        return 0
    return warps_per_subpartition * device.subpartitions // warps


def _blocks_by_shared(device: DeviceLimits, shared: int) -> int:
    if shared > device.shared_per_block:
        return 0
    per_block = _round_up(shared + device.shared_reserved, device.shared_unit)
    return device.shared_per_multiprocessor // per_block if per_block else 1 << 30
