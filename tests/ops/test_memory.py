"""The memory of big gradients: used again once it is free, never while anyone can see it."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pydistill import divergence
from pydistill.ops import _memory

OP = "divergence"
ROWS, VOCAB = 64, _memory.LEAST // 4 // 64


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


def test_of_two_freed_blocks_one_is_kept() -> None:
    first, second = _memory.empty_like(like()), _memory.empty_like(like())
    del first, second
    assert len(_memory._kept) == 1


@pytest.mark.parametrize("rows", [ROWS // 4, 2 * ROWS])
def test_a_block_of_another_size_is_not_held_back(rows: int) -> None:
    first = _memory.empty_like(like())
    del first
    other = _memory.empty_like(like(rows))
    assert other.shape == (rows, VOCAB)
    assert len(_memory._kept) == (rows < ROWS)  # a small request does not touch the kept block


def test_freed_by_another_thread() -> None:
    held = [_memory.empty_like(like())]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(_memory._kept) == 1


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
