"""The CUDA kernels of `divergence`: right under cusim, lean in bytes, without spills, loadable.

With the memory hooks on an access outside a tensor's own elements or a data race fails a run, and
every load and store is counted. Every case is run so at least once.
"""

import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill import KINDS, divergence, divergence_with_stats
from pydistill.testing.case import Case, Expected, check, expected
from tools.ladder.cases import covering, emulated
from tools.ladder.cuda.divergence import SOURCE, Call, simulated
from tools.ladder.cuda.nvcc import TARGETS, compile_targets, find_nvcc
from tools.ladder.cuda.sim import CudaSim, cache_folder, content_key, run_compiler, source_closure
from tools.ladder.mutants import divergence_cuda as mutants
from tools.ladder.mutation import assert_all_killed, run_mutants

pytestmark = pytest.mark.ladder
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

ORDERS = ("forward", "reverse", "random:1")
BF16, FP16 = torch.bfloat16, torch.float16


@functools.cache
def hooked() -> CudaSim:
    return CudaSim.build(SOURCE, hooks=True)


@functools.cache
def unhooked() -> CudaSim:
    return CudaSim.build(SOURCE)


def assert_right(case: Case, sim: CudaSim, order: str, want: Mapping[str, Expected]) -> None:
    for limit in (None, 0) if case.kind == "adaptive_kl" else (None,):  # its row kept or not
        with simulated(sim, order, limit):
            report = check(case, impl="cuda", want=want)
        assert report.ok, f"{order} {report.message}"


def in_turn(chosen: list[Case]) -> list[tuple[Case, str]]:
    """Each case with one order, the orders by turns within a kind."""
    seen: Counter[str] = Counter()
    pairs = []
    for case in chosen:
        pairs.append((case, ORDERS[seen[case.kind] % len(ORDERS)]))
        seen[case.kind] += 1
    return pairs


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(covering("divergence")), ids=str)
def test_case(case: Case, order: str) -> None:
    assert_right(case, hooked(), order, expected(case))


@pytest.mark.ladder_full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(emulated("divergence")), ids=str)
def test_every_case(case: Case, order: str) -> None:
    """Values in every thread order; memory, which costs ten times as much to watch, in one."""
    want = expected(case)
    assert_right(case, hooked(), order, want)
    for other in ORDERS:
        if other != order:
            assert_right(case, unhooked(), other, want)


def test_thread_order_changes_nothing() -> None:
    """Sums have a fixed order: every bit is the same whichever thread runs first."""
    student, teacher = torch.randn(2, 2600), torch.randn(2, 2600)
    results = []
    for order in ORDERS:
        leaf = student.clone().requires_grad_()
        with simulated(hooked(), order):
            loss = divergence(leaf, teacher, reduction="none", impl="cuda")
            loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def traffic(
    kind: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    shared_limit: int | None = None,
) -> tuple[Call, Call]:
    leaf = student.clone().requires_grad_()
    with simulated(hooked(), shared_limit=shared_limit) as calls:
        divergence(
            leaf, teacher, kind, temperature=temperature, reduction="sum", impl="cuda"
        ).backward()
    assert [call.name for call in calls] == ["pyd_divergence_forward", "pyd_divergence_backward"]
    return calls[0], calls[1]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: str, dtype: torch.dtype) -> None:
    """The KLs read a row once, others twice, adaptive_kl the teacher's once; backward once; and the
    gradient is written once.
    """
    rows, vocab = 1, 4096
    student, teacher = torch.randn(rows, vocab).to(dtype), torch.randn(rows, vocab).to(dtype)
    forward, backward = traffic(kind, student, teacher)
    once = rows * vocab * dtype.itemsize
    sweeps = 1 if kind in ("forward_kl", "reverse_kl") else 2
    for side in ("student", "teacher"):
        kept = kind == "adaptive_kl" and side == "teacher"
        assert forward.report.buffers[side].bytes_moved == (1 if kept else sweeps) * once
        assert backward.report.buffers[side].bytes_moved == once
    assert backward.report.buffers["grad"].bytes_moved == once
    # Every request is 16 bytes a lane. An fp32 tile is two of them, each half of the same sectors.
    seen = backward.report.buffers["student"]
    assert seen.load_requests * 32 * 16 == once
    assert seen.load_sectors * 32 == once * dtype.itemsize // 2


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 9), (BF16, 5), (FP16, 6)])
def test_bytes_of_adaptive_kl_without_shared_memory(dtype: torch.dtype, most: int) -> None:
    """The teacher's row is read up to `most` more times, and a last time in part for the ties."""
    student, teacher = torch.randn(1, 4096).to(dtype), torch.randn(1, 4096).to(dtype)
    forward, backward = traffic("adaptive_kl", student, teacher, shared_limit=0)
    once = 4096 * dtype.itemsize
    assert forward.report.buffers["student"].bytes_moved == 2 * once
    read = forward.report.buffers["teacher"].bytes_moved
    assert 3 * once < read <= (2 + most + 1) * once
    moved = [backward.report.buffers[name].bytes_moved for name in ("student", "teacher", "grad")]
    assert moved == [once] * 3


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "adaptive_kl"])
def test_bytes_within_budget(kind: str) -> None:
    """All bytes, the small tensors too, over the floor of the case table."""
    student, teacher = torch.randn(1, 32000), torch.randn(1, 32000)
    forward, backward = traffic(kind, student, teacher, temperature=2.0)
    assert forward.report.bytes_moved <= (1.1 if kind == "forward_kl" else 2.05) * 2 * 32000 * 4
    assert backward.report.bytes_moved <= 1.1 * 3 * 32000 * 4


