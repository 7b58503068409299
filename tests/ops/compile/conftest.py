"""Tests under `torch.compile`: a Dynamo of their own, and allocations that it may trace."""

from collections.abc import Iterator

import pytest
import torch

# Dynamo lists torch's functions once, at its first use. Let that be now, not within a test whose
# allocations are poisoned: it would not know torch.empty again.
torch.compile(torch.sin, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def _poison() -> None:
    """No poisoned allocations here: they would be traced into the graph."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
