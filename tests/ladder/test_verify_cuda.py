"""The CUDA kernels of `verify`: right under cusim, coin for coin, lean in bytes, spill-free,
loadable.

With the memory hooks on an access outside a tensor's own elements or a data race fails a run, and
every load and store is counted. Most runs give a request 64 threads; what depends on how many there
are is run with all 512.
"""

import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pydistill import verify, verify_with_gradient
from pydistill.reference import verify as reference
from pydistill.testing.case import Case, Expected, check, expected
from pydistill.testing.cases import load
from tools.ladder.cases import covering, emulated
from tools.ladder.cuda.nvcc import TARGETS, compile_targets, find_nvcc
from tools.ladder.cuda.sim import (
    CudaSim,
    cache_folder,
    content_key,
    run_compiler,
    source_closure,
    virtual_tensor,
)
from tools.ladder.cuda.verify import FEW_THREADS, SOURCE, simulated
from tools.ladder.mutants import verify_cuda as mutants
from tools.ladder.mutation import assert_all_killed, run_mutants

pytestmark = pytest.mark.ladder
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

ORDERS = ("forward", "reverse", "random:1")
BF16, FP32 = torch.bfloat16, torch.float32


@functools.cache
def hooked() -> CudaSim:
    return CudaSim.build(SOURCE, hooks=True, defines=FEW_THREADS)


@functools.cache
def unhooked() -> CudaSim:
    return CudaSim.build(SOURCE, defines=FEW_THREADS)


@functools.cache
def with_all_threads() -> CudaSim:
    return CudaSim.build(SOURCE)


def assert_right(case: Case, sim: CudaSim, order: str, want: Mapping[str, Expected]) -> None:
    with simulated(sim, order):
        report = check(case, impl="cuda", want=want)
    assert report.ok, f"{order} {report.message}"


def in_turn(chosen: list[Case]) -> list[tuple[Case, str]]:
    """Each case with one order, the orders by turns."""
    return [(case, ORDERS[i % len(ORDERS)]) for i, case in enumerate(chosen)]


def named(*ids: str) -> list[Case]:
    found = {case.id: case for case in load("verify")}
    return [found[case_id] for case_id in ids]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(covering("verify")), ids=str)
def test_case(case: Case, order: str) -> None:
    """Values; what the hooks watch, the shorter rows of `test_memory` have too."""
    assert_right(case, unhooked(), order, expected(case))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "order"), in_turn(mutants.watched()), ids=str)
def test_memory(case: Case, order: str) -> None:
    assert_right(case, hooked(), order, expected(case))


@pytest.mark.ladder_full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("case", "order"), in_turn(emulated("verify")), ids=str)
def test_every_case(case: Case, order: str) -> None:
    """Values in every thread order, and once with all threads; memory, which costs ten times as
    much to watch, in one order."""
    want = expected(case)
    assert_right(case, hooked(), order, want)
    for other in ORDERS:
        if other != order:
            assert_right(case, unhooked(), other, want)
    assert_right(case, with_all_threads(), order, want)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", named("token-late-fp32-12x3x5000"), ids=str)
def test_all_threads(case: Case) -> None:
    """Of a row that gives all of them work; the full climb has every case."""
    assert_right(case, with_all_threads(), "random:2", expected(case))


@pytest.mark.parametrize(
    "part",
    [
        mutants.check_faults,
        mutants.check_limit_in_doubt,
        mutants.check_small_residual,
        mutants.check_coins,
        mutants.check_bytes,
    ],
)
def test_hard_rows(part: Any) -> None:
    part(hooked())


@pytest.mark.parametrize("stream", [reference.ACCEPT, reference.RESAMPLE])
def test_coins_are_those_of_the_reference(stream: int) -> None:
    mutants.check_coin_bits(stream)


