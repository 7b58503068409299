"""A shard of a teacher cache: its three files, their checksums, and damage told from a torn end.

    00000.rows     packed rows, one after the other
    00000.tokens   uint32 a row: the token at that position, with the top bit set where a document
                   begins
    00000.index    32 bytes a block of rows, written when the block's rows are on disk

Row r of a shard is at r * stride whatever the blocks are, so random access is one multiplication;
blocks are what is checked and committed together. A record of the index is smaller than a disk's
sector and never crosses one, so a crash leaves it whole, absent or zero. That is what the end of an
unfinished cache may look like; any other record that fails its checksum is damage, and is never
passed over.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pydistill.cache.manifest import CacheError, Manifest

RECORD = np.dtype(
    [
        ("rows", "<u4"),
        ("rows_crc", "<u4"),  # of the block's bytes in .rows
        ("tokens_crc", "<u4"),  # and in .tokens
        ("kl_mean", "<f4"),  # KL(stored || given), nats
        ("kl_max", "<f4"),
        ("shard", "<u4"),
        ("block", "<u4"),
        ("crc", "<u4"),  # of the record's other bytes
    ]
)
TOKEN_BYTES = 4
BEGINS = np.uint32(1 << 31)
KINDS = ("rows", "tokens", "index")


def file_path(folder: Path, shard: int, kind: str) -> Path:
    return folder / f"{shard:05d}.{kind}"


def record(
    shard: int, block: int, rows: bytes, tokens: bytes, kl: npt.NDArray[np.float64]
) -> bytes:
    """The index record of a block, given its bytes in both files."""
    out = np.zeros(1, RECORD)
    out["rows"], out["shard"], out["block"] = len(kl), shard, block
    out["rows_crc"], out["tokens_crc"] = zlib.crc32(rows), zlib.crc32(tokens)
    out["kl_mean"], out["kl_max"] = kl.mean(), kl.max()
    out["crc"] = zlib.crc32(out.tobytes()[:-4])
    return out.tobytes()


def read_index(folder: Path, shard: int, finished: bool) -> npt.NDArray[Any]:
    """The records of a shard, checked. An unfinished cache may end in a torn record, which is left
    out."""
    path = file_path(folder, shard, "index")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"shard {shard} of {folder} is missing: no file {path.name}.") from error
    size = RECORD.itemsize
    if len(raw) % size and finished:
        raise CacheError(f"{path} is damaged: {len(raw)} bytes are not a number of whole records.")
    count = len(raw) // size
    if not finished and count and not any(raw[(count - 1) * size : count * size]):
        count -= 1
    records = np.frombuffer(raw[: count * size], RECORD)
    for block in range(count):
        found = records[block]
        crc = zlib.crc32(raw[block * size : (block + 1) * size - 4])
        if crc != found["crc"] or (found["shard"], found["block"]) != (shard, block):
            raise CacheError(
                f"{path} is damaged: the record of block {block} of shard {shard} fails its"
                " checksum."
            )
    return records


class Shard:
    """The rows of one shard, mapped into memory when they are first read.

    `rows` is how many the manifest of a finished cache gives it; None takes what the index of an
    unfinished one has.
    """

    def __init__(self, folder: Path, number: int, manifest: Manifest, rows: int | None) -> None:
        self.folder, self.number = folder, number
        self._stride, self._finished, self._known = manifest.layout.stride, rows is not None, rows
        self._checked: dict[str, set[int]] = {"rows": set(), "tokens": set()}
        for kind, size in (("rows", self._stride), ("tokens", TOKEN_BYTES)):
            path = self._path(kind)
            if not path.is_file():
                raise CacheError(f"shard {number} of {folder} is missing: no file {path.name}.")
            found, wanted = path.stat().st_size, size * self.rows
            if found < wanted or (self._finished and found > wanted):
                what = "cut short" if found < wanted else "longer than it was"
                raise CacheError(
                    f"{path} (shard {number}) is {what}: {found} bytes, not the {wanted} of"
                    f" {self.rows} tokens."
                )

    def _path(self, kind: str) -> Path:
        return file_path(self.folder, self.number, kind)

    @cached_property
    def rows(self) -> int:
        return int(self.index["rows"].sum()) if self._known is None else self._known

    @cached_property
    def index(self) -> npt.NDArray[Any]:
        records = read_index(self.folder, self.number, self._finished)
        total = int(records["rows"].sum())
        if self._known not in (None, total):
            raise CacheError(
                f"{self._path('index')} is damaged: its blocks hold {total} tokens, shard"
                f" {self.number} has {self._known}."
            )
        return records

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """The row after the last one of each block."""
        return np.cumsum(self.index["rows"], dtype=np.int64)

    @cached_property
    def packed(self) -> Tensor:
        """uint8 `[rows, stride]`, unchecked."""
        return self._map("rows", self._stride).view(self.rows, self._stride)

    @cached_property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """`[rows]`, unchecked, with the bit `BEGINS`."""
        return self._map("tokens", TOKEN_BYTES).numpy().view("<u4")

    def _map(self, kind: str, size: int) -> Tensor:
        count = self.rows * size
        if not count:
            return torch.zeros(0, dtype=torch.uint8)
        return torch.from_file(str(self._path(kind)), shared=False, size=count, dtype=torch.uint8)

    def check(self, kind: str, blocks: Iterable[int]) -> None:
        """Checks `blocks`, each once; CacheError for the first damaged."""
        done = self._checked[kind]
        for block in blocks:
            if block not in done:
                self._check_block(kind, block)
                done.add(block)

    def blocks_of(self, begin: int, end: int) -> range:
        """The blocks that hold rows [begin, end), which are not none."""
        return range(bisect_right(self.ends, begin), bisect_right(self.ends, end - 1) + 1)

    def _check_block(self, kind: str, block: int) -> None:
        end = int(self.ends[block])
        begin = end - int(self.index["rows"][block])
        data = self.packed.numpy() if kind == "rows" else self.tokens
        if zlib.crc32(data[begin:end].data) != self.index[f"{kind}_crc"][block]:
            raise CacheError(
                f"{self._path(kind)} is damaged: block {block} of shard {self.number} (its tokens"
                f" {begin} to {end - 1}) fails its checksum."
            )

    def verify(self) -> None:
        """Reads and checks every block, whatever was checked before."""
        for block in range(len(self.index)):
            for kind in ("rows", "tokens"):
                self._check_block(kind, block)
