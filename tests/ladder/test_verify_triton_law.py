"""What `verify`'s Triton kernels generate, interpreted, has the target's law, and is the
reference's token by token: the joint law of the first four tokens over consecutive blocks.

Thousands of programs are interpreted at a time. 200,000 sequences a test are the full climb's, and
broken kernels fail there; those of every run, a few thousand, are held to the reference's.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.ops import test_verify_sampling as sampling
from tools.ladder.interpreter import lanes
from tools.ladder.mutation import KERNELS, Mutant, assert_all_killed, run_mutants

WORLDS = tuple(sampling.WORLDS)
FEW, TESTS = 3000, 2 * len(WORLDS)  # sequences of every run; what 1e-4 is divided by

MUTANTS = [
    Mutant("if (slot < tl.load(tested + request)) & (METHOD != TYPICAL):", "if slot < 0:"),
    Mutant("w = tl.maximum(w - q * by_q, 0.0)", "w = w + 0.0"),
    # The row before: of the draw, and of a drafted token's log p.
    Mutant(
        "row = target + request * target_request + slot * target_row",
        "row = target + request * target_request + tl.maximum(slot - 1, 0) * target_row",
        1,
    ),
    Mutant(
        "target + request * target_request + row * target_row + token",
        "target + request * target_request + tl.maximum(row - 1, 0) * target_row + token",
    ),
    # Coins of a token's absolute position, which block verification looks ahead at.
    Mutant(
        "tl.philox_impl(c0, c1, slot.to(tl.uint32), zero + stream",
        "tl.philox_impl(c0 + slot.to(tl.uint32), c1, zero, zero + stream",
    ),
]


def counts_of(world: str, method: str, sequences: int) -> torch.Tensor:
    import pydistill.kernels.verify_rows as rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PER_THREAD", 1)  # blocks of 32 columns, of which three hold tokens
        with lanes():
            return sampling.generate(world, method, "triton", sequences)


def check_law(_kernels: ModuleType) -> None:
    counts = counts_of("plain", "block", sampling.N)
    assert sampling.chance(counts, sampling.law("plain")) > 1e-4 / TESTS


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("world", "sequences"),
    [
        ("plain", FEW),
        *(pytest.param(world, sampling.N, marks=pytest.mark.ladder_full) for world in WORLDS),
    ],
)
@pytest.mark.parametrize("method", ["token", "block"])
@pytest.mark.timeout(1800)
def test_joint_law(method: str, world: str, sequences: int) -> None:
    counts = counts_of(world, method, sequences)
    assert sampling.chance(counts, sampling.law(world)) > 1e-4 / TESTS
    assert torch.equal(counts, sampling.generate(world, method, "reference", sequences))


@pytest.mark.ladder_full
@pytest.mark.timeout(7200)
def test_mutants_have_another_law() -> None:
    name = "pydistill.kernels.verify"
    outcomes = run_mutants(
        KERNELS / "verify.py", MUTANTS, check_law, module_name=name, timeout=1800.0
    )
    assert_all_killed(outcomes)
