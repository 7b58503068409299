"""Backward over tiles of a row's columns is backward over the row, on every backend.

A tile is some columns of student (and dense teacher) with `saved` of the whole row. Token ids are
shifted: of a support those elsewhere are negative, of a label any number outside the tile, whose
softmax part then counts and whose one-hot does not. Fused losses rely on it, which never hold a
whole row of logits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import pydistill  # noqa: F401  the operators' schemas
from pydistill import _registry
from pydistill.reference.divergence import KINDS, SAVED, Options
from tools.ladder.mutants import topk_divergence_check as topk

pytestmark = pytest.mark.ladder
needs_native = pytest.mark.skipif(
    not _registry.has_kernel("topk_divergence_bwd", "cpu"),
    reason="the native library is not built",
)
BOUNDS = (0, 170, 171, 431, 600)


def check_token_logprob(ops: Any) -> None:
    rows, vocab = 5, BOUNDS[-1]
    logits, ids = torch.randn(rows, vocab), torch.tensor([0, 170, 599, 300, 430])
    ups = (torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.0, -1.0, 2.0]))
    for params in (None, torch.tensor([0.5, 2.0, 1.0, 0.8, 3.0])):
        logprob, entropy, saved = torch.empty(rows), torch.empty(rows), torch.empty(rows, 5)
        ops.token_logprob_fwd(logits, ids, None, params, 0.8, logprob, entropy, saved)
        whole, tiles, written = torch.empty_like(logits), torch.empty_like(logits), logits.clone()
        ops.token_logprob_bwd(logits, ids, params, saved, *ups, 0.8, whole)
        for begin, end in pairwise(BOUNDS):
            shifted, tile = ids - begin, written[:, begin:end]
            ops.token_logprob_bwd(
                logits[:, begin:end], shifted, params, saved, *ups, 0.8, tiles[:, begin:end]
            )  # fmt: skip
            ops.token_logprob_bwd(tile, shifted, params, saved, *ups, 0.8, tile)
        torch.testing.assert_close(tiles, whole, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(written, whole, rtol=1e-6, atol=1e-9)
        live = (ups[0] != 0) | (ups[1] != 0)
        assert whole.abs().sum(1).bool().tolist() == live.tolist()


def check_divergence(ops: Any, kinds: list[str]) -> None:
    rows, vocab = 4, BOUNDS[-1]
    student, teacher = torch.randn(rows, vocab), torch.randn(rows, vocab)
    labels, upstream = torch.tensor([0, 170, 599, 300]), torch.tensor([1.0, -2.0, 0.0, 0.5])
    for kind in kinds:
        spec = KINDS[kind]
        options = Options(spec.id, 0.8, spec.alpha or 0.0, spec.beta or 0.0, True, 0.3, 0.01, vocab)
        loss, saved = torch.empty(rows), torch.empty(rows, SAVED)
        whole, tiles = torch.empty_like(student), torch.empty_like(student)
        none = (None,) * 3
        ops.divergence_fwd(student, teacher, *none, labels, None, *options, loss, saved, loss[:0])
        ops.divergence_bwd(
            student, teacher, *none, None, labels, None, saved, upstream, *options, whole
        )  # fmt: skip
        for begin, end in pairwise(BOUNDS):
            ops.divergence_bwd(
                student[:, begin:end], teacher[:, begin:end], *none, None, labels - begin, None,
                saved, upstream, *options._replace(vocab=end - begin), tiles[:, begin:end],
            )  # fmt: skip
        torch.testing.assert_close(tiles, whole, rtol=1e-6, atol=1e-9)
        assert whole.abs().sum(1).bool().tolist() == upstream.bool().tolist()


@needs_native
def test_divergence_on_the_cpu() -> None:
    check_divergence(torch.ops.pydistill, list(KINDS))


@needs_native
def test_topk_divergence_on_the_cpu() -> None:
    topk.check_tiles(torch.ops.pydistill)


@needs_native
def test_token_logprob_on_the_cpu() -> None:
    check_token_logprob(torch.ops.pydistill)


@pytest.mark.interpreter
def test_divergence_in_triton() -> None:
    import pydistill.kernels.divergence as kernels
    from tools.ladder.interpreter import strict

    with strict():
        check_divergence(kernels, ["forward_kl", "jsd", "adaptive_kl"])


@pytest.mark.interpreter
def test_topk_divergence_in_triton() -> None:
    import pydistill.kernels.topk_divergence as kernels
    from tools.ladder.interpreter import strict

    with strict():
        topk.check_tiles(kernels)


@pytest.mark.interpreter
def test_token_logprob_in_triton() -> None:
    import pydistill.kernels.token_logprob as kernels
    from tools.ladder.interpreter import strict

    with strict():
        check_token_logprob(kernels)


def test_divergence_in_cuda() -> None:
    from tools.ladder.cuda.divergence import SOURCE, simulated
    from tools.ladder.cuda.sim import CudaSim

    with simulated(CudaSim.build(SOURCE, hooks=True)):
        check_divergence(torch.ops.pydistill_cuda, list(KINDS))


def test_topk_divergence_in_cuda() -> None:
    from tools.ladder.cuda.sim import CudaSim
    from tools.ladder.cuda.topk_divergence import SOURCE, simulated

    with simulated(CudaSim.build(SOURCE, hooks=True)):
        topk.check_tiles(torch.ops.pydistill_cuda)
