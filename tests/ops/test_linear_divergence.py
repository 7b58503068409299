"""`linear_divergence`: the table of cases, and its arguments. What the fused-linear
operators share is in test_linear_head.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pydistill import divergence, linear_divergence
from pydistill.testing import Case, load

OP = "linear_divergence"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "adaptive_kl"])
def test_is_the_divergence_of_the_logits(kind: str, impl: str) -> None:
    hidden, weight = torch.randn(2, 3, 8), torch.randn(40, 8)
    theirs, head = torch.randn(2, 3, 5), torch.randn(40, 5)
    labels = torch.randint(0, 40, (2, 3))
    options: dict[str, Any] = {
        "labels": labels,
        "label_weight": 0.25,
        "z_loss": 0.01,
        "temperature": 2.0,
    }
    got = linear_divergence(hidden, weight, theirs, head, kind, impl=impl, **options)
    want = divergence(hidden @ weight.T, theirs @ head.T, kind, impl=impl, **options)
    close(got, want, rtol=2e-5, atol=1e-6)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "kl"}, ValueError, "kind='kl' is not known"),
    (
        {"teacher_hidden": torch.randn(5, 5)},
        ValueError,
        r"student_hidden has prefix \(4,\) and teacher_hidden \(5,\)",
    ),
    (
        {"teacher_weight": torch.randn(41, 5)},
        ValueError,
        "student_weight has 40 tokens and teacher_weight 41",
    ),
    (
        {"teacher_weight": torch.randn(40, 6)},
        ValueError,
        "teacher_hidden has 5 features and teacher_weight takes 6",
    ),
    (
        {"teacher_hidden": torch.randn(4, 5, requires_grad=True)},
        ValueError,
        "teacher_hidden requires grad",
    ),
    (
        {"teacher_bias": torch.randn(40, requires_grad=True)},
        ValueError,
        "teacher_bias requires grad",
    ),
    ({"student_bias": torch.randn(39)}, ValueError, r"student_bias has shape \(39,\)"),
    ({"student_hidden": torch.ones(4, 8).long()}, TypeError, "student_hidden is torch.int64"),
    ({"student_weight": torch.empty(0)}, ValueError, "GatheredParameters"),
    ({"student_softcap": 0.0}, ValueError, "student_softcap=0 is outside"),
    ({"teacher_logit_scale": math.nan}, ValueError, "teacher_logit_scale=nan"),
    ({"gradient": "forward"}, ValueError, "gradient='forward' is not known; use one of recompute"),
    (
        {"gradient": "in_forward", "reduction": "none"},
        ValueError,
        "needs reduction='mean' or 'sum'",
    ),
    (
        {"convention": "torchtune"},
        ValueError,
        "convention='torchtune' reports kind='forward_kl' as a cross-entropy",
    ),
    ({"labels": torch.full((4,), 40), "label_weight": 0.5}, ValueError, "labels holds 40"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_wrong_arguments(
    given: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    call = {
        "student_hidden": torch.randn(4, 8),
        "student_weight": torch.randn(40, 8),
        "teacher_hidden": torch.randn(4, 5),
        "teacher_weight": torch.randn(40, 5),
        "impl": impl,
        **given,
    }
    with pytest.raises(error, match=message):
        linear_divergence(**call)


def test_conventions(impl: str) -> None:
    call = (torch.randn(4, 8), torch.randn(40, 8), torch.randn(4, 5), torch.randn(40, 5))
    got = linear_divergence(*call, "jsd", beta=0.0, convention="trl", impl=impl)
    close(got, linear_divergence(*call, "forward_kl", impl=impl))


def test_fp64_is_for_the_reference(kernel_impl: str) -> None:
    call = (torch.randn(4, 8), torch.randn(40, 8).double(), torch.randn(4, 5), torch.randn(40, 5))
    with pytest.raises(ValueError, match="float64 has no kernel"):
        linear_divergence(*call, impl=kernel_impl)
