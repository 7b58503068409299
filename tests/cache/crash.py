"""Kills a cache writer at every one of its system calls, resumes it, and compares the result with
an undisturbed one. A script: each run forks from one process that has imported everything.

    python tests/cache/crash.py FOLDER

Ways to die at the n-th call: `before` it; `torn`, halfway through a write; `lost`, before it and
with everything that was never synced gone, as when the power fails.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydistill.cache import CacheError, CacheWriter, Manifest, TeacherCache
from pydistill.cache import manifest as manifests

MANIFEST = Manifest("model", "sha256:0", vocab_size=50, k=4, shard_rows=20)
LENGTHS = [7, 11, 1, 9, 13]
TOTAL = sum(LENGTHS)
CALLS = ("write", "fsync", "replace", "ftruncate", "open", "mkdir")
WAYS = ("before", "torn", "lost")


def data() -> tuple[Any, Any, Any, Any]:
    """Tokens, ids, log-probabilities and tails of TOTAL rows."""
    random = np.random.default_rng(0)
    log_p = torch.log_softmax(torch.from_numpy(3 * random.standard_normal((TOTAL, 50))), -1)
    values, ids = log_p.topk(4)
    tail = torch.logsumexp(log_p.scatter(1, ids, -torch.inf), 1)
    return random.integers(0, 50, TOTAL), ids.numpy(), values.numpy(), tail.numpy()


ROWS = data()


class Killer:
    """Stands in for the functions of `os` in CALLS and dies at call `at`."""

    def __init__(self, at: int, way: str) -> None:
        self.at, self.way, self.count = at, way, 0
        self.synced: dict[str, int] = {}
        self.seen: set[str] = set()
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.standing_in_for(name))

    def standing_in_for(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                if self.way == "torn" and name == "write":
                    self.real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.way == "lost":
                    self.lose()
                os.kill(os.getpid(), signal.SIGKILL)
            result = self.real[name](*args, **kwargs)
            if name in ("write", "fsync", "ftruncate"):
                path = os.readlink(f"/proc/self/fd/{args[0]}")
                self.seen.add(path)
                if name == "fsync" and os.path.isfile(path):
                    self.synced[path] = os.path.getsize(path)
            if name == "replace":
                self.synced[str(args[1])] = self.synced.pop(str(args[0]), 0)
            return result

        return call

    def lose(self) -> None:
        for path in self.seen:
            if os.path.isfile(path):
                size = min(os.path.getsize(path), self.synced.get(path, 0))
                os.truncate(path, size)


def write(folder: Path, report: Callable[[int], None]) -> None:
    """Writes what is not there yet, in documents, and finishes."""
    with CacheWriter(folder, MANIFEST, block_rows=4, commit_rows=10) as writer:
        report(writer.written)
        end = 0
        for i, length in enumerate(LENGTHS):
            begin, end = end, end + length
            some = slice(max(begin, writer.appended), end)
            if some.start < end:
                writer.append(*(x[some] for x in ROWS), continues=some.start > begin)
                report(writer.written)
            if i == 1:
                report(writer.flush())
    report(TOTAL)


def in_child(job: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Runs `job` in a fork; its exit status, and the last number it reported."""
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        real_write = os.write  # not a stand-in
        try:

            def report(n: int) -> None:
                real_write(write_end, n.to_bytes(4, "little"))

            job(report)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read, "rb") as pipe:
        reports = pipe.read()
    status = os.waitpid(child, 0)[1]
    return status, int.from_bytes(reports[-4:], "little")


def resumed(folder: Path, reported: int, whole: Path) -> None:
    """Whatever was reported is there; after resuming, the files are those of `whole`."""
    if (folder / manifests.NAME).exists():
        assert len(TeacherCache.open(folder, tokenizer=None, partial=True)) >= reported
        TeacherCache.open(folder, tokenizer=None, partial=True).verify()
        complete = manifests.read(folder).tokens is not None
    else:
        assert reported == 0
        complete = False
    if complete:
        assert reported >= TOTAL - 13  # killed after the last rename, or before its report
        try:
            CacheWriter(folder, MANIFEST)
        except CacheError as error:
            assert "complete" in str(error)
    else:
        writer = CacheWriter(folder, MANIFEST)
        assert writer.written >= reported
        writer.close()
        write(folder, lambda n: None)
    for path in whole.iterdir():
        if path.suffix in (".rows", ".tokens"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    cache = TeacherCache.open(folder, tokenizer="sha256:0", vocab_size=50)
    cache.verify()
    assert cache.documents.tolist() == np.cumsum([0, *LENGTHS]).tolist()
    assert cache.input_ids(0, TOTAL).tolist() == ROWS[0].tolist()


def main(root: Path) -> int:
    torch.set_num_threads(1)
    whole = root / "whole"
    write(whole, lambda n: None)
    runs = 0
    for way in WAYS:
        at = 1
        while True:
            folder = root / f"{way}{at}"

            def killed(
                report: Callable[[int], None], at: int = at, way: str = way, folder: Path = folder
            ) -> None:
                Killer(at, way)
                write(folder, report)

            status, reported = in_child(killed)
            if status == 0:
                break  # the writer makes fewer calls
            assert os.WTERMSIG(status) == signal.SIGKILL, f"{way} {at}: status {status}"
            folder.mkdir(exist_ok=True)
            status, _ = in_child(lambda _, f=folder, n=reported: resumed(f, n, whole))
            assert status == 0, f"{way} at call {at}, {reported} tokens reported"
            shutil.rmtree(folder)
            runs, at = runs + 1, at + 1
    print(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
