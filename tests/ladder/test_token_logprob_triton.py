"""`token_logprob`'s Triton kernels in the strict interpreter: meaning, memory, bytes.

The case table runs through the public function in blocks so small that its short rows have several.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.reference import token_logprob as reference
from pydistill.testing.case import Case, check
from tools.ladder.cases import ladder_cases
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutants import token_logprob_triton as mutants

pytestmark = pytest.mark.interpreter


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The module of the launchers, with blocks of 256 fp32 logits."""
    import pydistill.kernels.token_logprob as module

    monkeypatch.setattr(module, "THREADS", 64)
    return module


@pytest.mark.parametrize("case", ladder_cases("token_logprob"))
def test_table(case: Case, kernels) -> None:
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.ladder
@pytest.mark.parametrize("what", ["values", "flags", "tiles"])
def test_hard_rows(what: str, kernels) -> None:
    with strict():
        getattr(mutants, f"check_{what}")(kernels)


@pytest.mark.ladder
def test_bytes(kernels) -> None:
    mutants.check_bytes(kernels)


@pytest.mark.ladder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_floor(dtype: torch.dtype) -> None:
    """All bytes, the small tensors too, of a row of 32000 logits and one of 151936."""
    import pydistill.kernels.token_logprob as module

    for vocab in (32000, 151936):
        z, ids, up = torch.randn(1, vocab).to(dtype), torch.tensor([7]), torch.ones(1)
        logprob, entropy, saved = torch.empty(1), torch.empty(1), torch.empty(1, reference.SAVED)
        with strict() as forward:
            module.token_logprob_fwd(z, ids, None, None, 1.0, logprob, entropy, saved)
        with strict() as backward:
            module.token_logprob_bwd(z, ids, None, saved, up, up, 1.0, torch.empty_like(z))
        assert forward.total_requested() <= z.nbytes + 64
        assert backward.total_requested() <= 2 * z.nbytes + 64


@pytest.mark.ladder
def test_nothing_outside_the_tensors_is_touched(kernels) -> None:
    """Strided rows and gradients, in guard bands; then in place."""
    guards = Guards()
    wide = torch.randn(mutants.ROWS, 2, mutants.VOCAB + 3)
    wide[:, 1, : mutants.VOCAB] = mutants.rows()
    z = guards(wide[:, 1, : mutants.VOCAB])
    ids, counted = guards(mutants.IDS.clone()), guards(mutants.COUNTED.clone())
    ups = (guards(mutants.UP.clone()), guards(mutants.UP_ENTROPY.clone()))
    logprob, entropy = guards(torch.empty(mutants.ROWS)), guards(torch.empty(mutants.ROWS))
    saved = guards(torch.empty(mutants.ROWS, reference.SAVED))
    grad = guards(torch.empty(mutants.ROWS, mutants.VOCAB + 5)[:, : mutants.VOCAB])
    with strict():
        kernels.token_logprob_fwd(z, ids, counted, None, 1.0, logprob, entropy, saved)
        kernels.token_logprob_bwd(z, ids, None, saved, *ups, 1.0, grad)
    want = mutants.wanted(z, ids, counted, None, 1.0, ups)
    for got, right in zip((logprob, entropy), want[:2], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=1e-37, equal_nan=True)
    with strict():
        kernels.token_logprob_bwd(z, ids, None, saved, *ups, 1.0, z)
    guards.check()
    assert torch.equal(z, grad) and not grad.isnan().any()


@pytest.mark.ladder
def test_offsets_beyond_31_bits(kernels, tmp_path: Path) -> None:
    """Rows 2^30 elements apart, in a file that is mostly a hole; not metered."""
    stride = (1 << 30) + 16
    file = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(2 * stride + 64,))
    z = torch.from_numpy(file).as_strided((3, 48), (stride, 1))
    z.copy_(torch.randn(3, 48))
    ids, ups = torch.tensor([0, 47, 5]), (torch.ones(3), torch.ones(3))
    want = mutants.wanted(z, ids, None, None, 1.0, ups)
    logprob, entropy, saved = torch.empty(3), torch.empty(3), torch.empty(3, reference.SAVED)
    kernels.token_logprob_fwd(z, ids, None, None, 1.0, logprob, entropy, saved)
    kernels.token_logprob_bwd(z, ids, None, saved, *ups, 1.0, z)
    torch.testing.assert_close(logprob.double(), want[0], rtol=3e-6, atol=0)
    torch.testing.assert_close(z.double(), want[2], rtol=1e-3, atol=1e-6)


@pytest.mark.ladder
def test_launchers_have_the_schemas_arguments_and_the_references_numbers(kernels) -> None:
    for name in ("token_logprob_fwd", "token_logprob_bwd"):
        schema = getattr(torch.ops.pydistill_triton, name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(getattr(kernels, name)).parameters) == names
    for name in ("SAVED", "ID_OUT_OF_RANGE"):
        assert getattr(kernels, name).value == getattr(reference, name)
