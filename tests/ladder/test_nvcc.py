"""The compile gate of CUDA sources: every target, and the binary's resources."""

from pathlib import Path

import pytest

from tools.ladder.cuda.nvcc import TARGETS, compile_cubin, compile_targets, find_nvcc
from tools.ladder.cuda.sim import CudaBuildError

pytestmark = [
    pytest.mark.ladder,
    pytest.mark.skipif(find_nvcc() is None, reason="the CUDA compiler (nvcc) is not installed"),
]

FIXTURES = Path(__file__).parent / "cuda_fixtures"


def test_row_kernel_compiles_for_every_target() -> None:
    gate = compile_targets(FIXTURES / "row_logsumexp.cu")
    assert tuple(gate) == TARGETS
    for arch, kernels in gate.items():
        assert list(kernels) == [
            "row_logsumexp<__half, 128>",
            "row_logsumexp<__nv_bfloat16, 128>",
            "row_logsumexp<float, 128>",
        ]
        for name, kernel in kernels.items():
            resources = kernel.resources
            assert (resources.arch, resources.name) == (arch, name)
            assert kernel.threads == 128
            assert resources.spill_loads == resources.spill_stores == resources.stack == 0
            assert 16 <= resources.registers <= 64
            # Scratch of the two reductions: 4 warps of 8 bytes each.
            assert resources.shared == 2 * 4 * 8
            assert resources.wide_loads == (2 if "float," in name else 1)
            assert kernel.occupancy.fraction == 1.0


def test_spills_and_shared_memory_show(tmp_path: Path) -> None:
    source = tmp_path / "heavy.cu"
    source.write_text(
        '#include "cuda/common.cuh"\n'
        "__global__ void __launch_bounds__(1024, 2) heavy(const float* in, float* out) {\n"
        "  __shared__ float tile[12288];\n"
        "  float keep[64];\n"
        "  for (int i = 0; i < 64; ++i) keep[i] = in[i * 1024 + threadIdx.x];\n"
        "  tile[threadIdx.x] = keep[0];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i)\n"
        "    out[i * 1024 + threadIdx.x] = keep[(i * 7 + int(tile[i])) % 64];\n"
        "}\n"
    )
    kernel = compile_targets(source, ["sm_80"])["sm_80"]["heavy"]
    assert kernel.threads == 1024
    assert kernel.resources.shared == 12288 * 4
    assert kernel.resources.stack >= 256
    assert kernel.resources.spill_loads > 0
    assert kernel.resources.spill_stores > 0


def test_errors_name_the_cause(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(CudaBuildError, match="nonsense"):
        compile_cubin(source, "sm_80")
    source.write_text("__global__ void warned() { int unused = 3; }\n")
    with pytest.raises(CudaBuildError, match="unused"):
        compile_cubin(source, "sm_80")
    source.write_text("__global__ void unbounded(float* out) { out[0] = 1; }\n")
    with pytest.raises(CudaBuildError, match="unbounded has no __launch_bounds__"):
        compile_targets(source, ["sm_80"])
    with pytest.raises(ValueError, match="no CUDA source"):
        compile_cubin(tmp_path / "absent.cu", "sm_80")


def test_cubin_is_cached_by_content(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    text = "__global__ void __launch_bounds__(32) fill(float* out) { out[threadIdx.x] = %s; }\n"
    source.write_text(text % "1.0f")
    first = compile_cubin(source, "sm_80")
    written = first.stat().st_mtime_ns
    assert compile_cubin(source, "sm_80") == first
    assert first.stat().st_mtime_ns == written
    source.write_text(text % "2.0f")
    assert compile_cubin(source, "sm_80") != first
    assert compile_cubin(source, "sm_90a") != first
