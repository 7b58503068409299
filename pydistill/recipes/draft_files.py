"""What a run of `draft` keeps until its output is there: one folder for one run at a time, files
that are replaced at once, and the options that it was begun with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pydistill.recipes import UsageError

BEGUN = "begun.pt"  # the quality of the untrained draft: from here on there is what to resume


@contextlib.contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """`OUTPUT.unfinished`, for one run at a time; deleted when the output is there."""
    folder = output.with_name(output.name + ".unfinished")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run writes to --output {output}; wait for it, or name a new folder."
            ) from error
        try:
            yield folder
        except BaseException:
            if not (folder / BEGUN).exists():  # nothing to go on from
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def store(path: Path, options: Any, **values: Any) -> None:
    """Replaces the file at once: a kill leaves the old one or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save({"options": named(options), **values}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the second is torch's for a full disk
        raise UsageError(
            f"the checkpoint {path} cannot be written ({error}); free some space there and give"
            " the same command again."
        ) from error


def write(path: Path, text: str) -> None:
    """Replaces a file of text at once, in a folder that may be new."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UsageError(
            f"{path} cannot be written ({error.strerror or error}); free some space there, or name"
            " another folder, and give the command again."
        ) from error


def load(path: Path, options: Any) -> dict[str, Any] | None:
    """What `store` kept, None if it never did."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch names no class for a damaged file
        raise UsageError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); delete"
            f" {path.parent} to begin anew."
        ) from error
    ours, theirs = named(options), found.pop("options")
    if changed := [name for name in ours if ours[name] != theirs.get(name)]:
        kept = ", ".join(f"{name}={theirs.get(name)!r}" for name in changed)
        raise UsageError(
            f"{path.parent} was begun with {kept}; go on with the same options, name a new"
            " --output, or delete it."
        )
    return found


def named(options: Any) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
