"""Read what a compiler made of a kernel: registers, spills, shared memory, instruction mix.

`analyse_cubin` takes the cubin of either Triton or nvcc and returns one `Resources` per kernel in
it, from `cuobjdump -res-usage` and the SASS; `analyse_amdgcn` reads the metadata and text of AMD
assembly, so it needs no tool at all. One record type for both, because the questions are the same:
does it spill, does it load 16 bytes at a time, does it use the matrix unit, how full is the
multiprocessor. Both Triton and the CUDA toolkit ship cuobjdump and nvdisasm; either pair will do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from tools.ladder.occupancy import Occupancy, limits, occupancy


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. Instruction counts are static: a loop body counts once.

    `shared` is static shared memory (Triton's is dynamic and comes with its metadata).
    `spill_loads` and `spill_stores` count local-memory instructions (LDL, STL; on AMD, scratch
    instructions). `wide_loads` and `wide_stores` are the global accesses of at least 16 bytes a
    thread among `loads` and `stores`. `exp2` counts MUFU.EX2 or v_exp_f32.
    """

    arch: str
    name: str
    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    async_copies: int
    matrix: int
    exp2: int
    atomics: int
    barriers: int
    instructions: int
    scalar_registers: int = 0

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)

    def occupancy(self, threads: int, dynamic_shared: int = 0) -> Occupancy:
        return occupancy(
            self.arch,
            threads=threads,
            registers=self.registers,
            shared=self.shared + dynamic_shared,
            scalar_registers=self.scalar_registers,
        )


def find_binary_tool(name: str) -> str:
    """Path of `cuobjdump` or `nvdisasm`: Triton's copy, else the one on PATH or in the toolkit."""
    spec = find_spec("triton")
    folders = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} not found; install triton or put the CUDA toolkit on PATH")
    return found


def analyse_cubin(cubin: bytes | str | os.PathLike[str]) -> dict[str, Resources]:
    """Resources of every kernel in a cubin (its bytes or its path), keyed by symbol name."""
    if not isinstance(cubin, bytes):
        return _analyse_cubin_file(Path(cubin))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _analyse_cubin_file(path)


def _cuobjdump(option: str, path: Path) -> str:
    command = [find_binary_tool("cuobjdump"), option, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cuobjdump cannot read {path}: {done.stderr.strip()}")
    return done.stdout


def _analyse_cubin_file(path: Path) -> dict[str, Resources]:
    usage = _cuobjdump("-res-usage", path)
    sass = _cuobjdump("-sass", path)
    arch = re.search(r"code for (sm_\w+)", sass)
    if arch is None:
        raise ValueError(f"{path} holds no SASS")
    bodies = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    code = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    found: dict[str, Resources] = {}
    for name, line in re.findall(
        r"^\s*Function (\S+):\s*\n\s*(REG:.*)$", usage, flags=re.MULTILINE
    ):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[name] = _from_sass(arch[1], name, used, code[name])
    return found


def _from_sass(arch: str, name: str, used: dict[str, int], code: str) -> Resources:
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    wide = re.compile(r"\.(128|256)\b")

    def count(pattern: str) -> int:
        return sum(re.match(pattern, op) is not None for op in lines)

    def count_wide(prefix: str) -> int:
        return sum(op.startswith(prefix) and wide.search(op) is not None for op in lines)

    # From sm_90 on, the tool adds the driver's reserved kilobyte to any kernel that uses some.
    reserved = limits(arch).shared_reserved if int(arch[3:].rstrip("af")) >= 90 else 0
    return Resources(
        arch=arch,
        name=name,
        registers=used["REG"],
        stack=used["STACK"],
        spill_loads=count("LDL"),
        spill_stores=count("STL"),
        shared=max(used["SHARED"] - reserved, 0),
        loads=count(r"LDG\b"),
        wide_loads=count_wide("LDG."),
        stores=count("STG"),
        wide_stores=count_wide("STG."),
        async_copies=count(r"LDGSTS|UBLKCP|UTMALDG"),
        matrix=count(r"[HQIDO]MMA|[HQI]GMMA|UT[CQHOI]\w*MMA"),
        exp2=count(r"MUFU\.EX2"),
        atomics=count(r"(ATOM|ATOMG|RED|REDG)\b"),
        barriers=count(r"BAR\b"),
        instructions=len(lines) - count("NOP"),
    )


def analyse_amdgcn(assembly: str, arch: str = "gfx942") -> Resources:
    """Resources of the one kernel in an AMD assembly listing."""

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"assembly has no .{key} in its metadata")
        return int(found[1])

    kernel = re.search(r"^\s+\.name:\s+(\S+)$", assembly, flags=re.MULTILINE)
    if kernel is None:
        raise ValueError("assembly names no kernel in its metadata")
    ops = re.findall(r"^\t([a-z]\w+)", assembly.split(".amdhsa_kernel")[0], flags=re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, op) is not None for op in ops)

    return Resources(
        arch=arch,
        name=kernel[1],
        # The metadata's vgpr_count is the unified total: accumulation registers are part of it.
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        spill_loads=count(r"scratch_load"),
        spill_stores=count(r"scratch_store"),
        shared=field("group_segment_fixed_size"),
        loads=count(r"(global|buffer|flat)_load"),
        wide_loads=count(r"(global|buffer|flat)_load_dwordx4"),
        stores=count(r"(global|buffer|flat)_store"),
        wide_stores=count(r"(global|buffer|flat)_store_dwordx4"),
        async_copies=count(r"(global|buffer)_load_lds"),
        matrix=count(r"v_s?mfma"),
        exp2=count(r"v_exp_f(32|16)"),
        atomics=count(r"(global|buffer|flat|ds)_atomic|ds_add"),
        barriers=count(r"s_barrier"),
        instructions=sum(
            re.match(r"(s|v|ds|global|buffer|flat|scratch)_", op) is not None for op in ops
        ),
        scalar_registers=field("sgpr_count"),
    )
