"""`topk_divergence`'s Triton kernels in the strict interpreter: meaning, memory, bytes; and the
mutants that notice.

The case table runs through the public function in blocks so small that its short rows have several.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.reference import topk_divergence as reference
from pydistill.reference.divergence import KINDS
from pydistill.testing.case import Case, check
from tools.ladder.cases import ladder_cases
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutants import topk_divergence_check as common
from tools.ladder.mutants import topk_divergence_triton as mutants

pytestmark = pytest.mark.interpreter

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The module of the launchers, with blocks of 256 fp32 logits and 64 slots of the support."""
    import pydistill.kernels.topk_divergence as module

    monkeypatch.setattr(module, "THREADS", 64)
    monkeypatch.setattr(module, "SLOTS", 64)
    return module


@pytest.mark.parametrize("case", ladder_cases("topk_divergence"))
def test_table(case: Case, kernels) -> None:
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.ladder
def test_hard_rows(kernels) -> None:
    with strict():
        common.check_values(kernels)
        common.check_more(kernels)


@pytest.mark.ladder
def test_flagged_rows(kernels) -> None:
    with strict():
        common.check_flags(kernels)


@pytest.mark.ladder
def test_bytes(kernels) -> None:
    mutants.check_bytes(kernels)


@pytest.mark.ladder
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("vocab", [32000, 151936])
def test_bytes_are_within_a_twentieth_of_the_floor(vocab: int, dtype: torch.dtype) -> None:
    """All bytes, the small tensors too; 64 tokens as support. Overwriting is the sum of both."""
    import pydistill.kernels.topk_divergence as module

    g = torch.Generator().manual_seed(5)
    s = torch.randn(1, vocab, generator=g).to(dtype)
    log_p, ids = torch.log_softmax(torch.randn(1, vocab, generator=g), 1).topk(64)
    inputs = reference.Inputs(s, ids, log_p, torch.full((1,), -0.1), None, None)
    options = common.options_of("forward_kl", "bucket")
    loss, saved, grad = torch.empty(1), torch.empty(1, reference.SAVED), torch.empty_like(s)
    with strict() as forward:
        module.topk_divergence_fwd(*inputs, *options, loss, saved)
    with strict() as backward:
        module.topk_divergence_bwd(*inputs[:4], None, saved, loss.fill_(1), *options, grad)
    assert forward.total_requested() <= 1.05 * s.nbytes
    assert backward.total_requested() <= 1.05 * 2 * s.nbytes


@pytest.mark.ladder
def test_nothing_outside_the_tensors_is_touched(kernels) -> None:
    """Strided rows and gradients, in guard bands; forward, backward and in place."""
    guards = Guards()
    plain = common.rows()
    wide = torch.randn(common.ROWS, 2, common.VOCAB + 3)
    wide[:, 1, : common.VOCAB] = plain.student
    inputs = plain._replace(
        student=guards(wide[:, 1, : common.VOCAB]),
        **{
            name: guards(tensor)
            for name, tensor in plain._asdict().items()
            if name != "student" and tensor is not None
        },
    )
    options = common.options_of("jsd", "bucket")
    scale = guards(common.UPSTREAM)
    loss, saved = guards(torch.empty(common.ROWS)), guards(torch.empty(common.ROWS, 7))
    grad = guards(torch.empty(common.ROWS, common.VOCAB + 5)[:, : common.VOCAB])
    with strict():
        kernels.topk_divergence_fwd(*inputs, *options, loss, saved)
        kernels.topk_divergence_bwd(*inputs[:4], None, saved, scale, *options, grad)
    want, want_grad = common.wanted(plain, options, common.UPSTREAM)
    common.close(loss, want)
    common.compare_gradients(grad, want_grad, plain.ids, common.UPSTREAM)
    with strict():
        kernels.topk_divergence_overwrite(*inputs, scale, *options, loss, saved)
    guards.check()
    assert torch.equal(inputs.student.nan_to_num(), grad.nan_to_num())


@pytest.mark.ladder
def test_offsets_beyond_31_bits(kernels, tmp_path: Path) -> None:
    """Rows 2^30 elements apart, in a file that is mostly a hole; not metered."""
    stride = (1 << 30) + 16
    file = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(2 * stride + 64,))
    s = torch.from_numpy(file).as_strided((3, 48), (stride, 1))
    s.copy_(torch.randn(3, 48))
    log_p, ids = torch.log_softmax(torch.randn(3, 48), 1).topk(5)
    options = common.options_of("forward_kl", "renormalize")
    inputs = reference.Inputs(s, ids, log_p.log_softmax(1), None, None, None)
    want, want_grad = common.wanted(inputs, options, torch.ones(3))
    loss, saved = torch.empty(3), torch.empty(3, reference.SAVED)
    kernels.topk_divergence_overwrite(*inputs, torch.ones(3), *options, loss, saved)
    common.close(loss, want)
    torch.testing.assert_close(s.double(), want_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.ladder
def test_launchers_have_the_schemas_arguments_and_the_references_numbers(kernels) -> None:
    for name in ("topk_divergence_fwd", "topk_divergence_bwd", "topk_divergence_overwrite"):
        schema = getattr(torch.ops.pydistill_triton, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(getattr(kernels, name)).parameters) == names
    for name in ("FORWARD_KL", "REVERSE_KL", "JSD", "TVD"):
        assert getattr(kernels, name).value == KINDS[name.lower()].id
    for name in (
        "SAVED", "WITH_TAIL", "SUPPORT_ONLY", "TRUNCATED", "ID_OUT_OF_RANGE", "ID_TWICE",
    ):  # fmt: skip
        assert getattr(kernels, name).value == getattr(reference, name)