@pytest.mark.parametrize("method", ["token", "block", "traversal"])
def test_order_and_neighbours_change_nothing(method: str) -> None:
    """Every bit is the same whichever thread runs first, and of a request alone: rows of 331 logits
    lie at other addresses in a batch."""
    g = torch.Generator().manual_seed(8)
    inputs: dict[str, Any] = {
        "target_logits": torch.randn(3, 4, 331, generator=g),
        "draft_logits": torch.randn(3, 3, 331, generator=g),
        "draft_ids": torch.randint(0, 331, (3, 3), generator=g),
        "seed": torch.arange(3),
        "position": torch.arange(3),
    }
    settings: dict[str, Any] = {"method": method, "top_p": 0.9, "impl": "cuda"}
    if method == "traversal":
        settings["tree"] = torch.tensor([-1, 0, 0])
    results = []
    for order in ORDERS:
        with simulated(unhooked(), order):
            results.append(verify(**inputs, **settings))
    with simulated(unhooked()):
        alone = [
            verify(**{k: x[i : i + 1].clone() for k, x in inputs.items()}, **settings)
            for i in range(3)
        ]
    for name, x in results[0]._asdict().items():
        for other in (*results[1:], alone):
            if other is alone:
                y = torch.cat([getattr(one, name) for one in alone])
            else:
                y = getattr(other, name)
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bytes_of_a_rejection(dtype: torch.dtype) -> None:
    """With all threads: the first rows once to be read, once to be compared, a 16th and a 256th to
    draw, and a few logits by every thread; of the other four rows nothing. Every request of a sweep
    is 16 bytes a lane."""
    vocab = 4096
    with simulated(CudaSim.build(SOURCE, hooks=True)) as calls:
        verify(**mutants.rejected(1, 4, vocab, dtype), seed=0, position=0, impl="cuda")
    row = vocab * dtype.itemsize
    for name in ("target", "draft"):
        seen = calls[0].report.buffers[name]
        assert 2 * row < seen.bytes_moved < (2 + 1 / 15) * row + 512 * 9 * dtype.itemsize
        assert seen.load_requests <= 2 * row / 512 + 300


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^31 elements apart; only their own pages of the buffer are ever touched."""
    apart, vocab = 2**31 + 64, 128
    memory = virtual_tensor((apart + vocab,), dtype=BF16)
    target = memory.as_strided((1, 2, vocab), (apart, apart, 1))
    target.copy_(torch.randn(1, 2, vocab))
    settings: dict[str, Any] = {"draft_ids": torch.tensor([[3]]), "seed": 1, "position": 0}
    with simulated(unhooked()):
        got = verify(target, None, **settings, impl="cuda")
        same = verify(target.contiguous(), None, **settings, impl="cuda")
    for x, y in zip(got, same, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_gradient_is_refused() -> None:
    """There is no such CUDA kernel, and an explicit choice does not fall back."""
    target, draft = torch.randn(1, 2, 5), torch.randn(1, 1, 5)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    refusal = "no cuda kernel for 'verify_with_gradient'; pass impl='reference'"
    with simulated(unhooked()), pytest.raises(ValueError, match=refusal):
        verify_with_gradient(target, draft, ids, seed=0, position=0, impl="cuda")


# Mutants


@pytest.mark.ladder_full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", list(mutants.PARTS))
def test_mutants_die(part: str) -> None:
    assert len(mutants.PARTS[part]) >= 10
    source = SOURCE.with_name(mutants.FILES[part])
    assert_all_killed(run_mutants(source, mutants.PARTS[part], mutants.check, timeout=600.0))


# Compilation


@needs_nvcc
@pytest.mark.ladder_full  # minutes; the ladder's table has the registers, spills and occupancy
@pytest.mark.timeout(1800)
def test_compiled_kernels_do_not_spill() -> None:
    for arch, kernels in compile_targets(SOURCE, TARGETS).items():
        assert len(kernels) == 3 * 2
        for name, kernel in kernels.items():
            used = kernel.resources
            assert (used.spill_loads, used.spill_stores, used.stack) == (0, 0, 0), (arch, name)
            assert kernel.occupancy.fraction >= 0.25, (arch, name)
            # Of global addresses; nvcc takes other sweeps' for generic ones, as wide.
            assert used.wide_loads >= 3, (arch, name)


@needs_nvcc
@pytest.mark.ladder_full
@pytest.mark.timeout(1800)
def test_operator_file_loads_without_a_gpu(tmp_path: Path) -> None:
    """nvcc and g++ build it against a CPU-only torch; loading registers the kernel for CUDA."""
    nvcc, torch_dir = find_nvcc(), Path(torch.__file__).parent
    assert nvcc is not None
    csrc = SOURCE.parents[1]
    common_flags = [f"-I{csrc}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-arch=sm_80", "-c"]
    stable = ["-std=c++20", "-isystem", str(torch_dir / "include"), "-DUSE_CUDA"]
    stable += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    objects = []
    for path, flags in ((SOURCE, ["-std=c++17"]), (csrc / "cuda/ops/verify.cpp", stable)):
        command = [nvcc, *common_flags, *flags]
        key = content_key(source_closure(path, [csrc]), command)
        out = cache_folder() / f"{path.stem}{path.suffix}-{key}.o"
        objects.append(str(run_compiler([*command, str(path)], out)))
    library = tmp_path / "verify.so"
    link = [nvcc, "-shared", *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(library)], check=True)
    script = (
        "import ctypes, pydistill\n"
        "from pydistill import _registry\n"
        "assert not _registry.has_kernel('verify_fwd', 'cuda')\n"
        f"ctypes.CDLL({str(library)!r})\n"
        "assert _registry.has_kernel('verify_fwd', 'cuda')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SOURCE.parents[2])
