"""cusim runs CUDA source right, and catches what a GPU would not forgive."""

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tools.ladder.cuda.sim import (
    CudaBuildError,
    CudaSim,
    CudaSimError,
    Report,
    struct_argument,
    virtual_tensor,
)
from tools.ladder.interpreter.guards import guarded
from tools.ladder.mutation import Mutant, assert_all_killed, run_mutants

pytestmark = pytest.mark.ladder

FIXTURES = Path(__file__).parent / "cuda_fixtures"
COMMON = Path(__file__).parents[2] / "csrc" / "cuda" / "common.cuh"
ORDERS = ("forward", "reverse", "random:1", "random:2")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def build(name: str, hooks: bool = True) -> CudaSim:
    return CudaSim.build(FIXTURES / name, hooks=hooks)


def row_logsumexp(
    sim: CudaSim, logits: torch.Tensor, order: str = "forward"
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    rows, columns = logits.shape
    out = torch.empty(rows)
    argmax = torch.empty(rows, dtype=torch.int32)
    report = sim.call(
        "pyd_row_logsumexp",
        DTYPES[logits.dtype],
        logits,
        out,
        argmax,
        rows,
        columns,
        logits.stride(0),
        buffers={"logits": logits, "out": out, "argmax": argmax},
        order=order,
    )
    return out, argmax, report


def assert_rows_right(sim: CudaSim, logits: torch.Tensor, order: str) -> Report:
    out, argmax, report = row_logsumexp(sim, logits, order)
    torch.testing.assert_close(out, logits.float().logsumexp(1), rtol=2e-6, atol=1e-6)
    # The lowest index of the maximum; torch promises no particular one.
    largest = logits.float() == logits.float().amax(1, keepdim=True)
    assert argmax.tolist() == largest.int().argmax(1).tolist()
    return report


# Reductions and dtypes


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_reduction_in_every_order(dtype: torch.dtype, order: str, hooks: bool) -> None:
    sim = build("row_logsumexp.cu", hooks)
    for columns in (1, 7, 31, 1000, 2048):
        assert_rows_right(sim, (torch.randn(3, columns) * 8).to(dtype), order)


def test_row_reduction_special_values() -> None:
    sim = build("row_logsumexp.cu")
    inf = float("inf")
    logits = torch.randn(5, 300)
    logits[0] = -inf
    logits[1, ::2] = -inf
    logits[2, 17] = float("nan")
    logits[3] = 1e4
    out, argmax, _ = row_logsumexp(sim, logits)
    assert out[0] == -inf
    assert out[2].isnan()
    torch.testing.assert_close(out[[1, 3, 4]], logits[[1, 3, 4]].logsumexp(1))
    assert argmax[3] == 0


def assert_reductions_right(sim: CudaSim) -> None:
    x = torch.randn(256)
    out = torch.empty(5)
    sim.call("pyd_reductions", x, out, order="random:4")
    expected = [x.sum(), x.max(), x.argmax(), x.max(), (x >= 0).sum()]
    torch.testing.assert_close(out, torch.tensor([float(value) for value in expected]))


def test_block_reductions_of_common() -> None:
    assert_reductions_right(build("features.cu"))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])  # 1 misaligns the rows: the scalar path
def test_conversions_match_torch(source: torch.dtype, target: torch.dtype, offset: int) -> None:
    values = torch.cat(
        [
            torch.randn(2000) * 100,
            torch.tensor(
                [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-8, 65504.0, 7e4]
            ),
            # Ties of bf16 and fp16: exactly between two neighbours.
            1 + torch.arange(16) * 2.0**-8,
            1 + torch.arange(16) * 2.0**-11,
        ]
    ).to(source)[offset:]
    out = torch.empty(values.numel() + offset, dtype=target)[offset:]
    report = build("features.cu").call(
        "pyd_convert",
        DTYPES[source],
        DTYPES[target],
        values,
        out,
        values.numel(),
        buffers={"in": values, "out": out},
    )
    torch.testing.assert_close(out, values.to(target), rtol=0, atol=0, equal_nan=True)
    assert report.buffers["in"].bytes_loaded == values.nbytes
    assert report.buffers["out"].bytes_stored == out.nbytes


# Collectives, shared memory, atomics


