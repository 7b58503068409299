"""What `verify`'s Triton kernels generate, interpreted, has the target's law, and is the
reference's token by token: the joint law of the first four tokens over consecutive blocks.

The interpreter runs a program at a time, so these are few sequences; test_verify_sampling.py of
tests/ops has the law of many of the reference's and the CPU kernel's, by the same coins.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_verify_sampling as sampling

pytestmark = [pytest.mark.interpreter, pytest.mark.ladder_full, pytest.mark.timeout(1800)]
N, TESTS = 500, 2  # sequences; what 1e-4 is divided by


@pytest.mark.parametrize("method", ["token", "block"])
def test_joint_law(method: str) -> None:
    counts = sampling.generate("plain", method, "triton", N)
    assert sampling.chance(counts, sampling.law("plain")) > 1e-4 / TESTS
    assert torch.equal(counts, sampling.generate("plain", method, "reference", N))
