"""Token weights refuse what cannot be right, by value and with the fix."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pydistill import weights

T, F = True, False
NAN, INF = math.nan, math.inf
X, C, B = (
    torch.zeros(2, 3),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.ones(2, 3, dtype=torch.bool),
)
META = torch.zeros(2, 3, device="meta")
step, seg = weights.step_weight, weights.segment_ratio
gap, tau = weights.entropy_gap_weight, weights.entropy_temperature
opener, top, margin = weights.opener_mask, weights.top_entropy_mask, weights.margin_calibrate
rate, rate_weight = weights.pass_rate, weights.pass_rate_weight

WRONG_TYPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: rate(X, 4), r"correct is of torch\.float32; pass an integer tensor"),
    (lambda: rate(3, 4), "correct is a int"),
    (lambda: rate(B, 4), r"correct is of torch\.bool"),
    (lambda: rate(C, 4.0), "samples is a float; pass an int or"),
    (lambda: rate(C, True), "samples is a bool"),
    (lambda: rate(C, X), r"samples is of torch\.float32"),
    (lambda: rate(C, 4, prior=1.0), r"prior=1\.0 is not a pair; pass \(a0, b0\)"),
    (lambda: rate(C, 4, prior=(1, 2, 3)), "is not a pair"),
    (lambda: rate(C, 4, prior=("a", 2)), r"prior\[0\] is a str; pass a number"),
    (lambda: rate_weight(C, 4, "a"), "alpha is a str"),
    (lambda: rate_weight(C, 4, 1, True), "beta is a bool"),
    (lambda: step(C, X, C, delta=0.1), r"teacher_logprob is of torch\.int64; pass an fp64, fp32"),
    (lambda: step(X, B, C, delta=0.1), r"student_logprob is of torch\.bool"),
    (lambda: step(X, X, X, delta=0.1), r"segments is of torch\.float32; pass an integer tensor"),
    (lambda: seg(X, X, B), r"segments is of torch\.bool"),
    (lambda: seg(X, X, C, mask=C), r"mask is of torch\.int64; pass a bool tensor"),
    (lambda: step(X, X, C, delta=None), "delta is a NoneType"),
    (lambda: weights.entropy([1.0]), "logits is a list"),
    (lambda: weights.entropy(C), r"logits is of torch\.int64"),
    (lambda: gap(C, X), "student_entropy is of"),
    (lambda: gap(X, C), "teacher_entropy is of"),
    (lambda: opener(C), "entropy is of"),
    (lambda: top(B), "entropy is of"),
    (lambda: margin(C, B, 0.1), "advantages is of"),
    (lambda: margin(X, C, 0.1), r"correct is of torch\.int64; pass a bool tensor"),
    (lambda: margin(X.to(torch.complex64), B, 0.1), r"advantages is of torch\.complex64"),
]  # fmt: skip

WRONG_VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: rate(C + 5, 4), "correct holds 5; pass 0 <= correct <= samples"),
    (lambda: rate(C - 1, 4), "correct holds -1"),
    (lambda: rate(C, -1), "samples holds -1; pass n >= 0"),
    (lambda: rate(C, torch.tensor([4, 4])), r"samples has shape \(2,\); pass \(2, 3\)"),
    (lambda: rate(C, 0, prior=(0, 0)), r"samples \+ prior holds 0; sample, or give a prior"),
    (lambda: rate_weight(C, 0, prior=(0, 0)), r"samples \+ prior holds 0"),
    (lambda: rate(C, 4, prior=(-1, 1)), r"prior\[0\]=-1 is outside \[0, inf\)"),
    (lambda: rate(C, 4, prior=(1, NAN)), r"prior\[1\]=nan is outside"),
    (lambda: rate_weight(C, 4, -0.5), r"alpha=-0\.5 is outside \[0, inf\)"),
    (lambda: rate_weight(C, 4, 1, INF), "beta=inf is outside"),
    (lambda: rate_weight(C, 4, 1, -2), r"beta=-2 is outside \[0, inf\)"),
    (lambda: rate_weight(C, 4, estimator="mle"), "estimator='mle' is not known; use plugin, post"),
    (lambda: rate_weight(C, 4, prior=(0, 1), estimator="posterior"), r"prior=\(0, 1\) is improper"),
    (lambda: rate_weight(C, 4, prior=(1, 0), estimator="posterior"), r"prior=\(1, 0\) is improper"),
    (lambda: rate_weight(C, 4, 0.5, estimator="unbiased"), r"alpha=0\.5, beta=1 must be integers"),
    (lambda: rate_weight(C, 4, 1, 1.5, estimator="unbiased"), r"beta=1\.5 must be integers"),
    (lambda: rate_weight(C, 4, 3, 2, estimator="unbiased"), "samples holds 4; pass n >= .* = 5"),
    (lambda: step(X, X, C, delta=-0.1), r"delta=-0\.1 is outside \[0, inf\)"),
    (lambda: step(X, X, C, delta=0.1, eps=0), r"eps=0 is outside \(0, inf\)"),
    (lambda: step(X, X[0], C, delta=0.1), r"student_logprob has shape \(3,\); pass \(2, 3\)"),
    (lambda: step(X, X, C[:1], delta=0.1), r"segments has shape \(1, 3\)"),
    (lambda: step(X[0, 0], X[0, 0], C[0, 0], delta=0.1), "teacher_logprob is a scalar; pass seq"),
    (lambda: step(X + 0.5, X, C, delta=0.1), r"teacher_logprob holds 0\.5; pass log-prob"),
    (lambda: seg(X, X + 0.5, C), r"student_logprob holds 0\.5"),
    (lambda: seg(X, X, C + 3), "segments holds 3; number them from 0 to 2"),
    (lambda: seg(X, X, C, mask=B[0]), r"mask has shape \(3,\)"),
    (lambda: seg(X, META, C), "student_logprob is on meta; move it to cpu"),
    (lambda: weights.entropy(X[0, 0]), r"logits has shape \(\); pass \[\.\.\., V\] with V >= 1"),
    (lambda: weights.entropy(X[:, :0]), r"logits has shape \(2, 0\)"),
    (lambda: gap(X, X[0]), r"teacher_entropy has shape \(3,\)"),
    (lambda: gap(X - 1, X), "student_entropy holds -1; pass entropies in nats, >= 0"),
    (lambda: gap(X, X + INF), "teacher_entropy holds inf"),
    (lambda: gap(X, X, mask=B[0]), "mask has shape"),
    (lambda: opener(X - 0.01), r"entropy holds -0\.01"),
    (lambda: opener(X, share=0), r"share=0 is outside \(0, 1\]; choose a value inside it"),
    (lambda: opener(X, share=1.5), r"share=1\.5 is outside"),
    (lambda: opener(X[0, 0]), "entropy is a scalar"),
    (lambda: top(X + INF), "entropy holds inf"),
    (lambda: top(X, 0), r"fraction=0 is outside \(0, 1\]"),
    (lambda: top(X, 1.1), r"fraction=1\.1 is outside"),
    (lambda: top(X[0, 0]), "entropy is a scalar"),
    (lambda: tau(X, gain=-1), "gain=-1 is outside"),
    (lambda: tau(X, slope=INF), r"slope=inf is outside \(-inf, inf\)"),
    (lambda: tau(X, center=NAN), "center=nan is outside"),
    (lambda: tau(X, low=0), r"low=0 is outside \[0\.1, 10\]"),
    (lambda: tau(X, low=1.5), r"high=1\.5 is outside \(1\.5, 10\]"),
    (lambda: tau(X, high=11), r"high=11 is outside"),
    (lambda: tau(X, iterations=0), "iterations=0 is not an int from 1 to 60"),
    (lambda: tau(X, iterations=61), "iterations=61"),
    (lambda: tau(X, iterations=2.0), r"iterations=2\.0"),
    (lambda: tau(X, mask=B), r"mask has shape \(2, 3\); pass \(2,\)"),
    (lambda: margin(X, B[0], 0.1), r"correct has shape \(3,\)"),
    (lambda: margin(X, B, -1), r"delta=-1 is outside \[0, inf\)"),
    (lambda: margin(X, B, 0.1, mask=B[0]), "mask has shape"),
    (lambda: margin(X[0, 0], B[0, 0], 0.1), "advantages is a scalar"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES, ids=lambda case: case[1])
def test_wrong_types(case: tuple[Callable[[], Any], str]) -> None:
    with pytest.raises(TypeError, match=case[1]):
        case[0]()


@pytest.mark.parametrize("case", WRONG_VALUES, ids=lambda case: case[1])
def test_wrong_values(case: tuple[Callable[[], Any], str]) -> None:
    with pytest.raises(ValueError, match=case[1]):
        case[0]()


def test_where_elements_cannot_be_read_bad_ones_become_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    two = torch.tensor([[0.1, 0.2, 0.3], [0.1, -2.0, 0.3]])
    assert rate(torch.tensor([1, 9, -1]), 4).isnan().tolist() == [F, T, T]
    assert rate(torch.tensor([0, 0]), torch.tensor([0, 4]), prior=(0, 0)).isnan().tolist() == [T, F]
    short = rate_weight(torch.tensor([0, 1]), torch.tensor([1, 2]), estimator="unbiased")
    assert short.isnan().tolist() == [T, F]
    assert gap(two, two).isnan().tolist() == [[F, F, F], [F, T, F]]
    assert opener(two, share=1.0).tolist() == [[T, T, T], [F, F, F]]
    assert top(two, 1.0).tolist() == [[T, T, T], [F, F, F]]
    segments = torch.tensor([[0, 1, 2], [0, 1, 2]])
    for function in (seg, lambda *x: step(*x, delta=0.1)):
        assert function(-two - 5, -two - 5, segments).isnan().sum() == 0
        assert function(X, two.clamp_max(0) * -1, segments).isnan().tolist() == [[F] * 3, [F, T, F]]
        beyond = torch.tensor([[0, 1, 2], [0, 1, 3]])
        assert function(X, X, beyond).isnan().tolist() == [[F] * 3, [T] * 3]