def test_statistics_cost_one_more_sweep() -> None:
    student, teacher = torch.randn(1, 4096), torch.randn(1, 4096)
    with simulated(hooked()) as calls:
        divergence_with_stats(student, teacher, impl="cuda")
    assert calls[0].report.buffers["student"].bytes_moved == 2 * 4096 * 4


def test_misleading_first_tiles_cost_one_more_sweep() -> None:
    """A KL whose first tiles are unlike the rest is swept again, and is right."""
    student, teacher = mutants.misleading_rows(1)
    forward, _ = traffic("forward_kl", student, teacher)
    assert forward.report.buffers["student"].bytes_moved == 2 * student.numel() * 4


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 elements apart; only their own pages of the buffer are ever touched."""
    apart, vocab = 2**31 + 64, 512
    memory = torch.from_numpy(np.zeros(apart + vocab, dtype=np.int16)).view(BF16)
    student = memory.as_strided((2, vocab), (apart, 1))
    student.copy_(torch.randn(2, vocab))
    teacher = torch.randn(2, vocab)
    with simulated(CudaSim.build(SOURCE)):
        got = divergence(student, teacher, reduction="none", impl="cuda")
        same = divergence(student.contiguous(), teacher, reduction="none", impl="cuda")
    assert torch.equal(got, same)


def test_rows_that_do_not_count_are_not_read() -> None:
    student, teacher = torch.randn(3, 512), torch.randn(3, 512)
    mask = torch.tensor([True, False, True])
    leaf = student.clone().requires_grad_()
    with simulated(hooked()) as calls:
        divergence(leaf, teacher, mask=mask, impl="cuda").backward()
    for call in calls:
        assert call.report.buffers["student"].bytes_moved == 2 * 512 * 4
    assert leaf.grad is not None and (leaf.grad[1] == 0).all()


def test_flagged_rows() -> None:
    mutants.check_flagged_rows(hooked())


# Mutants


@pytest.mark.ladder_full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_mutants_die(part: str) -> None:
    chosen = mutants.PARTS[part]
    assert len(chosen) >= 10
    source = SOURCE.with_name(mutants.FILES[part])
    assert_all_killed(run_mutants(source, chosen, mutants.check))


# Compilation


@needs_nvcc
@pytest.mark.ladder_full  # two minutes; the ladder's table has the registers, spills and occupancy
@pytest.mark.timeout(1200)
def test_compiled_kernels_do_not_spill() -> None:
    for arch, kernels in compile_targets(SOURCE, TARGETS).items():
        assert len(kernels) == 3 * (2 * len(KINDS) + 1)
        for name, kernel in kernels.items():
            used = kernel.resources
            assert (used.spill_loads, used.spill_stores, used.stack) == (0, 0, 0), (arch, name)
            assert kernel.occupancy.fraction >= 0.375, (arch, name, kernel.occupancy)
            assert used.wide_loads >= 2, (arch, name)
            assert used.wide_stores >= 1 or "backward" not in name, (arch, name)
            assert used.atomics == 0, (arch, name)


@needs_nvcc
@pytest.mark.timeout(1200)
def test_operator_file_loads_without_a_gpu(tmp_path: Path) -> None:
    """nvcc and g++ build it against a CPU-only torch; loading registers the kernels for CUDA."""
    nvcc, torch_dir = find_nvcc(), Path(torch.__file__).parent
    assert nvcc is not None
    csrc = SOURCE.parents[1]
    common = [f"-I{csrc}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-arch=sm_80", "-c"]
    stable = ["-std=c++20", "-isystem", str(torch_dir / "include"), "-DUSE_CUDA"]
    stable += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    objects = []
    for path, flags in ((SOURCE, ["-std=c++17"]), (csrc / "cuda/ops/divergence.cpp", stable)):
        command = [nvcc, *common, *flags]
        key = content_key(source_closure(path, [csrc]), command)
        out = cache_folder() / f"{path.stem}{path.suffix}-{key}.o"
        objects.append(str(run_compiler([*command, str(path)], out)))
    library = tmp_path / "divergence.so"
    link = [nvcc, "-shared", *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(library)], check=True)
    script = (
        "import ctypes, pydistill\n"
        "from pydistill import _registry\n"
        "names = ('divergence_fwd', 'divergence_bwd', 'divergence_overwrite')\n"
        "before = [_registry.has_kernel(name, 'cuda') for name in names]\n"
        f"ctypes.CDLL({str(library)!r})\n"
        "after = [_registry.has_kernel(name, 'cuda') for name in names]\n"
        "assert after == [True] * 3, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SOURCE.parents[2])