@pytest.mark.parametrize("order", ORDERS)
def test_warp_collectives(order: str) -> None:
    x = torch.randint(-50, 50, (64,), dtype=torch.int32)
    reversed_, votes, scan, total = (torch.empty_like(x) for _ in range(4))
    build("features.cu").call("pyd_warp_collectives", x, reversed_, votes, scan, total, order=order)
    warps = x.view(2, 32)
    assert torch.equal(reversed_.view(2, 32), warps.flip(1))
    assert torch.equal(scan.view(2, 32), warps.cumsum(1).int())
    assert torch.equal(total.view(2, 32), warps.sum(1, keepdim=True).int().expand(2, 32))
    bits = ((warps < 0).long() << torch.arange(32)).sum(1, keepdim=True)
    assert torch.equal(votes.view(2, 32).long() & 0xFFFFFFFF, bits.expand(2, 32))


@pytest.mark.parametrize("order", ORDERS)
def test_dynamic_shared_memory_atomics_and_syncwarp(order: str) -> None:
    sim = build("features.cu")
    x, out = torch.randn(192), torch.empty(192)
    sim.call("pyd_reverse_blocks", x, out, 3, order=order)
    assert torch.equal(out.view(3, 64), x.view(3, 64).flip(1))

    keys = torch.randint(0, 16, (1000,), dtype=torch.int32)
    counts = torch.zeros(16, dtype=torch.int32)
    report = sim.call("pyd_histogram", keys, counts, 1000, buffers={"counts": counts}, order=order)
    assert torch.equal(counts, torch.bincount(keys, minlength=16).int())
    assert report.buffers["counts"].bytes_atomic == 3 * 16 * 4
    assert report.shared_atomic == 1000 * 4

    sim.call("pyd_warp_exchange", x[:64], out[:64], order=order)
    assert torch.equal(out[:64].view(32, 2), x[:64].view(32, 2).flip(1))


@pytest.mark.parametrize("hooks", [False, True])
def test_unwritten_shared_memory_is_nan(hooks: bool) -> None:
    out = torch.zeros(32)
    build("features.cu", hooks).call("pyd_read_unwritten_shared", out)
    assert out.isnan().all()


# Bytes, sectors, views


def test_bytes_of_a_row_kernel_are_exact() -> None:
    sim = build("row_logsumexp.cu")
    for dtype, columns in ((torch.float32, 1001), (torch.bfloat16, 4096), (torch.float16, 13)):
        report = assert_rows_right(sim, torch.randn(3, columns).to(dtype), "forward")
        logits = report.buffers["logits"]
        assert logits.bytes_loaded == 3 * columns * dtype.itemsize
        assert logits.bytes_stored == 0
        assert report.buffers["out"].bytes_stored == report.buffers["argmax"].bytes_stored == 12
        assert report.bytes_moved == logits.bytes_loaded + 24
        # Two reductions: 128 threads read 8 bytes and 4 of them write 8, a row and a reduction.
        assert report.shared_loaded == 3 * 2 * 128 * 8
        assert report.shared_stored == 3 * 2 * 4 * 8


def test_wide_loads_take_one_request_of_sixteen_bytes_a_lane() -> None:
    report = assert_rows_right(
        build("row_logsumexp.cu"), torch.randn(1, 1024).bfloat16(), "forward"
    )
    assert report.buffers["logits"].load_requests == 4  # 128 threads, one pack each
    assert report.buffers["logits"].load_sectors == 4 * 16


@pytest.mark.parametrize(("step", "sectors"), [(1, 4), (2, 8), (8, 32)])
def test_sectors_of_a_strided_load(step: int, sectors: int) -> None:
    storage = torch.randn(64 * 8 + 16)
    skip = -storage.data_ptr() // 4 % 8  # start on a sector
    x = storage[skip : skip + 63 * step + 1]
    out = torch.empty(64)
    report = build("features.cu").call("pyd_strided_copy", x, out, step, buffers={"x": x})
    assert torch.equal(out, x[::step])
    assert report.buffers["x"].load_requests == 2
    assert report.buffers["x"].load_sectors == 2 * sectors


def test_bounds_are_those_of_the_view() -> None:
    sim = build("features.cu")
    storage = torch.randn(64, 4)
    out = torch.empty(64)
    sim.call("pyd_strided_copy", storage[:, 1], out, 4)
    assert torch.equal(out, storage[:, 1])
    with pytest.raises(CudaSimError, match=r"out of bounds load .* x\[1\].*view with holes"):
        sim.call("pyd_strided_copy", storage[:, 1], out, 1, buffers={"x": storage[:, 1]})


