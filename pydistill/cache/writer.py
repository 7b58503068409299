"""Writes a teacher cache, so that what was reported as written survives any end of the process.

A commit has four steps, in this order: the rows and tokens of its blocks are appended; both files
are synced; the blocks' records are appended to the index; the index is synced. Only then does
`written` grow. A process killed between any two of them leaves rows that no record speaks of, and
the next writer cuts them off. A kill between two blocks' records keeps the first, which is whole.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pydistill.cache import manifest as manifests
from pydistill.cache.encoding import encode
from pydistill.cache.manifest import CacheError, Manifest
from pydistill.cache.shard import (
    BEGINS,
    KINDS,
    RECORD,
    TOKEN_BYTES,
    Shard,
    file_path,
    record,
)

Array = npt.NDArray[Any]


class CacheWriter:
    """Begins the cache in `folder`, or resumes it where an unfinished one with the same manifest is
    there.

        with CacheWriter(folder, manifest) as writer:
            for document in documents_from(writer.written):
                writer.append(tokens, topk_ids, topk_logprobs, tail_logprob)

    Leaving the block finishes the cache; leaving it by an exception (Ctrl-C included) keeps what
    was appended and leaves the cache to be resumed. `written` counts the tokens that are durable
    and only grows; `appended` counts those given. Appended tokens are committed `commit_rows` at a
    time, and by `flush`; a damaged bit is later found and named within `block_rows` tokens.

    Raises:
        CacheError: the folder holds a finished cache, another manifest's, a damaged one, or
            something else; or another process is writing it.
        OSError: it cannot be written; what was reported as written is there to be resumed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        *,
        block_rows: int = 256,
        commit_rows: int = 4096,
    ) -> None:
        for name, value in (("block_rows", block_rows), ("commit_rows", commit_rows)):
            if not 1 <= value < 2**31:
                raise ValueError(f"{name}={value} is outside 1..2^31-1.")
        self.folder = Path(folder)
        self.manifest = replace(manifest, tokens=None)
        self.written = 0
        self._block_rows, self._commit_rows = block_rows, commit_rows
        self._layout = manifest.layout
        self._pending: list[tuple[Array, Array, Array]] = []  # packed, tokens, kl
        self._files: dict[str, int] = {}
        self._lock: int | None = None
        self._broken = False
        self._shard, self._shard_rows, self._blocks = 0, 0, 0
        try:
            self._begin()
        except BaseException:
            self._release()
            raise

    @property
    def appended(self) -> int:
        """Tokens given so far, those of earlier runs included."""
        return self.written + sum(len(packed) for packed, _, _ in self._pending)

    def append(
        self,
        tokens: Tensor | Array,
        topk_ids: Tensor | Array,
        topk_logprobs: Tensor | Array,
        tail_logprob: Tensor | Array,
        *,
        continues: bool = False,
    ) -> None:
        """Appends a document, or with `continues=True` the rest of one that was begun.

        Args:
            tokens: integers `[n]`, the document. Row i is the teacher's distribution of what
                follows token i.
            topk_ids: integers `[n, k]` with k at most the cache's, in any order, -1 in empty slots.
            topk_logprobs: floating-point `[n, k]`, under the full softmax at the cache's
                temperature.
            tail_logprob: floating-point `[n]`, log of the mass of all other tokens; -inf for none.

        Raises:
            ValueError, TypeError: nothing of the document is then appended.
        """
        self._check_usable()
        ids, document = _integers("topk_ids", topk_ids), _integers("tokens", tokens)
        log_p = _floats("topk_logprobs", topk_logprobs)
        tail = _floats("tail_logprob", tail_logprob)
        n, k, vocab = len(document), self.manifest.k, self.manifest.vocab_size
        if document.ndim != 1 or tail.shape != (n,):
            raise ValueError(
                f"tokens has shape {document.shape} and tail_logprob {tail.shape}; pass [n] both."
            )
        if ids.ndim != 2 or ids.shape != log_p.shape or len(ids) != n or ids.shape[1] > k:
            raise ValueError(
                f"topk_ids has shape {ids.shape} and topk_logprobs {log_p.shape}; pass [{n}, k]"
                f" both, with k at most the cache's {k}."
            )
        if n == 0:
            return
        if document.min() < 0 or document.max() >= vocab:
            bad = int(document[(document < 0) | (document >= vocab)][0])
            raise ValueError(f"tokens holds {bad}, outside the cache's vocabulary of {vocab}.")
        if short := k - ids.shape[1]:
            ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1)
            log_p = np.pad(log_p, ((0, 0), (0, short)), constant_values=-np.inf)
        packed, kl = encode(ids, log_p, tail, vocab, self._layout)
        marked = document.astype("<u4")
        if not (continues and self.appended):
            marked[0] |= BEGINS
        self._pending.append((packed, marked, kl))
        if self.appended - self.written >= self._commit_rows:
            self.flush()

    def flush(self) -> int:
        """Makes everything appended durable; returns how many tokens then are."""
        self._check_usable()
        if not self._pending:
            return self.written
        packed, tokens, kl = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        begin = 0
        self._broken = True  # until the files are again what `written` says
        try:
            while begin < len(packed):
                count = min(len(packed) - begin, self.manifest.shard_rows - self._shard_rows)
                if count == 0:
                    self._open_shard(self._shard + 1)
                    continue
                if not self._files:
                    self._open_shard(self._shard)
                some = slice(begin, begin + count)
                self._commit(packed[some], tokens[some], kl[some])
                begin += count
        except OSError as error:
            self._cut()
            self._release()
            raise OSError(
                error.errno,
                f"the teacher cache {self.folder} cannot be written ({error.strerror or error});"
                f" its first {self.written} tokens are safe: make room, then open it again to"
                " resume",
            ) from error
        self._broken = False
        self._pending.clear()
        return self.written

    def finish(self) -> None:
        """Commits the rest and marks the cache as complete: to be read, and not resumed."""
        self.flush()
        manifests.write(self.folder, replace(self.manifest, tokens=self.written))
        self._release()

    def close(self) -> None:
        """Commits the rest and leaves the cache unfinished, to be resumed."""
        if self._lock is not None:
            try:
                if not self._broken:
                    self.flush()
            finally:
                self._release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._lock is not None:
            self.finish()
        else:
            self.close()

    def _check_usable(self) -> None:
        if self._broken or self._lock is None:
            raise CacheError(f"this writer of {self.folder} is closed; open another to resume.")

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"another process is writing the cache {self.folder}.") from error
        names = {path.name for path in self.folder.iterdir()}
        if manifests.NAME not in names:
            if other := sorted(names - {manifests.PART}):
                raise CacheError(
                    f"{self.folder} is no teacher cache and not empty (it has {other[0]}); name a"
                    " new folder."
                )
            manifests.write(self.folder, self.manifest)
            manifests.sync_folder(self.folder.parent)
            return
        found = manifests.read(self.folder)
        if found.tokens is not None:
            raise CacheError(
                f"the cache {self.folder} is complete, with {found.tokens} tokens; name a new"
                " folder."
            )
        if differs := manifests.difference(found, self.manifest):
            raise CacheError(
                f"the cache {self.folder} was begun with another {differs}; resume it as it was"
                " begun, or name a new folder."
            )
        self._resume()

    def _resume(self) -> None:
        """Finds the end of what was committed, and cuts off what was not."""
        last = count_shards(self.folder) - 1
        for number in range(last):
            full = Shard(self.folder, number, self.manifest, self.manifest.shard_rows)
            self.written += int(full.ends[-1])
        if last >= 0:  # of which files may not be there yet
            self._open_shard(last)
            records = Shard(self.folder, last, self.manifest, None).index
            self._shard_rows, self._blocks = int(records["rows"].sum()), len(records)
            self.written += self._shard_rows
            self._cut()

    def _open_shard(self, number: int) -> None:
        self._close_files()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for kind in KINDS:
            self._files[kind] = os.open(file_path(self.folder, number, kind), flags, 0o666)
        manifests.sync_folder(self.folder)
        self._shard, self._shard_rows, self._blocks = number, 0, 0

    def _commit(self, packed: Array, tokens: Array, kl: Array) -> None:
        """Blocks of one shard, through the four steps."""
        records: list[bytes] = []
        for begin in range(0, len(packed), self._block_rows):
            some = slice(begin, begin + self._block_rows)
            parts = packed[some].tobytes(), tokens[some].tobytes()
            records.append(record(self._shard, self._blocks + len(records), *parts, kl[some]))
        manifests.write_all(self._files["rows"], packed.tobytes())
        manifests.write_all(self._files["tokens"], tokens.tobytes())
        os.fsync(self._files["rows"])
        os.fsync(self._files["tokens"])
        manifests.write_all(self._files["index"], b"".join(records))
        os.fsync(self._files["index"])
        self._blocks += len(records)
        self._shard_rows += len(packed)
        self.written += len(packed)

    def _cut(self) -> None:
        """Cuts the current shard's files to what is committed."""
        sizes = {
            "index": self._blocks * RECORD.itemsize,
            "rows": self._shard_rows * self._layout.stride,
            "tokens": self._shard_rows * TOKEN_BYTES,
        }
        for kind, size in sizes.items():
            if kind in self._files:
                os.ftruncate(self._files[kind], size)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _release(self) -> None:
        self._close_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def count_shards(folder: Path) -> int:
    """One more than the highest number of a shard of which any file is there."""
    numbers = [
        int(path.stem)
        for path in folder.iterdir()
        if path.stem.isdigit() and path.suffix[1:] in KINDS
    ]
    return max(numbers, default=-1) + 1


def _integers(name: str, x: Tensor | Array) -> Array:
    out = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if out.dtype.kind not in "iu":
        raise TypeError(f"{name} is {out.dtype}; pass integers.")
    return out.astype(np.int64)


def _floats(name: str, x: Tensor | Array) -> Array:
    if isinstance(x, Tensor):
        half = x.dtype in (torch.bfloat16, torch.float16)
        x = (x.detach().float() if half else x.detach()).cpu().numpy()
    out = np.asarray(x)
    if out.dtype.kind != "f":
        raise TypeError(f"{name} is {out.dtype}; pass floating-point log-probabilities.")
    return out
