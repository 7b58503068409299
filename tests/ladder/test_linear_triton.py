"""The operators from hidden states over Triton's kernels, in the strict interpreter.

They have no kernel of their own: what is tested is that the driver of `_linear_head.py` gives the
row operators' kernels what they take, whole rows in forward and tiles of columns, in place, in
backward, in both gradient modes. Products run in torch, and are not metered.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from _pytest.mark import ParameterSet

from pydistill import linear_divergence, linear_token_logprob, linear_topk_divergence, topk_logprobs
from pydistill.testing.case import Case, check, compare, expected
from pydistill.testing.cases.topk_divergence import has_hard_terms
from tools.ladder.cases import ladder_cases
from tools.ladder.interpreter import Meter, strict
from tools.ladder.mutants import topk_logprobs_triton

pytestmark = pytest.mark.interpreter

OPS = ("linear_divergence", "linear_topk_divergence", "linear_token_logprob")
FORWARD = {
    "linear_divergence": {"_divergence_forward"},
    "linear_token_logprob": {"_token_logprob_forward"},
    "linear_topk_divergence": {"_outside_sums", "_topk_divergence_forward"},
}
BACKWARD = {
    "linear_divergence": {"_divergence_backward"},
    "linear_token_logprob": {"_token_logprob_backward"},
    "linear_topk_divergence": {"_support_gradient", "_outside_gradient", "_place"},
}
SWEEP = {  # of backward, and its inputs of a tile's shape
    "linear_divergence": ("_divergence_backward", ("student", "teacher")),
    "linear_token_logprob": ("_token_logprob_backward", ("logits",)),
    "linear_topk_divergence": ("_outside_gradient", ("student",)),
}


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that short rows, and tiles of them, have several."""
    import pydistill.kernels.divergence as divergence
    import pydistill.kernels.token_logprob as token_logprob
    import pydistill.kernels.topk_divergence as topk_divergence

    for module in (divergence, token_logprob, topk_divergence):
        monkeypatch.setattr(module, "THREADS", 64)
    monkeypatch.setattr(divergence, "KEPT_THREADS", 64)


@pytest.mark.parametrize("case", [case for op in OPS for case in ladder_cases(op)])
def test_table(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.shape[1] <= 1000:
        small_blocks(monkeypatch)
    with strict() as meter:
        report = check(case, "triton")
    assert report.ok, report.message
    counts = case.shape[0] > 0 and "all_masked" not in case.id
    ops = {case.op}
    if case.op == "linear_topk_divergence" and has_hard_terms(case):
        ops.add("linear_divergence")  # whose row kernels take labels and z-loss
    kernels = set().union(*(FORWARD[op] | BACKWARD[op] for op in ops)) if counts else set()
    assert launched(meter).keys() == kernels


def of_a_head(case: ParameterSet) -> bool:
    """Whether a head can have these logits, which are fp32: 0 times infinity is NaN."""
    name, dtype = str(case.id).split("-")[:2]
    return dtype == "fp32" and name not in ("infinite", "poisoned")


@pytest.mark.parametrize("case", list(filter(of_a_head, ladder_cases("topk_logprobs"))))
def test_topk_logprobs_from_hidden_states(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of rows, whose logits are those of a head with one hidden feature a row."""
    import pydistill.kernels.topk_logprobs as module

    for name in ("THREADS", "KEPT", "SLOTS"):  # so that they are restored
        monkeypatch.setattr(module, name, getattr(module, name))
    topk_logprobs_triton.small_blocks(module)
    inputs = case.inputs("cpu", 0)
    logits = inputs.pop("logits")
    rows = logits.shape[:-1].numel()
    features = max(rows, 1)
    hidden = torch.eye(rows, features).reshape(*logits.shape[:-1], features)
    weight = torch.zeros(logits.shape[-1], features)
    weight[:, :rows] = logits.reshape(rows, logits.shape[-1]).T
    with strict() as meter:
        found = topk_logprobs(hidden, weight=weight, impl="triton", **inputs)
    assert bool(meter.launches) == (rows > 0)
    for got, (name, want) in zip(found, expected(case).items(), strict=True):
        got = got.double() if name == "ids" else got
        error, line = compare(name, got, want, case.tolerances[name])
        assert error <= 1, line


@pytest.mark.ladder
@pytest.mark.parametrize("op", OPS)
def test_forward_takes_blocks_of_rows_and_backward_tiles_of_columns(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which launches there are, and that backward moves each logit once."""
    from pydistill.ops import _linear_head

    monkeypatch.setattr(_linear_head, "BLOCK_ROWS", 3)
    monkeypatch.setattr(_linear_head, "TILE_ROWS", 4)
    monkeypatch.setattr(_linear_head, "TILE_COLUMNS", 64)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(150, 8)
    with strict() as forward:
        if op == "linear_divergence":
            theirs = (torch.randn(5, 6), torch.randn(150, 6))
            loss = linear_divergence(hidden, weight, *theirs, impl="triton")
        elif op == "linear_topk_divergence":
            teacher = torch.log_softmax(torch.randn(5, 150), -1).topk(6)
            loss = linear_topk_divergence(hidden, weight, *teacher, impl="triton")
        else:
            found = linear_token_logprob(hidden, weight, torch.arange(5), impl="triton")
            loss = found.logprob.sum()
    with strict() as backward:
        loss.backward()
    assert launched(forward) == dict.fromkeys(FORWARD[op], 2)  # blocks of rows
    assert launched(backward) == dict.fromkeys(BACKWARD[op], 6)  # each in 3 tiles of columns
    kernel, inputs = SWEEP[op]
    moved = backward.of(kernel).bytes
    assert [moved[name].loaded for name in inputs] == [4 * 5 * 150] * len(inputs)
    assert moved["grad"].stored == 4 * 5 * 150


def launched(meter: Meter) -> Counter[str]:
    return Counter(launch.kernel for launch in meter.launches)