@pytest.mark.parametrize("hooks", [False, True])
def test_offsets_beyond_2_to_the_31(hooks: bool) -> None:
    stride = 2**31 + 8
    logits = virtual_tensor((2, stride), dtype=torch.bfloat16)[:, :100]
    logits.copy_(torch.randn(2, 100))
    assert_rows_right(build("row_logsumexp.cu", hooks), logits, "forward")


def test_guard_bands_catch_a_stray_store_without_hooks() -> None:
    out = guarded(torch.zeros(64))
    out.check_guards()
    number = list(FAULTS).index("store_out_of_bounds")
    build("faults.cu", False).call("pyd_fault", number, None, out.tensor, 8)
    with pytest.raises(AssertionError, match="guard written at element 64"):
        out.check_guards()


def test_struct_arguments() -> None:
    sim = build("features.cu")
    header = FIXTURES / "features.cu"
    x, out = torch.randn(40), torch.empty(32)
    fields = {"in": x, "n": 32, "factor": 2.0, "shift": 1.0, "negate": True, "offset": 8}
    report = sim.call("pyd_scale", struct_argument(header, "ScaleCall", out=out, **fields))
    torch.testing.assert_close(out, -(x[8:] * 2 + 1))
    assert report.buffers["in"].bytes_loaded == report.buffers["out"].bytes_stored == 128
    fields["offset"] = 9
    with pytest.raises(CudaSimError, match=r"out of bounds load .* in\[40\]"):
        sim.call("pyd_scale", struct_argument(header, "ScaleCall", out=out, **fields))
    with pytest.raises(ValueError, match="has no field scale"):
        struct_argument(header, "ScaleCall", scale=1)
    with pytest.raises(ValueError, match="declares no struct Absent"):
        struct_argument(header, "Absent")


def test_launches_of_one_call_are_ordered() -> None:
    data = torch.zeros(32)
    report = build("features.cu").call("pyd_add_one_twice", data)
    assert torch.equal(data, torch.full((32,), 2.0))
    assert report.launches == 2


@pytest.mark.parametrize(
    ("grid", "block", "shared", "status"),
    [(0, 32, 0, 9), (1, 0, 0, 9), (1, 1025, 0, 9), (1, 32, 300_000, 1), (1, 32, 200_000, 0)],
)
def test_launch_limits(grid: int, block: int, shared: int, status: int) -> None:
    data = torch.zeros(32)
    report = build("features.cu").call("pyd_launch_shape", grid, block, shared, data, check=False)
    assert report.status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, 0), (1023, 1), (0, 1)])
def test_launch_within_the_limit_that_a_call_names(limit: int, status: int) -> None:
    call = partial(build("features.cu").call, "pyd_launch_shape", 1, 32, 1024)
    assert call(torch.zeros(32), shared_limit=limit, check=False).status == status
    assert call(torch.zeros(32)).status == 0


# Faults. Each is caught by the hooks build in every order; those with `plain` also without hooks.

FAULTS = {
    "missing_barrier": ("data race on byte .* of .*tile", False),
    "missing_second_barrier": ("data race on byte .* of .*tile", False),
    "missing_syncwarp": ("data race on byte .* of .*tile", False),
    "barrier_in_branch": ("divergent: thread 0 waits at __syncthreads .* after 32 of 64", True),
    "two_barriers": ("divergent: thread 0 waits at .* while thread 32 waits at", True),
    "mask_without_caller": ("the mask does not name the calling lane", True),
    "masks_disagree": (
        "lane .* passes a different mask|lane 16 has exited|lanes that never arrive",
        True,
    ),
    "reads_outside_mask": ("reads lane .*, which is not in the mask", True),
    "exited_lane": ("lane 5 has exited|lanes that never arrive", True),
    "warp_meets_barrier": ("lane 0 waits at __syncthreads|divergent", True),
    "load_out_of_bounds": (r"out of bounds load of 4 bytes at in\[(6[4-9]|7\d)\]", False),
    "store_out_of_bounds": (r"out of bounds store of 4 bytes at out\[(6[4-9]|7\d)\]", False),
    "shared_out_of_bounds": ("out of bounds store of 4 bytes in shared memory", False),
    "wild_pointer": ("far from every registered buffer|invalid address 0x40", True),
    "misaligned": (r"misaligned load of 16 bytes at in\[1\]", False),
    "blocks_add": (r"data race on out\[0\].* by (several blocks|block \d)", False),
    "write_after_foreign_read": (r"data race on out\[\d\]: (store|load) by", False),
    "atomic_and_plain": (r"data race on out\[0\]", False),
    "dynamic_shared_out_of_bounds": ("out of bounds store of 4 bytes", False),
    "dynamic_shared_race": ("data race on byte .* of dynamic shared memory", False),
}


