"""`divergence`'s Triton kernels in the strict interpreter: meaning, memory, bytes.

The case table runs through the public function in blocks so small that its short rows have several.
Byte counts are exact: the interpreter adds up what every lane of every access asks for.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.ops._rows import group_by_row
from pydistill.reference.divergence import KINDS, Inputs, Options, divergence_reference
from pydistill.testing.case import Case, check
from tools.ladder.cases import ladder_cases
from tools.ladder.interpreter import Guards, strict

pytestmark = pytest.mark.interpreter

ROWS, VOCAB = 2, 2048
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOADED_BY_BACKWARD = 4 * 7  # six saved values and the upstream gradient


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The module of the launchers, with blocks of 256 fp32 logits instead of 1024."""
    import pydistill.kernels.divergence as module

    monkeypatch.setattr(module, "THREADS", 64)
    monkeypatch.setattr(module, "KEPT_THREADS", 64)
    return module


@pytest.fixture
def blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, unless the row is so long that the interpreter would take minutes."""
    import pydistill.kernels.divergence as module

    if case.shape[1] <= 1000:
        monkeypatch.setattr(module, "THREADS", 64)
        monkeypatch.setattr(module, "KEPT_THREADS", 64)


@pytest.mark.parametrize("case", ladder_cases("divergence"))
def test_table(case: Case, blocks: None) -> None:
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.parametrize("case", ladder_cases("divergence", ["adaptive_kl"]))
def test_table_by_the_search_of_long_rows(
    case: Case, blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pydistill.kernels.divergence as module

    monkeypatch.setattr(module, "KEPT", 0)
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


def options_of(kind: str, **changes) -> Options:
    spec = KINDS[kind]
    return Options(
        spec.id, 1.0, spec.alpha or 0.0, spec.beta or 0.0, False, 0.0, 0.0, VOCAB
    )._replace(**changes)


def launch(kernels, s, t, options, *, with_stats=False):
    """Forward and backward of all pairs, each with its meter."""
    none = (None,) * 5
    loss, saved = torch.empty(len(s)), torch.empty(len(s), 8)
    stats, grad = torch.empty(len(s) * with_stats, 6), torch.empty_like(s)
    with strict() as forward:
        kernels.divergence_fwd(s, t, *none, *options, loss, saved, stats)
    with strict() as backward:
        kernels.divergence_bwd(
            s, t, *none, None, saved, torch.ones(len(s)), *options, grad
        )  # fmt: skip
    return loss, forward.bytes, backward.bytes


@pytest.mark.ladder
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (FP16, BF16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: str, dtypes: tuple[torch.dtype, torch.dtype], kernels) -> None:
    g = torch.Generator().manual_seed(5)
    s = torch.randn(ROWS, VOCAB, generator=g).to(dtypes[0])
    t = torch.randn(ROWS, VOCAB, generator=g).to(dtypes[1])
    _, forward, backward = launch(kernels, s, t, options_of(kind))
    sweeps = 1 if kind in ("forward_kl", "reverse_kl") else 2
    assert forward["student"].loaded == sweeps * s.nbytes
    assert forward["teacher"].loaded == sweeps * t.nbytes
    assert forward["loss"].stored == 4 * ROWS
    assert forward["saved"].stored == 32 * ROWS
    assert (backward["student"].loaded, backward["teacher"].loaded) == (s.nbytes, t.nbytes)
    assert backward["grad"].stored == s.nbytes
    assert backward["saved"].loaded + backward["upstreams"].loaded == LOADED_BY_BACKWARD * ROWS


@pytest.mark.ladder
@pytest.mark.parametrize(("dtype", "rounds"), [(FP32, 8), (BF16, 4), (FP16, 5)], ids=str)
def test_bytes_of_long_rows(
    dtype: torch.dtype, rounds: int, kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adaptive_kl's search for the head reads a row that is not kept: the teacher's, and no more
    often than it says."""
    g = torch.Generator().manual_seed(5)
    s, t = (torch.randn(ROWS, VOCAB, generator=g).to(dtype) for _ in range(2))
    kept, forward, _ = launch(kernels, s, t, options_of("adaptive_kl"))
    assert forward["teacher"].loaded == 2 * t.nbytes
    monkeypatch.setattr(kernels, "KEPT", VOCAB - 1)
    loss, forward, _ = launch(kernels, s, t, options_of("adaptive_kl"))
    assert forward["student"].loaded == 2 * s.nbytes
    assert 3 * t.nbytes <= forward["teacher"].loaded <= (2 + rounds) * t.nbytes
    torch.testing.assert_close(loss, kept, rtol=1e-6, atol=0)


@pytest.mark.ladder
def test_bytes_of_statistics_and_labels(kernels) -> None:
    s, t = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    _, forward, _ = launch(kernels, s, t, options_of("forward_kl"), with_stats=True)
    assert forward["student"].loaded == forward["teacher"].loaded == 2 * s.nbytes
    assert forward["stats"].stored == 24 * ROWS

    options = options_of("reverse_kl", label_weight=0.5, z_loss=0.1, temperature=2.0)
    loss, saved = torch.empty(ROWS), torch.empty(ROWS, 8)
    inputs = (s, t, None, None, None, torch.tensor([3, 2000]), None)
    with strict() as meter:
        kernels.divergence_fwd(*inputs, *options, loss, saved, loss[:0])
    assert meter.bytes["student"].loaded == s.nbytes + 4 * ROWS  # the labels' logits
    assert meter.bytes["teacher"].loaded == t.nbytes


