"""`linear_token_logprob`: the table of cases, and its arguments. What the fused-linear
operators share is in test_linear_head.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pydistill import linear_token_logprob, token_logprob
from pydistill.testing import Case, load

OP = "linear_token_logprob"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))


def test_is_the_logprob_of_the_logits(impl: str) -> None:
    hidden, weight, ids = torch.randn(2, 3, 8), torch.randn(40, 8), torch.randint(0, 40, (2, 3))
    got = linear_token_logprob(hidden, weight, ids, impl=impl)
    want = token_logprob(hidden @ weight.T, ids, impl=impl)
    close(got, want, rtol=1e-5, atol=1e-5)


def test_one_output_alone(impl: str) -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(40, 8)
    ids = torch.randint(0, 40, (4,))
    got = linear_token_logprob(hidden, weight, ids, impl=impl)
    want = token_logprob(hidden @ weight.T, ids, impl="reference")
    for a, b in zip(got, want, strict=True):
        grads = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (a, b)]
        close(*grads, rtol=1e-4, atol=1e-5)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": torch.full((4,), 40)}, ValueError, "ids holds 40, outside the 40 tokens of weight"),
    ({"ids": torch.zeros(3).long()}, ValueError, r"ids has shape \(3,\), hidden the prefix \(4,\)"),
    ({"hidden": torch.randn(4, 7)}, ValueError, "hidden has 7 features and weight takes 8"),
    ({"bias": torch.randn(3)}, ValueError, r"bias has shape \(3,\)"),
    ({"temperature": 0.0}, ValueError, "temperature=0 is outside"),
    ({"softcap": -1.0}, ValueError, "softcap=-1 is outside"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_wrong_arguments(
    given: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    call = {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(40, 8),
        "ids": torch.zeros(4).long(),
        "impl": impl,
        **given,
    }
    with pytest.raises(error, match=message):
        linear_token_logprob(**call)
