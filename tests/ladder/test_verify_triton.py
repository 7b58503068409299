"""`verify`'s Triton kernels in the strict interpreter: meaning, memory, bytes, coins.

The case table runs through the public function in blocks so small that its short rows have several.
What only trees ask for has no Triton kernel, and is refused.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import triton
import triton.language as tl

from pydistill import _registry, verify, verify_with_gradient
from pydistill.kernels.verify import coins
from pydistill.reference import verify as reference
from pydistill.testing import Case, check
from tools.ladder.cases import covering, emulated
from tools.ladder.interpreter import lanes, strict
from tools.ladder.mutants import verify_triton as mutants

pytestmark = pytest.mark.interpreter
CHECKS = ("methods", "point_masses", "lenient", "bias", "support", "rounding", "draws")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The module of the launcher, with blocks of 64 columns."""
    import pydistill.kernels.verify as module
    import pydistill.kernels.verify_rows as rows

    for name in ("COLUMNS", "PER_THREAD"):  # so that they are restored
        monkeypatch.setattr(rows, name, getattr(rows, name))
    mutants.small_blocks(rows)
    return module


def chains(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.kind in reference.CHAINS]


@pytest.mark.ladder
@pytest.mark.parametrize(
    "case", [case for case in chains(covering("verify")) if "-each-" not in case.id], ids=str
)
def test_table(case: Case, kernels) -> None:
    """Values, of many programs at once, but where the search of each row takes its own way; the
    full climb has those too, and watches the memory of all."""
    with lanes():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.ladder_full
@pytest.mark.parametrize("case", chains(emulated("verify")), ids=str)
def test_every_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 512 columns: shorter ones cost the full climb its time."""
    import pydistill.kernels.verify_rows as rows

    monkeypatch.setattr(rows, "COLUMNS", 512)
    with strict():
        report = check(case, "triton")
    assert report.ok, report.message


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("bounds", marks=pytest.mark.ladder),
        *(pytest.param(what, marks=pytest.mark.ladder_full) for what in CHECKS),
    ],
)
def test_hard_requests(what: str, kernels) -> None:
    with strict():
        getattr(mutants, f"check_{what}")(kernels)


@pytest.mark.ladder
def test_bytes(kernels) -> None:
    mutants.check_bytes(kernels)


@triton.jit
def _coins_of(seed, position, out, stream, SLOTS: tl.constexpr):
    request = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    found = coins(tl.load(seed + request), tl.load(position + request), slot, stream)
    tl.store(out + request * SLOTS + slot, found)


@pytest.mark.ladder
def test_coins_are_the_references_bit_by_bit() -> None:
    edges = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 12345678901234])
    g = torch.Generator().manual_seed(0)
    seed = torch.cat([edges, torch.randint(-(2**62), 2**62, (23,), generator=g)])
    position = torch.cat([edges.clamp(min=0).flip(0), torch.randint(2**62, (23,), generator=g)])
    for stream in (reference.ACCEPT, reference.RESAMPLE, reference.DRAFT):
        found = torch.empty(len(seed), 16, dtype=torch.float64)
        with strict():
            _coins_of[(len(seed),)](seed, position, found, stream, SLOTS=16)
        slot = torch.arange(16)
        want = reference.coins(seed[:, None], position[:, None], slot, stream)
        assert torch.equal(found.view(torch.int64), want.view(torch.int64))
    assert float(reference.coins(edges[:1], edges[:1], edges[:1], 0)) == 0.39904647231489565


@pytest.mark.ladder
@pytest.mark.parametrize("method", reference.TREES)
def test_trees_are_refused_by_name(method: str) -> None:
    target, ids = torch.randn(1, 3, 9), torch.zeros(1, 2, dtype=torch.int64)
    call = {"method": method, "tree": torch.tensor([-1, 0]), "seed": 0, "position": 0}
    with pytest.raises(ValueError, match=f"verify has no triton kernel for '{method}'; pass impl"):
        verify(target, None, ids, impl="triton", **call)


@pytest.mark.ladder
def test_the_gradient_is_refused_by_name() -> None:
    rows = torch.randn(1, 3, 9)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no triton kernel for 'verify_with_gradient'; pass impl"):
        verify_with_gradient(rows, rows[:, 1:], ids, impl="triton", seed=0, position=0)


@pytest.mark.ladder
def test_auto_resolves_trees_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, once with a warning; chains take the kernels."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_registry, "_warned", set())
    call = ("verify", "auto", "cuda", torch.float32)
    monkeypatch.setattr(_registry, "has_kernel", lambda name, backend: backend == "triton")
    with pytest.warns(UserWarning, match="slow reference: triton: verify has no triton kernel"):
        assert _registry.resolve(*call, "tree") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _registry.resolve(*call, "tree") == "reference"
        assert _registry.resolve(*call, "block") == "triton"


@pytest.mark.ladder
def test_the_launcher_has_the_schemas_arguments_and_the_references_numbers(kernels) -> None:
    schema = torch.ops.pydistill_triton.verify_fwd.default._schema
    names = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(kernels.verify_fwd).parameters) == names
    numbers = ("BAD_ID", "BAD_TARGET", "BAD_DRAFT", "IMPOSSIBLE", "ACCEPT", "RESAMPLE", "WARPERS")
    for name in numbers:
        assert getattr(kernels, name).value == getattr(reference, name)
    for name in reference.CHAINS:
        own = "BLOCK_METHOD" if name == "block" else name.upper()
        assert getattr(kernels, own).value == reference.METHODS.index(name)
    for name in reference.LENIENCES:
        own = "STRICT" if name == "none" else name.upper()
        assert getattr(kernels, own).value == reference.LENIENCES.index(name)
