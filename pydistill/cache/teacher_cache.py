"""Reads a teacher cache: any range or any choice of its tokens, straight into `topk_divergence`.

The files are mapped, not loaded, so opening costs nothing and many processes share one copy in the
page cache. A block's checksum is compared once, when one of its tokens is first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pydistill.cache import manifest as manifests
from pydistill.cache.manifest import CacheError, Manifest, tokenizer_hash
from pydistill.cache.shard import BEGINS, Shard, file_path
from pydistill.cache.writer import count_shards
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.ops.cache_decode import cache_decode


class TeacherCache:
    """An opened cache of `len(cache)` tokens.

    cache = TeacherCache.open(folder, tokenizer=tokenizer, vocab_size=logits.shape[-1])
    begin, end = cache.documents[7:9].tolist()
    logits = student(cache.input_ids(begin, end)[None]).logits[0]
    loss = pydistill.topk_divergence(logits, cache[begin:end])
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards
        self._length = sum(shard.rows for shard in shards)

    @staticmethod
    def open(
        folder: str | os.PathLike[str],
        *,
        tokenizer: Any,
        vocab_size: int | None = None,
        partial: bool = False,
    ) -> TeacherCache:
        """Opens the cache in `folder`.

        Args:
            tokenizer: the student's, which must give every id the meaning it has in the cache; a
                tokenizer of transformers, a dict from token to id, or a hash. None asks nothing:
                for whoever looks at a cache and trains nobody from it.
            vocab_size: the width of the student's logits, which must be the cache's.
            partial: also opens a cache that is not finished, with the tokens committed so far.

        Raises:
            CacheError: there is no cache, it is unfinished, damaged, or not the student's.
        """
        path = Path(folder)
        manifest = manifests.read(path)
        if manifest.tokens is None:
            shards = _unfinished(path, manifest)
            count = sum(shard.rows for shard in shards)
            if not partial:
                raise CacheError(
                    f"the cache {path} is unfinished, with {count} tokens; resume its writing, or"
                    " pass partial=True to read those."
                )
        else:
            size, total = manifest.shard_rows, manifest.tokens
            shards = [
                Shard(path, number, manifest, min(size, total - number * size))
                for number in range(-(-total // size))
            ]
            if count_shards(path) > len(shards):
                raise CacheError(
                    f"{path} has files of shard {count_shards(path) - 1}, but the manifest's"
                    f" {total} tokens end in shard {len(shards) - 1}."
                )
        cache = TeacherCache(path, manifest, shards)
        cache.check(tokenizer=tokenizer, vocab_size=vocab_size)
        return cache

    def check(self, *, tokenizer: Any = None, vocab_size: int | None = None) -> None:
        """CacheError unless the cache fits a student's tokenizer and vocabulary; see `open`."""
        ours = self.manifest
        if tokenizer is not None and (theirs := tokenizer_hash(tokenizer)) != ours.tokenizer:
            name = getattr(tokenizer, "name_or_path", None)
            raise CacheError(
                f"the cache {self.folder} has the tokenizer of {ours.model} ({ours.tokenizer}), the"
                f" student {name or 'another'} ({theirs}): ids mean different tokens. Use a student"
                " with the teacher's tokenizer, or record the cache with the student's."
            )
        if vocab_size is not None and vocab_size != ours.vocab_size:
            raise CacheError(
                f"the cache {self.folder} is over the {ours.vocab_size} tokens of {ours.model}, the"
                f" student's logits over {vocab_size}; they must share the vocabulary."
            )

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.folder)!r}, {len(self)} tokens, K = {self.manifest.k})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process (a DataLoader's worker) opens the files itself."""
        return _reopen, (self.folder,)

    def __getitem__(self, tokens: slice) -> TopkTeacher:
        """The rows of a range, as `[n, K]`."""
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            raise TypeError(f"a cache is read by ranges, not {tokens!r}; pass cache[begin:end].")
        begin, end, _ = tokens.indices(len(self))
        parts = []
        for shard, first, last in self._ranges(begin, max(begin, end)):
            shard.check("rows", shard.blocks_of(first, last))
            parts.append(self._decode(shard.packed[first:last]))
        return _joined(parts or [self._nothing()])

    def rows(self, index: Tensor) -> TopkTeacher:
        """The rows of int64 `index [...]`, in its order, as `[..., K]`.

        Raises:
            CacheError: a block that holds one of them is damaged; the message names it.
            IndexError: an index is outside the cache.
        """
        if index.dtype != torch.int64:
            raise TypeError(f"index is {index.dtype}; pass int64 (index.long()).")
        flat = index.reshape(-1).cpu().numpy()
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            bad = int(flat[(flat < 0) | (flat >= len(self))][0])
            raise IndexError(f"token {bad} is outside the cache's {len(self)} tokens.")
        number, row = np.divmod(flat, self.manifest.shard_rows)
        parts, places = [self._nothing()], [np.empty(0, np.int64)]
        for chosen in np.unique(number).tolist():
            shard, place = self._shards[chosen], np.flatnonzero(number == chosen)
            rows = row[place]
            blocks = np.unique(np.searchsorted(shard.ends, rows, side="right"))
            shard.check("rows", blocks.tolist())
            parts.append(self._decode(shard.packed, torch.from_numpy(rows)))
            places.append(place)
        back = torch.from_numpy(np.argsort(np.concatenate(places), kind="stable"))
        together = _joined(parts)
        return together._replace(
            topk_logprobs=together.topk_logprobs[back],
            topk_ids=together.topk_ids[back],
            tail_logprob=together.tail_logprob[back],
        ).reshape(*index.shape)

    def input_ids(self, begin: int, end: int) -> Tensor:
        """int64 `[end - begin]`: the tokens at these positions. Row i of the cache is the teacher's
        distribution of what follows token i."""
        return torch.from_numpy((self._tokens(begin, end) & ~BEGINS).astype(np.int64))

    @cached_property
    def documents(self) -> Tensor:
        """int64 `[D + 1]`: document i is the tokens `documents[i]` up to `documents[i + 1]`."""
        begins = np.flatnonzero(self._tokens(0, len(self)) & BEGINS)
        return torch.from_numpy(np.append(begins, len(self)).astype(np.int64))

    def verify(self) -> None:
        """Reads everything and compares every checksum; CacheError for the first damaged place."""
        for shard in self._shards:
            shard.verify()

    def stored_kl(self) -> tuple[float, float]:
        """Mean and maximum over tokens of KL(stored || given), nats, as found when written."""
        if not len(self):
            return 0.0, 0.0
        total = sum(float((s.index["kl_mean"] * s.index["rows"].astype(float)).sum())
                    for s in self._shards)  # fmt: skip
        return total / len(self), max(float(s.index["kl_max"].max()) for s in self._shards)

    def disk_bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def _decode(self, packed: Tensor, rows: Tensor | None = None) -> TopkTeacher:
        m = self.manifest
        return cache_decode(
            packed, m.vocab_size, m.k, rows=rows, codes=m.codes, temperature=m.temperature
        )

    def _nothing(self) -> TopkTeacher:
        return self._decode(torch.zeros((0, self.manifest.layout.stride), dtype=torch.uint8))

    def _tokens(self, begin: int, end: int) -> npt.NDArray[np.uint32]:
        if not 0 <= begin <= end <= len(self):
            raise IndexError(f"[{begin}, {end}) is outside the cache's {len(self)} tokens.")
        parts = [np.zeros(0, np.uint32)]
        for shard, first, last in self._ranges(begin, end):
            shard.check("tokens", shard.blocks_of(first, last))
            parts.append(shard.tokens[first:last])
        return np.concatenate(parts)

    def _ranges(self, begin: int, end: int) -> Iterator[tuple[Shard, int, int]]:
        """The shards that hold [begin, end), each with its part of it."""
        size = self.manifest.shard_rows
        while begin < end:
            number, first = divmod(begin, size)
            count = min(end - begin, size - first)
            yield self._shards[number], first, first + count
            begin += count


def _joined(parts: list[TopkTeacher]) -> TopkTeacher:
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(
        topk_logprobs=torch.cat([part.topk_logprobs for part in parts]),
        topk_ids=torch.cat([part.topk_ids for part in parts]),
        tail_logprob=torch.cat([part.tail_logprob for part in parts]),
    )


def _unfinished(folder: Path, manifest: Manifest) -> list[Shard]:
    """The shards of an unfinished cache. Of the last one, files may not be there yet."""
    shards = []
    count = count_shards(folder)
    for number in range(count):
        last = number == count - 1
        try:
            shards.append(Shard(folder, number, manifest, None if last else manifest.shard_rows))
        except CacheError:
            if last and not _has_records(folder, number):
                break
            raise
    return shards


def _has_records(folder: Path, number: int) -> bool:
    path = file_path(folder, number, "index")
    return path.exists() and path.stat().st_size > 0


def _reopen(folder: Path) -> TeacherCache:
    return TeacherCache.open(folder, tokenizer=None, partial=True)
