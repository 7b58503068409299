"""The CUDA kernels of `topk_divergence`: right under cusim, lean in bytes, spill-free, loadable.

With the memory hooks on an access outside a tensor's own elements or a data race fails a run, and
every load and store is counted. Every case is run so at least once. Those with labels or z-loss run
`divergence`'s kernels too, unwatched: they have their own test.
"""

import functools
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from pydistill.reference.topk_divergence import SAVED, Inputs
from pydistill.testing.case import Case, Expected, check, expected
from pydistill.testing.cases.topk_divergence import has_hard_terms
from tools.ladder.cases import covering, emulated
from tools.ladder.cuda import divergence as dense
from tools.ladder.cuda.nvcc import TARGETS, compile_targets, find_nvcc
from tools.ladder.cuda.sim import CudaSim, cache_folder, content_key, run_compiler, source_closure
from tools.ladder.cuda.topk_divergence import SOURCE, simulated
from tools.ladder.mutants import topk_divergence_check as common
from tools.ladder.mutants import topk_divergence_cuda as mutants
from tools.ladder.mutation import assert_all_killed, run_mutants

pytestmark = pytest.mark.ladder
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

ORDERS = ("forward", "reverse", "random:1")
BF16, FP32 = torch.bfloat16, torch.float32


@functools.cache
def hooked(*defines: str) -> CudaSim:
    return CudaSim.build(SOURCE, hooks=True, defines=defines)


@functools.cache
def unhooked() -> CudaSim:
    return CudaSim.build(SOURCE)


@functools.cache
def dense_unhooked() -> CudaSim:
    return CudaSim.build(dense.SOURCE)


def assert_right(case: Case, sim: CudaSim, order: str, want: Mapping[str, Expected]) -> None:
    with ExitStack() as stack:
        stack.enter_context(simulated(sim, order))
        if has_hard_terms(case):
            stack.enter_context(dense.simulated(dense_unhooked(), order))
        report = check(case, impl="cuda", want=want)
    assert report.ok, f"{order} {report.message}"


def in_turn(chosen: list[Case]) -> list[tuple[Case, str]]:
    """Each case with one order, the orders by turns."""
    return [(case, ORDERS[i % len(ORDERS)]) for i, case in enumerate(chosen)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(covering("topk_divergence")), ids=str)
def test_case(case: Case, order: str) -> None:
    assert_right(case, hooked(), order, expected(case))


@pytest.mark.ladder_full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(emulated("topk_divergence")), ids=str)
def test_every_case(case: Case, order: str) -> None:
    """Values in every thread order; memory, which costs ten times as much to watch, in one."""
    want = expected(case)
    assert_right(case, hooked(), order, want)
    for other in ORDERS:
        if other != order:
            assert_right(case, unhooked(), other, want)


@pytest.mark.parametrize("order", ORDERS)
def test_hard_rows_flags_and_bytes(order: str) -> None:
    """Rows of several stretches: the map of the support holds 288 tokens in place of 163,840."""
    mutants.check_all(hooked(*mutants.SHORT_STRETCHES), order)


def test_thread_order_changes_nothing() -> None:
    """Sums have a fixed order: every bit is the same whichever thread runs first."""
    inputs, options = common.rows(), common.options_of("reverse_kl", "bucket")
    results = []
    for order in ORDERS:
        with simulated(hooked(), order):
            results.append(common.run(torch.ops.pydistill_cuda, inputs, options, common.UPSTREAM))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bytes_are_within_a_twentieth_of_the_floor(dtype: torch.dtype) -> None:
    """All bytes, the small tensors too; 64 tokens as support. Overwriting is the sum of both."""
    vocab = 32000
    s, g = torch.randn(1, vocab).to(dtype), torch.Generator().manual_seed(5)
    log_p, ids = torch.log_softmax(torch.randn(1, vocab, generator=g), 1).topk(64)
    inputs = Inputs(s, ids, log_p, torch.full((1,), -0.1), None, None)
    options = common.options_of("forward_kl", "bucket")
    loss, saved, grad = torch.empty(1), torch.empty(1, SAVED), torch.empty_like(s)
    ops = torch.ops.pydistill_cuda
    with simulated(hooked()) as calls:
        ops.topk_divergence_fwd(*inputs, *options, loss, saved)
        ops.topk_divergence_bwd(*inputs[:4], None, saved, torch.ones(1), *options, grad)
    for call, floor in zip(calls, (s.nbytes, 2 * s.nbytes), strict=True):
        assert call.report.bytes_moved <= 1.05 * floor
        # Every request of the sweep is 16 bytes a lane.
        assert call.report.buffers["student"].load_requests <= s.nbytes / 512 + 2 * 64


