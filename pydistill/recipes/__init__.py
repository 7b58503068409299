"""Whole jobs on real models, run by the command line; nothing else imports them."""

from __future__ import annotations

import sys
from typing import Any


class UsageError(ValueError):
    """A request that cannot be met here; its one sentence is for the user."""


def bar(shown: bool, total: int, label: str, done: int = 0) -> Any:
    """A progress bar on stderr, or one that shows nothing."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=label, file=sys.stderr, disable=not shown,
        dynamic_ncols=True,
    )  # fmt: skip
