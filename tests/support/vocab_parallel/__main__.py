"""One process: every check in turn, and what failed to `<folder>/rank<rank>.json`."""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pydistill.ops import _linear_head as linear
from vocab_parallel import agreement, heads, rows  # noqa: F401  they register their checks
from vocab_parallel.ranks import CHECKS, Ranks


def main(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    linear.BLOCK_ROWS, linear.TILE_ROWS, linear.TILE_COLUMNS = 4, 5, 64
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ranks, found = Ranks(rank, world, dist.group.WORLD), {}
    for name, run in CHECKS.items():
        torch.manual_seed(0)
        try:
            found[name] = ""
            run(ranks)
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
        Path(directory, f"rank{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