def run_fault(name: str, hooks: bool, order: str) -> torch.Tensor:
    x = torch.randn(64)
    whole = torch.zeros(128)  # room for the stray store of the build without hooks
    out = whole[:64]
    number = list(FAULTS).index(name)
    build("faults.cu", hooks).call(
        "pyd_fault", number, x, out, 8, buffers={"in": x, "out": out}, order=order
    )
    return whole


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_hooks_catch(name: str, order: str) -> None:
    with pytest.raises(CudaSimError, match=FAULTS[name][0]) as caught:
        run_fault(name, True, order)
    report = caught.value.report
    assert bool(report.races) == ("race" in FAULTS[name][0])
    assert bool(report.oob) == ("out of bounds" in str(caught.value) or name == "misaligned")


@pytest.mark.parametrize("name", [name for name, (_, plain) in FAULTS.items() if plain])
def test_collectives_are_checked_without_hooks(name: str) -> None:
    for order in ORDERS:
        with pytest.raises(CudaSimError, match=FAULTS[name][0]):
            run_fault(name, False, order)


def test_a_failed_call_leaves_no_trace() -> None:
    for hooks in (False, True):
        with pytest.raises(CudaSimError):
            run_fault("two_barriers", hooks, "forward")
        with pytest.raises(CudaSimError, match="exited"):
            run_fault("exited_lane", hooks, "forward")
    assert_rows_right(build("row_logsumexp.cu"), torch.randn(2, 40), "forward")


def test_a_stray_store_is_stopped_before_it_happens() -> None:
    x, whole = torch.randn(64), torch.zeros(128)
    number = list(FAULTS).index("store_out_of_bounds")
    report = build("faults.cu").call("pyd_fault", number, x, whole[:64], 8, check=False)
    assert report.status == 719
    assert whole[64:].eq(0).all()


def test_orders_alone_expose_a_missing_barrier() -> None:
    expected = None
    for order in ORDERS:
        torch.manual_seed(1)
        got = run_fault("missing_barrier", False, order)[:64]
        if expected is not None and not torch.equal(expected.nan_to_num(), got.nan_to_num()):
            return
        expected = got
    pytest.fail("every order gave the same numbers")


# The Python interface


def test_bad_calls() -> None:
    sim = build("features.cu", False)
    with pytest.raises(ValueError, match="unknown order 'sideways'"):
        sim.call("pyd_reductions", torch.zeros(256), torch.zeros(5), order="sideways")
    with pytest.raises(TypeError, match="cannot pass list to C"):
        sim.call("pyd_reductions", [1.0], torch.zeros(5))
    with pytest.raises(ValueError, match="no CUDA source"):
        CudaSim.build(FIXTURES / "absent.cu")