def test_rows_that_do_not_count_are_not_read() -> None:
    inputs = common.rows()._replace(counted=torch.zeros(common.ROWS, dtype=torch.bool))
    options = common.options_of("forward_kl", "bucket")
    with simulated(hooked()) as calls:
        loss, saved, grad = common.run(
            torch.ops.pydistill_cuda, inputs, options, torch.zeros(common.ROWS)
        )
    for call in calls:
        assert call.report.buffers["student"].bytes_moved == 0
    assert (loss == 0).all() and (saved == 0).all() and (grad == 0).all()


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 elements apart; only their own pages of the buffer are ever touched."""
    from tools.ladder.cuda.sim import virtual_tensor

    apart, vocab = 2**31 + 64, 512
    memory = virtual_tensor((apart + vocab,), dtype=BF16)
    student = memory.as_strided((2, vocab), (apart, 1))
    student.copy_(torch.randn(2, vocab))
    log_p, ids = torch.log_softmax(torch.randn(2, vocab), 1).topk(9)
    inputs = Inputs(student, ids, log_p, torch.full((2,), -1.0), None, None)
    options = common.options_of("forward_kl", "bucket")
    with simulated(unhooked()):
        ops = torch.ops.pydistill_cuda
        got = common.run(ops, inputs, options, torch.ones(2))
        near = inputs._replace(student=student.contiguous())
        same = common.run(ops, near, options, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


# Mutants


@pytest.mark.ladder_full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    assert_all_killed(run_mutants(SOURCE, mutants.PARTS[part], mutants.check))


# Compilation


@needs_nvcc
@pytest.mark.timeout(1200)
def test_compiled_kernels_do_not_spill() -> None:
    for arch, kernels in compile_targets(SOURCE, TARGETS).items():
        assert len(kernels) == 3 * 3
        for name, kernel in kernels.items():
            used, sweeps = kernel.resources, "forward" not in name
            assert (used.spill_loads, used.spill_stores, used.stack) == (0, 0, 0), (arch, name)
            assert kernel.occupancy.fraction >= (0.5 if sweeps else 0.25), (arch, name)
            assert used.wide_loads >= sweeps, (arch, name)
            assert used.wide_stores >= ("backward" in name), (arch, name)


@needs_nvcc
@pytest.mark.timeout(1200)
def test_operator_file_loads_without_a_gpu(tmp_path: Path) -> None:
    """nvcc and g++ build it against a CPU-only torch; loading registers the kernels for CUDA."""
    nvcc, torch_dir = find_nvcc(), Path(torch.__file__).parent
    assert nvcc is not None
    csrc = SOURCE.parents[1]
    common_flags = [f"-I{csrc}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-arch=sm_80", "-c"]
    stable = ["-std=c++20", "-isystem", str(torch_dir / "include"), "-DUSE_CUDA"]
    stable += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    objects = []
    for path, flags in (
        (SOURCE, ["-std=c++17"]),
        (csrc / "cuda/ops/topk_divergence.cpp", stable),
    ):
        command = [nvcc, *common_flags, *flags]
        key = content_key(source_closure(path, [csrc]), command)
        out = cache_folder() / f"{path.stem}{path.suffix}-{key}.o"
        objects.append(str(run_compiler([*command, str(path)], out)))
    library = tmp_path / "topk_divergence.so"
    link = [nvcc, "-shared", *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(library)], check=True)
    script = (
        "import ctypes, pydistill\n"
        "from pydistill import _registry\n"
        "names = [f'topk_divergence_{part}' for part in ('fwd', 'bwd', 'overwrite')]\n"
        "before = [_registry.has_kernel(name, 'cuda') for name in names]\n"
        f"ctypes.CDLL({str(library)!r})\n"
        "after = [_registry.has_kernel(name, 'cuda') for name in names]\n"
        "assert after == [True] * 3, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SOURCE.parents[2])
