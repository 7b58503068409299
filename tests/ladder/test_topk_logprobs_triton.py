"""`topk_logprobs`' Triton kernels in the strict interpreter: meaning, memory, bytes.

The case table runs through the public function in blocks so small that its short rows have groups,
and some of them more candidates than a program keeps.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill import topk_logprobs
from pydistill.testing.case import Case, check
from tools.ladder.cases import ladder_cases
from tools.ladder.interpreter import strict
from tools.ladder.mutants import topk_logprobs_triton as mutants

pytestmark = pytest.mark.interpreter


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The module of the launchers, with small blocks."""
    import pydistill.kernels.topk_logprobs as module

    for name in ("THREADS", "KEPT", "SLOTS"):  # so that they are restored
        monkeypatch.setattr(module, name, getattr(module, name))
    mutants.small_blocks(module)
    return module


@pytest.mark.parametrize("case", ladder_cases("topk_logprobs"))
def test_table(case: Case, kernels) -> None:
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.ladder
@pytest.mark.parametrize("what", ["values", "flags", "bounds"])
def test_hard_rows(what: str, kernels) -> None:
    with strict():
        getattr(mutants, f"check_{what}")(kernels)


@pytest.mark.ladder
def test_bytes(kernels) -> None:
    mutants.check_bytes(kernels)


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("vocab", "k", "dtype", "most"),
    [
        (32000, 64, torch.float32, 1.35),
        (32000, 64, torch.bfloat16, 1.5),
        (32000, 256, torch.bfloat16, 2.05),
        (151936, 64, torch.bfloat16, 1.25),
        (151936, 256, torch.bfloat16, 1.5),
        (262144, 1000, torch.float32, 1.5),
        (16000, 50, torch.bfloat16, 2.05),
        (151936, 3000, torch.bfloat16, 6.8),  # more candidates than fit into registers
    ],
    ids=str,
)
def test_bytes_over_their_floor(vocab: int, k: int, dtype: torch.dtype, most: float) -> None:
    """All bytes that the kernels ask for, but for sorting in torch, over one read of the row and
    the results; in blocks as on a GPU."""
    z = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
    with strict() as meter:
        found = topk_logprobs(z, k, impl="triton")
    ratio = meter.total_requested() / (z.nbytes + 12 * k + 8)
    assert most - 0.1 < ratio <= most, ratio
    mutants.compare(tuple(found), z, k, 1.0)


@pytest.mark.ladder
def test_offsets_beyond_31_bits(kernels, tmp_path: Path) -> None:
    """Rows 2^30 elements apart, in a file that is mostly a hole; not metered."""
    stride = (1 << 30) + 16
    file = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(2 * stride + 1024,))
    z = torch.from_numpy(file).as_strided((3, 1024), (stride, 1))
    z.copy_(torch.randn(3, 1024))
    for k in (7, 300):
        mutants.compare(mutants.run(kernels, z, k, 1.0), z, k, 1.0)


@pytest.mark.ladder
def test_from_hidden_states(kernels) -> None:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(5, 16, generator=g), torch.randn(700, 16, generator=g)
    found = topk_logprobs(hidden, 9, weight=weight, softcap=20.0, impl="triton")
    want = topk_logprobs(hidden, 9, weight=weight, softcap=20.0, impl="reference")
    assert torch.equal(found.ids, want.ids)
    for got, right in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.ladder
def test_the_launcher_has_the_schemas_arguments(kernels) -> None:
    schema = torch.ops.pydistill_triton.topk_logprobs_fwd.default._schema
    names = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(kernels.topk_logprobs_fwd).parameters) == names