@pytest.mark.ladder
def test_uncounted_rows_and_zero_upstreams_are_not_read(kernels) -> None:
    s, t = torch.randn(3, 300), torch.randn(3, 300)
    counted = torch.tensor([False, True, False])
    options = options_of("jsd", vocab=300)
    loss, saved, grad = torch.empty(3), torch.empty(3, 8), torch.empty(3, 300)
    with strict() as forward:
        kernels.divergence_fwd(
            s, t, None, None, counted, None, None, *options, loss, saved, loss[:0]
        )
    with strict() as backward:
        kernels.divergence_bwd(
            s, t, *(None,) * 6, saved, counted.float(), *options, grad
        )  # fmt: skip
    assert forward.bytes["student"].loaded == 2 * 4 * 300
    assert backward.bytes["student"].loaded == backward.bytes["teacher"].loaded == 4 * 300
    assert torch.equal(loss == 0, ~counted)
    assert torch.equal((grad == 0).all(-1), ~counted)
    assert torch.equal((saved == 0).all(-1), ~counted)


@pytest.mark.ladder
def test_repeated_student_rows_are_read_once(kernels) -> None:
    s, t = torch.randn(3, 512), torch.randn(4, 512)
    rows_s, rows_t = torch.tensor([2, 0, 2, 2]), torch.arange(4)
    options = options_of("forward_kl", vocab=512)
    loss, saved, grad = torch.empty(4), torch.empty(4, 8), torch.empty(3, 512)
    with strict():
        kernels.divergence_fwd(s, t, rows_s, rows_t, *(None,) * 3, *options, loss, saved, loss[:0])
    with strict() as meter:
        kernels.divergence_bwd(
            s, t, rows_s, rows_t, *group_by_row(rows_s, 3), None, None, saved, torch.ones(4),
            *options, grad,
        )  # fmt: skip
    assert meter.bytes["student"].loaded == 2 * 4 * 512  # row 1 is in no pair
    assert meter.bytes["teacher"].loaded == 4 * 4 * 512
    assert meter.bytes["grad"].stored == grad.nbytes


@pytest.mark.ladder
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_the_tensors_is_touched(kind: str, kernels) -> None:
    """Strides, ragged tails, a student with more columns than the vocabulary, in guard bands."""
    g, guards = torch.Generator().manual_seed(6), Guards()
    s = guards(torch.randn(3, 2, 290, generator=g)[:, 1])
    t = guards(torch.randn(3, 310, generator=g)[:, :270])
    before = s.clone()
    options = options_of(kind, vocab=270)
    loss, saved, stats = (guards(torch.empty(3, *n)) for n in ((), (8,), (6,)))
    grad, scale = guards(torch.empty(3, 290)), guards(torch.tensor([1.0, -2.0, 0.0]))
    none = (None,) * 5
    with strict():
        kernels.divergence_fwd(s, t, *none, *options, loss, saved, stats)
        kernels.divergence_bwd(s, t, *none, None, saved, scale, *options, grad)
    leaf = s.double().requires_grad_()
    want, _ = divergence_reference(Inputs(leaf, t.double(), *none), options)
    (want_grad,) = torch.autograd.grad(want, leaf, scale.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-6)
    with strict():
        kernels.divergence_overwrite(s, t, *none, scale, *options, loss)
    guards.check()
    assert torch.equal(s, grad)
    assert not torch.equal(s, before)


@pytest.mark.ladder
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_small_divergences_keep_their_digits(kind: str, kernels) -> None:
    """KL from 2e-8 to 2e-2 within 1e-5, and its gradient within 1e-5 of its largest element."""
    g = torch.Generator().manual_seed(7)
    s = 2 * torch.randn(7, 1000, generator=g)
    t = s + torch.logspace(-3.7, -0.7, 7)[:, None] * torch.randn(7, 1000, generator=g)
    options = options_of(kind, vocab=1000)
    loss, _, _ = launch(kernels, s, t, options)
    want, _ = divergence_reference(Inputs(s.double(), t.double(), *(None,) * 5), options)
    assert 1e-8 < want.min() < 1e-7
    assert ((loss - want).abs() <= 1e-5 * want).all(), (loss / want - 1).tolist()


@pytest.mark.ladder
def test_offsets_beyond_31_bits(kernels, tmp_path: Path) -> None:
    """Rows 2^30 elements apart, in a file that is mostly a hole; not metered."""
    stride = (1 << 30) + 16
    rows = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(2 * stride + 64,))
    s = torch.from_numpy(rows).as_strided((3, 48), (stride, 1))
    t = torch.randn(3, 48)
    s.copy_(torch.randn(3, 48))
    options = options_of("reverse_kl", vocab=48)
    loss, saved = torch.empty(3), torch.empty(3, 8)
    none = (None,) * 5
    kernels.divergence_fwd(s, t, *none, *options, loss, saved, loss[:0])
    leaf = s.double().requires_grad_()
    want, _ = divergence_reference(Inputs(leaf, t.double(), *none), options)
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    kernels.divergence_overwrite(s, t, *none, torch.ones(3), *options, loss)
    torch.testing.assert_close(s.double(), want_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.ladder
def test_launchers_have_the_schemas_arguments_and_the_kinds_ids(kernels) -> None:
    from pydistill.kernels._common import divergences

    for name in ("divergence_fwd", "divergence_bwd", "divergence_overwrite"):
        schema = getattr(torch.ops.pydistill_triton, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(getattr(kernels, name)).parameters) == names
    for name, spec in KINDS.items():
        assert getattr(divergences, name.upper()).value == spec.id