def test_build_errors_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.cu"
    header = tmp_path / "value.h"
    source.write_text(
        '#include "cuda/common.cuh"\n#include "value.h"\nnamespace {\n'
        "__global__ void fill(float* out) { out[threadIdx.x] = VALUE; }\n}\n"
        "PYD_API int pyd_fill(float* out, void* stream) {\n"
        "  return PYD_LAUNCH(fill, 1, 4, 0, stream, out);\n}\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def value() -> tuple[float, Path]:
        sim = CudaSim.build(source)
        out = torch.zeros(4)
        sim.call("pyd_fill", out)
        return float(out[3]), sim.path

    header.write_text("#define VALUE 3.0f\n")
    first = value()
    assert first[0] == 3.0
    assert value() == first
    header.write_text("#define VALUE 4.0f\n")
    assert value()[0] == 4.0
    header.write_text("#define VALUE nonsense\n")
    with pytest.raises(CudaBuildError, match="nonsense"):
        value()


# Mutants


def check_row_logsumexp(source: Path) -> None:
    sim = CudaSim.build(source, hooks=True)
    generator = torch.Generator().manual_seed(0)
    for columns, order in ((13, "forward"), (2056, "reverse"), (1025, "random:3")):
        for dtype in (torch.float32, torch.bfloat16):
            # A row stride wider than the row, values whose maxima tie, and negative rows.
            whole = torch.full((3, columns + 24), float("nan")).to(dtype)
            logits = whole[:, :columns]
            logits.copy_(torch.randn(3, columns, generator=generator).mul(8).round() - 40)
            report = assert_rows_right(sim, logits, order)
            assert report.buffers["logits"].bytes_loaded == logits.nbytes
    far = virtual_tensor((2, 2**31 + 8), dtype=torch.bfloat16)[:, :8]
    far.copy_(torch.arange(16).view(2, 8))
    assert_rows_right(sim, far, "forward")


ROW_MUTANTS = [
    Mutant("-INFINITY", "0.0f"),
    Mutant("start < columns", "start < columns - 1"),
    Mutant("start += kBlock * kTile", "start += kBlock"),
    Mutant("threadIdx.x * kTile", "threadIdx.x"),
    Mutant(
        "static_cast<int64_t>(blockIdx.x) * stride", "static_cast<int64_t>(blockIdx.x) * columns"
    ),
    Mutant("static_cast<int64_t>(blockIdx.x) * stride", "static_cast<int>(blockIdx.x * stride)"),
    Mutant("is_wide_aligned(row)", "true"),
    Mutant("static_cast<int>(start + i)", "static_cast<int>(start)"),
    Mutant("state = push(state, values[i])", "state = push(state, values[0])"),
    Mutant("state = block_reduce<kBlock>(state, MergeSoftmax{}, softmax_scratch);", ""),
    Mutant("kBlock / kWarp", "kBlock / kWarp / 2", 0),
    Mutant("if (threadIdx.x == 0)", ""),
    Mutant("out[blockIdx.x] = logsumexp(state)", "out[0] = logsumexp(state)"),
    Mutant("load_tile(row, start, columns,", "load_tile(row, start, columns + 1,"),
    Mutant("load_tile(row, start,", "load_tile(logits, start,"),
]


def check_common(header: Path) -> None:
    folder = header.parent / "cuda"
    folder.mkdir(exist_ok=True)
    shutil.copy(header, folder / "common.cuh")
    rows, features = (
        CudaSim.build(FIXTURES / name, hooks=True, include_dirs=[header.parent])
        for name in ("row_logsumexp.cu", "features.cu")
    )
    generator = torch.Generator().manual_seed(0)
    for columns, order in ((13, "forward"), (2056, "reverse"), (1031, "random:3")):
        logits = torch.randn(3, columns, generator=generator).mul(8).round()
        logits[1, : columns // 2] = -float("inf")
        logits[:2, [columns // 2 + 1, columns - 1]] = 48.0  # a tie between threads
        for x in (logits, logits.bfloat16()):
            report = assert_rows_right(rows, x, order)
            assert report.buffers["logits"].bytes_loaded == x.nbytes
    dead = torch.full((1, 40), -float("inf"))
    assert row_logsumexp(rows, dead)[0].item() == -float("inf")
    assert_reductions_right(features)


COMMON_MUTANTS = [
    Mutant("__syncthreads();", "", 0),
    Mutant("__syncthreads();", "", 1),
    Mutant("scratch[threadIdx.x / kWarp]", "scratch[0]"),
    Mutant("scratch[lane % kWarps]", "scratch[lane]"),
    Mutant("warp_reduce<kWarps>(scratch[lane", "warp_reduce(scratch[lane"),
    Mutant("int offset = kWidth / 2", "int offset = kWidth / 4"),
    Mutant("x == -INFINITY ? 0.0f : expf", "expf"),
    Mutant("b.index < a.index", "b.index > a.index"),
    Mutant("if (a.index < 0) return b;", "if (a.index < 0) return a;"),
    Mutant("b.sum * exp_below(b.max, max)", "b.sum"),
    Mutant("start + kTile <= n", "start <= n", 0),
    Mutant("state.max + logf(state.sum)", "logf(state.sum)"),
]


def test_some_mutants_die() -> None:
    source = FIXTURES / "row_logsumexp.cu"
    assert_all_killed(run_mutants(source, ROW_MUTANTS[::10], check_row_logsumexp))


@pytest.mark.ladder_full
@pytest.mark.parametrize(
    ("source", "mutants", "check"),
    [
        (FIXTURES / "row_logsumexp.cu", ROW_MUTANTS, check_row_logsumexp),
        (COMMON, COMMON_MUTANTS, check_common),
    ],
    ids=["row_logsumexp", "common"],
)
def test_every_mutant_dies(
    source: Path, mutants: list[Mutant], check: Callable[[Path], None]
) -> None:
    assert_all_killed(run_mutants(source, mutants, check))
