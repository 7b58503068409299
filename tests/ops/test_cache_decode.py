"""`cache_decode`: the table of cases on every backend, arguments, and what compiles."""

from collections.abc import Callable

import pytest
import torch

from pydistill import cache_decode
from pydistill.reference.cache_decode import VOCAB_LIMIT, layout
from pydistill.testing import Case, load

OP = "cache_decode"
TABLE = [case for case in load(OP) if "bench" not in case.marks]


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_by_hand(impl: str) -> None:
    """Ids 3, 10, 37 of 40 with l = 3, codes 0, 255, 2 and an empty slot."""
    low = 3 | 2 << 3 | 5 << 6
    head = [low & 255, low >> 8, 1 | 1 << 2 | 1 << 6, 0, 255, 2, 9]
    header = torch.tensor([-0.5, 0.25, -3.0]).view(torch.uint8).tolist()
    packed = torch.tensor([head + header], dtype=torch.uint8)
    got = cache_decode(packed, 40, 4, temperature=2.0, impl=impl)
    assert got.topk_ids.tolist() == [[3, 10, 37, -1]]
    assert got.topk_logprobs.tolist() == [[-0.5, -torch.inf, -1.5, -torch.inf]]
    assert got.tail_logprob.tolist() == [-3.0]
    assert (got.temperature, got.vocab_size) == (2.0, 40)


def test_threads_and_rows_do_not_change_a_row(kernel_impl: str) -> None:
    inputs = next(case for case in TABLE if "threads" in case.id).inputs("cpu", 0)
    want = cache_decode(**inputs, impl=kernel_impl)
    torch.set_num_threads(2)
    got = cache_decode(**inputs, impl=kernel_impl)
    flipped = cache_decode(**inputs, rows=torch.arange(5000).flip(0), impl=kernel_impl)
    for a, b, c in zip(want[:3], got[:3], flipped[:3], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c.flip(0))


PACKED = torch.zeros((3, layout(40, 4).stride), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"packed": PACKED.float()}, TypeError, "float32"),
        ({"packed": PACKED[:, :-1]}, ValueError, r"contiguous \[N, 19\]"),
        ({"packed": PACKED[0]}, ValueError, r"contiguous \[N, 19\]"),
        ({"packed": torch.zeros(3, 38, dtype=torch.uint8)[:, ::2]}, ValueError, "strides"),
        ({"k": 0}, ValueError, "k=0 is outside 1..40"),
        ({"k": 41}, ValueError, "k=41 is outside 1..40"),
        ({"vocab_size": 0}, ValueError, "vocab_size=0"),
        ({"vocab_size": VOCAB_LIMIT + 1}, ValueError, "2147483649"),
        ({"codes": "int4"}, ValueError, "codes='int4' is not known; use one of uint8, uint16"),
        ({"rows": torch.tensor([0, 3])}, ValueError, r"rows holds 3, .* has 3 rows; pass 0\.\.2"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows holds -1"),
        ({"rows": torch.tensor([0.0])}, TypeError, r"rows\.long\(\)"),
        ({"impl": "triton"}, ValueError, "triton"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cache_decode(**{"packed": PACKED, "vocab_size": 40, "k": 4, **arguments})


def test_the_kernel_checks_what_it_is_given(each_cpu: str) -> None:
    """Below the public function too, no argument makes it leave its memory."""
    kernel = torch.ops.pydistill.cache_decode_fwd.default
    ids, log_p, tail = torch.zeros(3, 4).long(), torch.zeros(3, 4), torch.zeros(3)
    for wrong in (
        (PACKED, torch.tensor([0, 1, 3]), 40, 1, ids, log_p, tail),
        (PACKED, None, 41000, 1, ids, log_p, tail),
        (PACKED[:2].contiguous(), None, 40, 1, ids, log_p, tail),
        (PACKED, None, 40, 1, ids, log_p, tail[:2]),
    ):
        with pytest.raises(RuntimeError):
            kernel(*wrong)


def test_reshape_and_to() -> None:
    teacher = cache_decode(PACKED, 40, 4, rows=torch.zeros(2, 3).long())
    assert teacher.topk_ids.shape == (2, 3, 4)
    flat = teacher.reshape(6).to("cpu")
    assert (flat.topk_logprobs.shape, flat.tail_logprob.shape) == ((6, 4), (6,))
    assert flat.vocab_size == 40
