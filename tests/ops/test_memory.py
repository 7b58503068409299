"""Kept blocks of memory: used again once they are free, never while anyone can see them, and never
more than were in use at one moment."""

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pydistill import divergence
from pydistill.ops import _memory

OP = "divergence"
ROWS, VOCAB = 64, _memory.LEAST // 4 // 64
SIZE = _memory.LEAST  # bytes of ROWS rows


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    _memory.release()
    yield
    _memory.release()


def like(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, dtype=dtype).expand(rows, VOCAB)


def test_a_freed_block_serves_the_next_request() -> None:
    first = _memory.empty_like(like())
    assert first.shape == (ROWS, VOCAB) and first.is_contiguous()
    first.fill_(3.0)
    address = first.data_ptr()
    del first
    again = _memory.empty_like(like())
    assert again.data_ptr() == address
    again.fill_(2.0)  # whether or not the system took the pages
    assert again.sum() == 2.0 * again.numel()


def test_a_block_in_use_is_left_alone() -> None:
    first = _memory.empty_like(like()).fill_(1.0)
    row = first[5]
    del first  # the view still holds the storage
    second = _memory.empty_like(like()).fill_(2.0)
    assert (row == 1.0).all() and second.data_ptr() != row.data_ptr()


def test_blocks_that_were_in_use_together_are_kept() -> None:
    first, second = _memory.empty_like(like()), _memory.empty_like(like(2 * ROWS))
    addresses = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert sorted(_memory.kept()) == [SIZE, 2 * SIZE]
    larger, smaller = _memory.empty_like(like(2 * ROWS)), _memory.empty_like(like())
    assert {larger.data_ptr(), smaller.data_ptr()} == addresses


def test_the_smallest_block_that_fits_serves() -> None:
    blocks = [_memory.empty_like(like(n * ROWS)) for n in (3, 2, 4)]
    want = blocks[1].data_ptr()
    blocks.clear()
    assert _memory.empty_like(like(ROWS + 1)).data_ptr() == want


def test_a_larger_block_does_not_leave_the_smaller_one_behind() -> None:
    first = _memory.empty_like(like())
    del first
    second = _memory.empty_like(like(2 * ROWS))
    assert _memory.kept() == []
    del second
    assert _memory.kept() == [2 * SIZE]


def test_no_more_than_were_in_use_at_one_moment() -> None:
    """Growing requests one after the other, with one block held throughout."""
    held, most = _memory.empty_like(like()), 0
    for rows in (1, 3, 2, 5, 4, 7):
        block = _memory.empty_like(like(rows * ROWS))
        most = max(most, (rows + 1) * SIZE)
        assert sum(_memory.kept()) + 2 * SIZE <= most
        del block
        assert sum(_memory.kept()) + SIZE <= most
    del held


def test_a_small_request_does_not_touch_the_kept_block() -> None:
    first = _memory.empty_like(like())
    del first
    small = _memory.empty_like(like(ROWS // 4))
    assert small.shape == (ROWS // 4, VOCAB) and _memory.kept() == [SIZE]


def test_freed_by_another_thread() -> None:
    held = [_memory.empty_like(like())]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert _memory.kept() == [SIZE]


def test_threads_never_share_a_block() -> None:
    """Four threads take, mark and free blocks of several sizes; each reads its own mark."""
    wrong = []

    def work(mark: int) -> None:
        for turn in range(20):
            block = _memory.empty_like(like(ROWS + turn % 3 * ROWS))
            block[:, 0] = mark
            time.sleep(0.001)
            if not (block[:, 0] == mark).all():
                wrong.append((mark, turn))
            del block

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sum(_memory.kept()) <= 4 * 3 * SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_successive_steps(dtype: torch.dtype, kernel_impl: str) -> None:
    """The same gradient from fresh memory, from kept memory, and while the last one still lives."""
    student, teacher = torch.randn(2, 2 * ROWS, VOCAB).to(dtype).unbind()
    rows = torch.tensor([0, 1, 2 * ROWS - 1])

    def gradient() -> Tensor:
        leaf = student.detach().requires_grad_()
        loss = divergence(leaf, teacher, student_rows=rows, teacher_rows=rows, impl=kernel_impl)
        return torch.autograd.grad(loss, leaf)[0]

    first = gradient()
    want, address = first.clone(), first.data_ptr()
    del first
    gc.collect()
    second = gradient()
    third = gradient()
    assert second.data_ptr() == address and third.data_ptr() != address
    assert torch.equal(second, want) and torch.equal(third, want)
