"""A vocabulary sharded over the processes of a group against one process that holds all of it.

For each number of processes they start once, run every check of tests/support/vocab_parallel in the
same order, and write down what failed; each check is then a test. Shards are uneven, and with three
processes one holds a single token. Both sides of a comparison are fp32: gradients are differences
of probabilities, each rounded to 1e-7 of a log of about 10, so 1e-6 beside 1 is round-off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pydistill import _native
from vocab_parallel import agreement, heads, rows  # noqa: F401  they register their checks
from vocab_parallel.ranks import CHECKS

OP = "divergence"
pytestmark = pytest.mark.skipif(
    not _native.available(), reason="without native code one process is the less exact side"
)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each rank, what failed in each check: "" if nothing did."""
    world, directory = request.param, tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "vocab_parallel"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(directory)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    results = [Path(directory, f"rank{r}.json") for r in range(world)]
    assert all(path.exists() for path in results), "\n".join(printed)
    return [json.loads(path.read_text()) for path in results]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_sharded(failures: list[dict[str, str]], name: str) -> None:
    lost = "not run: the ranks lost each other in an earlier check"
    report = [f"rank {r}:\n{found.get(name, lost)}" for r, found in enumerate(failures)]
    assert not any(found.get(name, lost) for found in failures), "\n".join(report)
