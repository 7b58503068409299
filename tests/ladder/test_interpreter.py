"""The strict interpreter, on kernels small enough to know every answer.

Each defect that it must catch has a kernel with that defect here, and a sound twin that must pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from tools.ladder.interpreter import (
    Guards,
    OutOfBoundsError,
    RaceError,
    UnsupportedError,
    guarded,
    strict,
)

pytestmark = pytest.mark.interpreter

BF16 = torch.bfloat16
# Ordinary values, halfway cases between two bfloat16 (both parities), specials and subnormals.
SPECIALS = [0.0, -0.0, 1.0, -1.5, 3.14159, 1.00390625, 1.01171875, 65504.0, 3.4e38, -3.4e38]
SPECIALS += [float("inf"), float("-inf"), float("nan"), 1e-40, -9.2e-41, 1e-45]


def values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(y_ptr.dtype.element_ty), mask=i < n)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


def copy(x: torch.Tensor, y: torch.Tensor, n: int, block: int = 8, masked: bool = True) -> None:
    copy_kernel[(triton.cdiv(n, block),)](x, y, n, BLOCK=block, MASKED=masked)


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(out_ptr + i, a * b + a)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 3 * N + i, tl.where(a < b, a, -b))
    tl.store(out_ptr + 4 * N + i, tl.abs(a))
    limit = tl.abs(b)
    tl.store(out_ptr + 5 * N + i, tl.clamp(a, -limit, limit))
    tl.store(out_ptr + 6 * N + i, tl.clamp(a, -limit, limit, tl.PropagateNan.ALL))


@triton.jit
def fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def scale_kernel(x_ptr, y_ptr, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * scale)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr, UPCAST: tl.constexpr, SCAN: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if UPCAST:
        x = x.to(tl.float32)
    if SCAN:
        tl.store(y_ptr + tl.arange(0, N), tl.associative_scan(x, 0, add))
    else:
        tl.store(y_ptr, tl.sum(x))


@triton.jit
def truncate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


class TestBfloat16:
    def test_arithmetic_rounds_each_operation_to_nearest_even(self) -> None:
        n = 256
        a, b = values(n, BF16, 0), values(n, BF16, 1)
        out = torch.empty(7, n, dtype=BF16)
        with strict():
            arithmetic_kernel[(1,)](a, b, out, N=n)
        clamped = torch.clamp(a, -b.abs(), b.abs())
        expected = [a * b + a, a - b, torch.maximum(a, b), torch.where(a < b, a, -b), a.abs()]
        expected += [clamped, clamped]
        torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0)

    def test_fused_multiply_add_rounds_once(self) -> None:
        # Both products lie halfway between two bfloat16. An addend too small for float32 decides:
        # the first must round down (the tie would go up), the second up (the tie would go down).
        step = 2.0**-7
        a = torch.tensor([1.5, 1.5], dtype=BF16)
        b = torch.tensor([1 + step, 1 + 3 * step], dtype=BF16)
        c = torch.tensor([-(2.0**-40), 2.0**-40], dtype=BF16)
        out = torch.empty(2, dtype=BF16)
        with strict():
            fma_kernel[(1,)](a, b, c, out, N=2)
        assert out.tolist() == [1.5 + step, 1.5 + 5 * step]

    def test_every_nan_stays_a_nan(self) -> None:
        bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
        y = torch.empty(4, dtype=BF16)
        with strict():
            copy(bits.view(torch.float32), y, 4)
        assert y.isnan().all()

    @pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64])
    def test_casts_to_bfloat16_agree_with_torch(self, source: torch.dtype) -> None:
        x = torch.tensor(SPECIALS, dtype=source)
        y = torch.empty(len(SPECIALS), dtype=BF16)
        with strict():
            copy(x, y, len(SPECIALS))
        torch.testing.assert_close(y, x.to(BF16), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64])
    def test_casts_from_bfloat16_agree_with_torch(self, target: torch.dtype) -> None:
        x = torch.tensor(SPECIALS, dtype=BF16)
        y = torch.empty(len(SPECIALS), dtype=target)
        with strict():
            copy(x, y, len(SPECIALS))
        torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)

    def test_casts_between_bfloat16_and_integers(self) -> None:
        x = torch.tensor([-300, -1, 0, 257, 259, 100_000], dtype=torch.int32)
        y, z = torch.empty(6, dtype=BF16), torch.empty(6, dtype=torch.int32)
        with strict():
            copy(x, y, 6)
            copy(y, z, 6)
        assert y.tolist() == x.to(BF16).tolist()
        assert z.tolist() == x.to(BF16).to(torch.int32).tolist()

    def test_cast_toward_zero_when_asked(self) -> None:
        x = torch.tensor([1.01171875, -1.01171875, 1.0, float("nan")])
        y = torch.empty(4, dtype=BF16)
        with strict():
            truncate_kernel[(1,)](x, y, N=4)
        assert y[:3].tolist() == [1.0078125, -1.0078125, 1.0]
        assert y[3].isnan()

    def test_every_bit_pattern_survives_load_and_store(self) -> None:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
        y = torch.empty_like(x)
        with strict():
            copy(x, y, x.numel(), block=1 << 14)
        assert torch.equal(x.view(torch.int16), y.view(torch.int16))

    def test_dot_accumulates_in_float32(self) -> None:
        a, b = values(1024, BF16, 4).view(32, 32), values(1024, BF16, 5).view(32, 32)
        out = torch.empty(32, 32)
        with strict() as meter:
            dot_kernel[(1,)](a, b, out, N=32)
        torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
        assert meter.dot_flops == 2 * 32**3

    def test_float_argument_promotes_as_under_the_jit(self) -> None:
        x = torch.tensor([1.0, 3.0], dtype=BF16)
        y = torch.empty(2)
        with strict():
            scale_kernel[(1,)](x, y, 1.001, N=2)
        assert torch.equal(y, x.float() * 1.001)

    @pytest.mark.parametrize("scan", [False, True])
    def test_raw_reduction_raises_and_upcast_one_is_right(self, scan: bool) -> None:
        x, y = torch.arange(8).to(BF16), torch.empty(8)
        with strict():
            sum_kernel[(1,)](x, y, N=8, UPCAST=True, SCAN=scan)
        assert y[7 if scan else 0] == 28
        with strict(), pytest.raises(UnsupportedError, match="upcast to fp32"):
            sum_kernel[(1,)](x, y, N=8, UPCAST=False, SCAN=scan)


@triton.jit
def offset_kernel(x_ptr, y_ptr, offset, STORE: tl.constexpr):
    if STORE:
        tl.store(y_ptr + offset, tl.load(x_ptr))
    else:
        tl.store(y_ptr, tl.load(x_ptr + offset))


@triton.jit
def address_kernel(address, y_ptr):
    tl.store(y_ptr, tl.load(address.to(tl.int64).to(tl.pointer_type(tl.float32))))


@triton.jit
def bytes_kernel(x_ptr, y_ptr, offset):
    tl.store(y_ptr, tl.load(x_ptr.to(tl.pointer_type(tl.int8)) + offset))


@triton.jit
def row_kernel(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * stride + i, mask=i < n, other=0.0)
    tl.store(y_ptr + row, tl.sum(x))


class TestBounds:
    def test_unmasked_tail_load_raises_and_names_everything(self) -> None:
        x, y = torch.zeros(13), torch.zeros(16)
        with (
            strict(),
            pytest.raises(
                OutOfBoundsError,
                match=r"'copy_kernel', program \(1, 0, 0\): load of 'x_ptr' .* at element 13",
            ),
        ):
            copy(x, y, 13, masked=False)

    def test_unmasked_tail_store_raises_before_it_writes(self) -> None:
        whole = torch.zeros(16)
        with strict(), pytest.raises(OutOfBoundsError, match=r"store of 'y_ptr'.*at element 13"):
            copy(torch.ones(16), whole[:13], 13, masked=False)
        assert whole[8:].eq(0).all()

    def test_masked_twin_passes(self) -> None:
        x, y = torch.arange(13.0), torch.zeros(13)
        with strict():
            copy(x, y, 13)
        assert torch.equal(x, y)

    @pytest.mark.parametrize("store", [False, True])
    @pytest.mark.parametrize("offset", [-1, 5])
    def test_guard_band_of_the_same_storage_is_out_of_bounds(
        self, store: bool, offset: int
    ) -> None:
        guards = Guards()
        x, y = guards(torch.zeros(5)), guards(torch.zeros(5))
        with strict(), pytest.raises(OutOfBoundsError, match=f"element {offset}"):
            offset_kernel[(1,)](x, y, offset, STORE=store)
        guards.check()

    def test_landing_in_another_argument_is_out_of_bounds(self) -> None:
        storage = torch.zeros(8)
        with strict(), pytest.raises(OutOfBoundsError, match="'x_ptr'"):
            offset_kernel[(1,)](storage[:4], storage[4:], 4, STORE=False)

    def test_gap_between_rows_is_out_of_bounds(self) -> None:
        x, y = torch.ones(3, 8)[:, :5], torch.zeros(3)
        with strict():
            row_kernel[(3,)](x, y, 8, 5, BLOCK=8)
        assert y.tolist() == [5, 5, 5]
        with strict(), pytest.raises(OutOfBoundsError, match="not an element of the view"):
            row_kernel[(3,)](x, y, 8, 6, BLOCK=8)

    def test_expanded_view_is_in_bounds(self) -> None:
        x, y = torch.ones(1, 5).expand(3, 5), torch.zeros(3)
        with strict():
            row_kernel[(3,)](x, y, 0, 5, BLOCK=8)
        assert y.tolist() == [5, 5, 5]

    def test_cast_pointer_keeps_its_tensor(self) -> None:
        storage = torch.zeros(4, dtype=torch.int32)
        x, y = storage[:3], storage[3:].view(torch.int8)
        with strict():
            bytes_kernel[(1,)](x, y, 11)
        with strict(), pytest.raises(OutOfBoundsError, match=r"load of 'x_ptr' .* at element 3,"):
            bytes_kernel[(1,)](x, y, 12)

    def test_earlier_launch_does_not_make_a_tensor_legal(self) -> None:
        x, y = torch.ones(4), torch.zeros(4)
        with strict():
            copy(x, y, 4)
            with pytest.raises(OutOfBoundsError, match="hits no tensor of this launch"):
                address_kernel[(1,)](x.data_ptr(), y)

    def test_empty_tensor_has_no_elements(self) -> None:
        with strict(), pytest.raises(OutOfBoundsError, match="outside its 0"):
            offset_kernel[(1,)](torch.empty(0), torch.zeros(1), 0, STORE=False)


@triton.jit
def shared_store_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def neighbour_kernel(x_ptr, shift):
    me = tl.program_id(0)
    value = tl.load(x_ptr + (me + shift) % tl.num_programs(0))
    tl.store(x_ptr + me, value + 1)


@triton.jit
def handover_kernel(x_ptr):
    last = tl.num_programs(0) - 1
    value = tl.load(x_ptr + last, mask=tl.program_id(0) < last, other=0.0)
    tl.store(x_ptr + last, value, mask=tl.program_id(0) == last)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, READ: tl.constexpr):
    tl.atomic_add(x_ptr, 1)
    if READ:
        tl.store(y_ptr + tl.program_id(0), tl.load(x_ptr))


class TestRaces:
    def test_write_after_write(self) -> None:
        with strict(), pytest.raises(RaceError, match=r"write after write .* 'y_ptr'"):
            shared_store_kernel[(2,)](torch.zeros(1, dtype=torch.int32))

    def test_read_after_write(self) -> None:
        x = torch.zeros(4)
        with (
            strict(),
            pytest.raises(RaceError, match=r"read after write .*program \(1, 0, 0\) and program"),
        ):
            neighbour_kernel[(4,)](x, 3)

    def test_write_after_read(self) -> None:
        with strict(), pytest.raises(RaceError, match=r"write after read .* element 1 of 'x_ptr'"):
            handover_kernel[(2,)](torch.zeros(2))

    def test_every_conflict_is_kept_when_asked(self) -> None:
        with strict(raise_on_conflict=False) as meter:
            neighbour_kernel[(4,)](torch.zeros(4), 1)
        # Programs 1 to 3 write what their predecessor read; the last reads what program 0 wrote.
        found = [(c.kind, c.element, c.program[0]) for c in meter.conflicts]
        assert found == [
            ("write after read", 1, 1),
            ("write after read", 2, 2),
            ("read after write", 0, 3),
            ("write after read", 3, 3),
        ]
        assert all(c.other is not None for c in meter.conflicts)

    def test_write_after_several_reads_has_no_single_other(self) -> None:
        with strict(raise_on_conflict=False) as meter:
            handover_kernel[(3,)](torch.zeros(3))
        (conflict,) = meter.conflicts
        assert conflict.other is None
        assert "several programs" in str(conflict)

    def test_own_elements_are_no_conflict(self) -> None:
        with strict() as meter:
            neighbour_kernel[(4,)](torch.zeros(4), 0)
        assert meter.conflicts == []

    def test_conflict_between_two_views_of_one_storage(self) -> None:
        x = torch.zeros(32)
        with strict(), pytest.raises(RaceError, match="read after write"):
            copy(x[:24], x[8:], 24)

    def test_programs_far_apart_on_a_grid_of_three_dimensions(self) -> None:
        with strict(), pytest.raises(RaceError, match=r"program \(0, 0, 1\)"):
            shared_store_kernel[(1, 1, 2)](torch.zeros(1, dtype=torch.int32))

    def test_atomics_do_not_conflict_among_themselves(self) -> None:
        x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        with strict() as meter:
            atomic_kernel[(4,)](x, y, READ=False)
        assert x.item() == 4
        assert meter.bytes["x_ptr"].atomic == 16

    def test_plain_read_conflicts_with_atomics_of_others(self) -> None:
        x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        with strict(raise_on_conflict=False) as meter:
            atomic_kernel[(2,)](x, y, READ=True)
        kinds = [c.kind for c in meter.conflicts]
        assert kinds == ["atomic update after read", "read after atomic update"]

    def test_launches_are_ordered_so_they_do_not_conflict(self) -> None:
        x = torch.zeros(8)
        with strict() as meter:
            copy(torch.ones(8), x, 8, block=4)
            copy(torch.ones(8), x, 8, block=2)
        assert len(meter.launches) == 2


@triton.jit
def exp_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, tl.exp2(x * 2.0 + 1.0), mask=i < n)
    tl.store(y_ptr + i, tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def stride_kernel(x_ptr, y_ptr, step, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + tl.program_id(0) * N + i, tl.load(x_ptr + i * step))


class TestMeter:
    def test_bytes_are_those_of_active_lanes(self) -> None:
        x, y = torch.zeros(13), torch.zeros(13, dtype=BF16)
        with strict() as meter:
            copy(x, y, 13)
        assert meter.bytes["x_ptr"].loaded == 13 * 4
        assert meter.bytes["y_ptr"].stored == 13 * 2
        assert meter.bytes["x_ptr"].stored == meter.bytes["y_ptr"].loaded == 0
        assert meter.total_requested() == 13 * 6
        assert meter.total_requested(["x_ptr"]) == 13 * 4

    def test_second_pass_counts_again_but_not_in_the_footprint(self) -> None:
        storage = torch.zeros(64)
        x, y = storage[:13], torch.zeros(13)
        assert storage.data_ptr() % 32 == 0
        with strict() as meter:
            exp_kernel[(1,)](x, y, 13, BLOCK=16)
        traffic = meter.bytes["x_ptr"]
        assert traffic.loaded == 2 * 13 * 4
        assert traffic.sectors_loaded == traffic.footprint_loaded == 64
        assert meter.bytes["y_ptr"].stored == 2 * 13 * 4
        assert meter.flops == 2 * 16
        assert meter.transcendentals == 16
        assert meter.reduced == 16

    def test_strided_access_touches_a_sector_a_lane(self) -> None:
        x, y = torch.zeros(64), torch.zeros(16)
        with strict() as meter:
            stride_kernel[(2,)](x, y, 8, N=8)
        traffic = meter.bytes["x_ptr"]
        assert traffic.loaded == 2 * 8 * 4
        assert traffic.sectors_loaded == 2 * 8 * 32
        assert traffic.footprint_loaded == 8 * 32

    def test_kernels_and_launches_are_told_apart(self) -> None:
        x, y = torch.zeros(8), torch.zeros(8)
        with strict() as meter:
            copy(x, y, 8)
            copy(x, y, 8)
            exp_kernel[(1,)](x, y, 8, BLOCK=8)
        assert meter.of("copy_kernel").bytes["x_ptr"].loaded == 2 * 32
        assert meter.of("exp_kernel").bytes["x_ptr"].loaded == 2 * 32
        assert meter.bytes["x_ptr"].loaded == 4 * 32
        assert [launch.kernel for launch in meter.launches][-1] == "exp_kernel"

    def test_one_tensor_under_two_names_is_counted_by_name(self) -> None:
        x = torch.ones(8)
        with strict() as meter:
            copy(x, x, 8)
        assert (meter.bytes["x_ptr"].loaded, meter.bytes["x_ptr"].stored) == (32, 0)
        assert (meter.bytes["y_ptr"].loaded, meter.bytes["y_ptr"].stored) == (0, 32)


class TestGuards:
    @pytest.mark.parametrize(
        "tensor",
        [
            torch.arange(12.0).view(3, 4),
            torch.arange(12.0).view(3, 4).t(),
            torch.arange(24).view(3, 8)[:, :5],
            torch.arange(9.0)[1:],
            torch.ones(1, 4, dtype=BF16).expand(3, 4),
            torch.tensor([True, False]),
            torch.empty(0, 3),
            torch.tensor(2.0),
        ],
        ids=["plain", "transposed", "gaps", "misaligned", "expanded", "bool", "empty", "scalar"],
    )
    def test_copy_keeps_values_layout_and_alignment(self, tensor: torch.Tensor) -> None:
        one = guarded(tensor)
        assert torch.equal(one.tensor, tensor)
        assert one.tensor.stride() == tensor.stride()
        assert one.tensor.dtype == tensor.dtype
        if tensor.numel():
            assert one.tensor.data_ptr() % 64 == tensor.data_ptr() % 64
        one.check_guards()

    @pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int64, torch.uint8])
    @pytest.mark.parametrize("element", [-1, 5, 8, 13])
    def test_write_outside_is_found(self, dtype: torch.dtype, element: int) -> None:
        one = guarded(torch.zeros(2, 8, dtype=dtype)[:, :5])
        storage = one.tensor.as_strided((1,), (1,), one.tensor.storage_offset() + element)
        if element == 8:  # the first element of the second row
            storage.fill_(1)
            one.check_guards()
        else:
            storage.fill_(1)
            with pytest.raises(AssertionError, match=f"guard written at element {element} "):
                one.check_guards()

    def test_bands_hold_nan_and_large_integers(self) -> None:
        floats = guarded(torch.zeros(4)).tensor
        assert floats.as_strided((1,), (1,), floats.storage_offset() + 4).isnan().all()
        ids = guarded(torch.zeros(4, dtype=torch.int64)).tensor
        assert ids.as_strided((1,), (1,), ids.storage_offset() - 1).item() < -(2**60)

    def test_requires_grad_is_kept(self) -> None:
        assert guarded(torch.zeros(3, requires_grad=True)).tensor.requires_grad


class TestSession:
    def test_triton_is_as_it_was_afterwards(self) -> None:
        def state() -> tuple[Any, ...]:
            return (
                triton_interpreter.interpreter_builder,
                triton_interpreter.interpreter_semantic.builder,
                triton_interpreter.GridExecutor.__call__,
                triton_interpreter._implicit_cvt,
                triton_interpreter.ReduceOps.apply_impl,
                triton_interpreter.ScanOps.apply_impl,
                torch.are_deterministic_algorithms_enabled(),
            )

        before = state()
        with strict():
            assert all(now is not then for now, then in zip(state(), before, strict=True))
        assert state() == before
        with pytest.raises(OutOfBoundsError), strict():
            copy(torch.zeros(1), torch.zeros(8), 8)
        assert state() == before

    def test_nested_blocks_meter_separately(self) -> None:
        x, y = torch.zeros(8), torch.zeros(8)
        with strict() as outer:
            with strict() as inner:
                copy(x, y, 8)
            assert (len(outer.launches), len(inner.launches)) == (0, 1)
            copy(x, y, 8)
        assert (len(outer.launches), len(inner.launches)) == (1, 1)
        assert inner.bytes["x_ptr"].loaded == outer.bytes["x_ptr"].loaded == 32

    def test_uninitialised_memory_is_nan(self) -> None:
        with strict():
            assert torch.empty(3).isnan().all()

    def test_errors_of_the_kernel_itself_come_through(self) -> None:
        with strict(), pytest.raises(triton_interpreter.InterpreterError):
            dot_kernel[(1,)](torch.zeros(6), torch.zeros(6), torch.zeros(6), N=3)
