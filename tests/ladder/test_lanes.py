"""Many programs interpreted at once: each computes what it computes alone."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tools.ladder.interpreter import UnsupportedError, lanes, strict

pytestmark = [pytest.mark.interpreter, pytest.mark.ladder]


@triton.jit
def ways_kernel(x_ptr, count_ptr, out_ptr, n, scale, BLOCK: tl.constexpr):
    """Loops and conditions of a program's own, reductions, a scan, and stores before and after."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + program * (BLOCK + 1) + BLOCK, -1.0)
    x = tl.load(x_ptr + program * n + i, mask=i < n, other=-1.0).to(tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for j in range(tl.load(count_ptr + program)):
        total += tl.sum(tl.where(i == j, x, 0.0), 0) * scale
    if tl.max(x, 0) > 2.0:
        total = tl.min(x, 0) - total
        if total < -1.0:
            x = tl.cumsum(x, 0)
    while tl.abs(total) > 0.5:
        total *= 0.5
    tl.store(out_ptr + program * (BLOCK + 1) + i, x + total)
    tl.store(out_ptr + program * (BLOCK + 1) + BLOCK, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 100])
def test_bit_for_bit_what_programs_compute_alone(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(30, 50).to(dtype)
    count = torch.randint(0, 9, (30,))
    one, many = torch.empty(30, 65), torch.empty(30, 65)
    with strict():
        ways_kernel[(6, 5)](x, count, one, 50, 0.3, BLOCK=64)
    with lanes(width):
        ways_kernel[(6, 5)](x, count, many, 50, 0.3, BLOCK=64)
    assert len({tuple(row) for row in one.tolist()}) == 30
    assert torch.equal(one.view(torch.int32), many.view(torch.int32))


@triton.jit
def own_store_kernel(x_ptr, OFFSET: tl.constexpr):
    at = x_ptr + 2 * tl.program_id(0)
    tl.store(at, 1.0)
    tl.store(at + 1, tl.load(at + OFFSET) + 1.0)


def test_what_waits_to_be_stored_is_not_read() -> None:
    x = torch.zeros(6)
    with lanes():
        own_store_kernel[(3,)](x, OFFSET=1)
        assert x.tolist() == [1.0] * 6
        with pytest.raises(UnsupportedError, match="reads what it has written"):
            own_store_kernel[(3,)](x, OFFSET=0)


@triton.jit
def plane_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i[:, None] * BLOCK + i[None, :], 0.0)


def test_what_is_not_interpreted_raises() -> None:
    with lanes(), pytest.raises(UnsupportedError, match="lanes do not"):
        plane_kernel[(1,)](torch.zeros(4, 4), BLOCK=4)
