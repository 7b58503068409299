"""The dry run compiles for every target as the JIT would, and reads the binaries rightly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from tools.ladder.dry_run import GATE, TARGETS, compile_for, dry_run
from tools.ladder.occupancy import LIMITS, limits, occupancy
from tools.ladder.resources import Resources, analyse_amdgcn, analyse_cubin, find_binary_tool

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@triton.jit
def exp2_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.exp2(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def gather_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = x
    for _ in range(4):
        y = tl.sort(x * y)
    tl.store(y_ptr + i, x - y)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, k, M: tl.constexpr, K: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros([M, M], tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + i[:, None] * k + start + j[None, :])
        b = tl.load(b_ptr + (start + j[:, None]) * M + i[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + i[:, None] * M + i[None, :], total)


def exp2(n: int = 4096, skew: int = 0, block: int = 1024) -> None:
    x, y = torch.empty(n + skew)[skew:], torch.empty(n)
    exp2_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block)


def dot(n: int) -> None:
    a, c = torch.empty(n, n, dtype=torch.bfloat16), torch.empty(n, n)
    dot_kernel[(1,)](a, a, c, N=n)


class TestDryRun:
    @pytest.mark.parametrize("target", GATE)
    def test_aligned_kernel_loads_wide_and_does_not_spill(self, target: str) -> None:
        with dry_run(target) as log:
            exp2()
        (report,) = log.kernels
        assert (report.kernel, report.target, report.grids) == ("exp2_kernel", target, [(4, 1, 1)])
        lanes = report.warps * limits(target).warp_size
        found = report.resources
        assert found.exp2 == 1024 // lanes
        assert found.loads == found.wide_loads == 1024 // lanes // 4
        assert found.stores == found.wide_stores == 1024 // lanes // 4
        assert (report.spills, found.stack, report.shared, found.matrix) == (0, 0, 0, 0)
        assert 4 <= found.registers <= 32
        assert report.occupancy.fraction == 1.0
        assert report.arguments == {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "1024"}

    @pytest.mark.parametrize("target", GATE)
    def test_misaligned_pointer_loses_its_wide_loads(self, target: str) -> None:
        with dry_run(target) as log:
            exp2(skew=1)
        (report,) = log.kernels
        found = report.resources
        assert found.wide_loads < found.loads
        assert found.wide_stores == found.stores

    @pytest.mark.parametrize("target", GATE)
    def test_dot_uses_the_matrix_unit_and_shared_memory(self, target: str) -> None:
        with dry_run(target) as log:
            dot(64)
        report = log["dot_kernel"]
        assert report.resources.matrix > 0
        assert report.shared >= 64 * 64 * 2
        assert report.resources.barriers > 0
        assert 0 < report.occupancy.blocks

    @pytest.mark.parametrize("target", GATE)
    def test_reduction_reports_atomics_and_little_shared_memory(self, target: str) -> None:
        with dry_run(target) as log:
            sum_kernel[(1,)](torch.empty(1024), torch.empty(1), BLOCK=1024)
        report = log["sum_kernel"]
        assert report.resources.atomics == 1
        assert 0 < report.shared <= 64

    @pytest.mark.parametrize("target", ["sm_80", "sm_90"])
    def test_spills_are_seen(self, target: str) -> None:
        with dry_run(target) as log:
            exp2_kernel[(1,)](torch.empty(8192), torch.empty(8192), 8191, BLOCK=8192, maxnreg=16)
        report = log["exp2_kernel"]
        assert report.resources.registers <= 24
        assert report.resources.spill_loads > 0
        assert report.resources.spill_stores > 0
        assert report.resources.stack > 0

    def test_too_much_shared_memory_raises(self) -> None:
        """Six pairs of 64 x 128 bfloat16 tiles take 192 KiB: sm_80 has 163, sm_90 has 227."""

        def launch() -> None:
            a = torch.empty(64 * 4096, dtype=torch.bfloat16)
            c = torch.empty(64 * 64)
            matmul_kernel[(1,)](a, a, c, 4096, M=64, K=128, num_stages=7)

        with dry_run("sm_80"), pytest.raises(OutOfResources, match="shared memory"):
            launch()
        with dry_run("sm_90") as log:
            launch()
        assert 166912 < log["matmul_kernel"].shared <= 232448
        assert log["matmul_kernel"].occupancy.limiter == "shared"

    def test_binaries_of_targets_are_not_confused(self) -> None:
        reports = compile_for(exp2, ["sm_80", "sm_90", "gfx942", "sm_80"])
        for target, (report,) in reports.items():
            assert report.resources.arch.startswith(target)
        assert len({TARGETS[t].device for t in TARGETS}) == len(TARGETS)

    def test_second_run_finds_the_cached_kernel(self) -> None:
        def run() -> list[dict[str, object]]:
            with dry_run("sm_90") as log:
                exp2()
                exp2()
            assert [len(r.grids) for r in log.kernels] == [2]
            return [r.as_dict() for r in log.kernels]

        assert run() == run()

    def test_specialisations_are_reported_apart(self) -> None:
        with dry_run("sm_90") as log:
            exp2()
            exp2(n=4095)
            exp2(block=512)
        assert len(log.kernels) == 3
        with pytest.raises(KeyError, match="3 reports"):
            log["exp2_kernel"]

    def test_meta_tensors_will_do(self) -> None:
        x = torch.empty(1 << 33, device="meta")
        with dry_run("gfx942") as log:
            exp2_kernel[(1 << 23,)](x, x, 1 << 33, BLOCK=1024)
        assert log["exp2_kernel"].arguments["n"] == "i64"

    def test_nothing_is_launched(self) -> None:
        x, y = torch.ones(1024), torch.zeros(1024)
        with dry_run("sm_90"):
            exp2_kernel[(1,)](x, y, 1024, BLOCK=1024)
        assert y.eq(0).all()

    def test_driver_is_restored(self) -> None:
        before = triton.runtime.driver._active
        with pytest.raises(KeyError), dry_run("sm_90") as log:
            log["nothing"]
        assert triton.runtime.driver._active is before

    def test_host_code_may_ask_about_the_device(self) -> None:
        with dry_run("sm_90"):
            driver = triton.runtime.driver.active
            found = driver.utils.get_device_properties(driver.get_current_device())
        assert (found["multiprocessor_count"], found["max_shared_mem"]) == (132, 232448)

    def test_unknown_target_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"'sm_70'; known are sm_75"), dry_run("sm_70"):
            pass

    @pytest.mark.interpreter
    def test_interpreter_process_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), dry_run("sm_90"):
            pass


class TestResources:
    def test_amd_metadata(self) -> None:
        assembly = (
            "k:\n\tv_exp_f32_e32 v0, v0\n\tglobal_load_dwordx4 v[0:3], v[0:1], off\n"
            "\tglobal_load_dword v4, v[0:1], off\n\tscratch_store_dword off, v0, s0\n"
            "\tscratch_load_dwordx2 v[0:1], off, s0\n\ts_barrier\n\tv_mfma_f32_32x32x8_bf16_1k a\n"
            "\t.amdhsa_kernel k\n\tglobal_load_dword after\n"
            "    .group_segment_fixed_size: 512\n    .name:           k\n"
            "    .private_segment_fixed_size: 24\n    .sgpr_count:     19\n"
            "    .sgpr_spill_count: 0\n    .vgpr_count:     130\n    .vgpr_spill_count: 3\n"
        )
        expected = Resources(
            arch="gfx942",
            name="k",
            registers=130,
            stack=24,
            spill_loads=1,
            spill_stores=1,
            shared=512,
            loads=2,
            wide_loads=1,
            stores=0,
            wide_stores=0,
            async_copies=0,
            matrix=1,
            exp2=1,
            atomics=0,
            barriers=1,
            instructions=7,
            scalar_registers=19,
        )
        assert analyse_amdgcn(assembly) == expected
        assert expected.occupancy(256).blocks == 3

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to make a cubin")
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
    def test_cubin_of_nvcc_with_two_kernels(self, tmp_path: Path, arch: str) -> None:
        source = tmp_path / "two.cu"
        source.write_text(
            'extern "C" __global__ void plain(float* y) { y[threadIdx.x] = 1.f; }\n'
            'extern "C" __global__ void reduce(const float4* x, float* y) {\n'
            "  __shared__ float s[32];\n"
            "  float4 v = x[threadIdx.x];\n"
            "  s[threadIdx.x % 32] = v.x + v.y + v.z + v.w;\n"
            "  __syncthreads();\n"
            "  atomicAdd(y, exp2f(s[(threadIdx.x + 1) % 32]));\n"
            "}\n"
        )
        cubin = tmp_path / "two.cubin"
        subprocess.run(
            ["nvcc", "-O3", f"-arch={arch}", "-cubin", str(source), "-o", str(cubin)], check=True
        )
        kernels = analyse_cubin(cubin)
        assert kernels == analyse_cubin(cubin.read_bytes())
        assert sorted(kernels) == ["plain", "reduce"]
        plain, reduce = kernels["plain"], kernels["reduce"]
        assert (plain.loads, plain.stores, plain.shared, plain.barriers) == (0, 1, 0, 0)
        assert (reduce.loads, reduce.wide_loads, reduce.stores) == (1, 1, 0)
        assert (reduce.shared, reduce.barriers, reduce.atomics, reduce.exp2) == (128, 1, 1, 1)
        assert reduce.arch == arch
        assert reduce.occupancy(256).fraction == 1.0

    def test_unreadable_cubin_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "not.cubin"
        path.write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"not\.cubin"):
            analyse_cubin(path)


OCCUPANCY_PROGRAM = r"""
#include <cstddef>
#include <cstdio>
struct cudaDeviceProp;
struct cudaFuncAttributes;
#include "cuda_occupancy.h"
int main() {
  int major, minor, threads_per_sm, per_sm, optin, reserved, threads, regs, shared;
  while (std::scanf("%d %d %d %d %d %d %d %d %d", &major, &minor, &threads_per_sm, &per_sm, &optin,
                    &reserved, &threads, &regs, &shared) == 9) {
    cudaOccDeviceProp p;
    p.computeMajor = major;
    p.computeMinor = minor;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_per_sm;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = per_sm;
    p.numSms = 1;
    p.sharedMemPerBlockOptin = optin + reserved;  // checked against the size with the reserve
    p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024;
    a.numRegs = regs;
    a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = optin;
    a.numBlockBarriers = 1;
    cudaOccDeviceState s;
    cudaOccResult r;
    int bad = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
    std::printf("%d\n", bad ? -1 : r.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture(scope="module")
def occupancy_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = [
        Path(triton.__file__).parent / "backends/nvidia/include",
        Path(find_binary_tool("cuobjdump")).parents[1] / "include",
    ]
    found = [f for f in folders if (f / "cuda_occupancy.h").exists()]
    if not found or shutil.which("g++") is None:
        pytest.skip("needs cuda_occupancy.h (Triton's or the toolkit's) and g++")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "main.cpp").write_text(OCCUPANCY_PROGRAM)
    command = ["g++", "-O1", f"-I{found[0]}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"


class TestOccupancy:
    @pytest.mark.parametrize("arch", [a for a in LIMITS if a.startswith("sm_")])
    def test_agrees_with_nvidia(self, occupancy_program: Path, arch: str) -> None:
        device = limits(arch)
        major, minor = divmod(int(arch[3:]), 10)
        cases = [
            (threads, registers, shared)
            for threads in (32, 64, 96, 128, 256, 512, 768, 1024)
            for registers in (16, 32, 33, 64, 72, 96, 128, 168, 200, 255)
            for shared in (0, 16, 1024, 9000, 32768, 50000, 65536, 101376, 166912, 232448)
        ]
        fixed = [
            major,
            minor,
            device.max_warps * 32,
            device.shared_per_multiprocessor,
            device.shared_per_block,
            device.shared_reserved,
        ]
        lines = "".join(f"{' '.join(map(str, (*fixed, *case)))}\n" for case in cases)
        done = subprocess.run(
            [occupancy_program], input=lines, capture_output=True, text=True, check=True
        )
        expected = [max(int(line), 0) for line in done.stdout.split()]
        ours = [occupancy(arch, threads=t, registers=r, shared=s).blocks for t, r, s in cases]
        assert ours == expected

    def test_agrees_with_the_amd_compiler(self) -> None:
        """LLVM prints waves per SIMD beside the code it makes."""
        from tools.ladder import dry_run as module

        launches = [lambda: dot(64), lambda: dot(128), exp2, lambda: exp2(n=1 << 16, block=16384)]
        for launch in launches:
            with dry_run("gfx942") as log:
                launch()
            (report,) = log.kernels
            (kernel_hash,) = log._reports
            text = module._stage(kernel_hash, "amdgcn").read_text()
            waves = int(text.split("; Occupancy: ")[1].split()[0])
            ours = occupancy(
                "gfx942",
                threads=report.warps * 64,
                registers=report.resources.registers,
                shared=report.resources.shared,
                scalar_registers=report.resources.scalar_registers,
            )
            assert ours.warps == waves * 4

    def test_limiter_is_named(self) -> None:
        assert occupancy("sm_90", threads=128, registers=255, shared=0).limiter == "registers"
        assert occupancy("sm_90", threads=128, registers=32, shared=100_000).limiter == "shared"
        assert occupancy("sm_90", threads=1024, registers=32, shared=0).limiter == "warps"
        assert occupancy("sm_90", threads=32, registers=32, shared=0).limiter == "blocks"
        assert occupancy("sm_90", threads=128, registers=32, shared=232_449).blocks == 0
        assert occupancy("gfx942", threads=64, registers=32, shared=0).blocks == 32
        assert occupancy("gfx942", threads=128, registers=32, shared=0).blocks == 16

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(ValueError, match="'sm_12'"):
            limits("sm_12")
        with pytest.raises(ValueError, match="threads must be positive, got 0"):
            occupancy("sm_90", threads=0, registers=1, shared=0)
        assert limits("sm_90a") is limits("sm_90")
