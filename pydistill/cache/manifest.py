"""`manifest.json`: what a teacher cache was recorded from, and how.

Written once when the cache is begun, with `tokens` null, and once when it is finished; each time
whole or not at all. It ends with the CRC-32 of everything else in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydistill.reference.cache_decode import Layout, layout

NAME = "manifest.json"
PART = "manifest.json.part"
_FORMAT, _VERSION = "pydistill teacher cache", 1


class CacheError(ValueError):
    """A cache that cannot be used as asked: damaged, unfinished, or of another model."""


@dataclass(frozen=True)
class Manifest:
    """What every row of a cache has in common.

    `tokenizer` is what `tokenizer_hash` says, `vocab_size` the width of the teacher's logits, `k`
    the slots of a row, `codes` "uint8" or "uint16", `shard_rows` the rows of a shard file. `tokens`
    is the number of rows of a finished cache, None while it is written. Values that cannot be are a
    ValueError or a TypeError.
    """

    model: str
    tokenizer: str
    vocab_size: int
    k: int
    temperature: float = 1.0
    codes: str = "uint8"
    shard_rows: int = 2**20
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "k", "shard_rows"):
            _check_type(name, getattr(self, name), int)
        for name in ("model", "tokenizer", "codes"):
            _check_type(name, getattr(self, name), str)
        _check_type("temperature", self.temperature, int, float)
        if self.tokens is not None:
            _check_type("tokens", self.tokens, int)
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is not positive and finite; pass the teacher's."
            )
        if not 1 <= self.shard_rows < 2**31:
            raise ValueError(f"shard_rows={self.shard_rows} is outside 1..2^31-1.")
        if self.tokens is not None and self.tokens < 0:
            raise ValueError(f"tokens={self.tokens} is negative.")
        _ = self.layout

    @property
    def layout(self) -> Layout:
        return layout(self.vocab_size, self.k, self.codes)


def _check_type(name: str, value: object, *wanted: type) -> None:
    if isinstance(value, bool) or not isinstance(value, wanted):
        names = " or ".join(t.__name__ for t in wanted)
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass {names}.")


def tokenizer_hash(tokenizer: Any) -> str:
    """ "sha256:..." of a tokenizer's vocabulary: equal where every id means the same token.

    `tokenizer` is one of transformers or anything else with `get_vocab()`, a dict from token to id,
    or such a hash, which is returned as it is.
    """
    if isinstance(tokenizer, str):
        if not tokenizer.startswith("sha256:"):
            raise ValueError(
                f"tokenizer={tokenizer!r} is no hash; pass the tokenizer itself, or 'sha256:...'."
            )
        return tokenizer
    vocabulary = tokenizer if isinstance(tokenizer, dict) else tokenizer.get_vocab()
    pairs = sorted((int(i), str(token)) for token, i in vocabulary.items())
    text = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of the cache in `folder`; CacheError where there is none or it is damaged."""
    path = folder / NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(f"{folder} is no teacher cache: it has no {NAME}.") from error
    try:
        data = json.loads(text)
        crc = data.pop("crc32")
        sound = crc == _checksum(data)
        if sound and data.pop("format") == _FORMAT:
            version = data.pop("version")
            if version != _VERSION:
                raise CacheError(
                    f"{path} has format version {version}, this release reads {_VERSION}; update"
                    " pydistill."
                )
            manifest = Manifest(**data)
            if _text(manifest) == text:
                return manifest
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged: it cannot be read as a manifest.") from error
    raise CacheError(f"{path} is damaged: it is not as it was written.")


def write(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into `folder`, durably, whole or not at all."""
    file = os.open(folder / PART, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(file, _text(manifest))
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(folder / PART, folder / NAME)
    sync_folder(folder)


def _text(manifest: Manifest) -> bytes:
    data: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, **asdict(manifest)}
    return (json.dumps({**data, "crc32": _checksum(data)}, indent=2) + "\n").encode()


def _checksum(data: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"


def difference(ours: Manifest, theirs: Manifest) -> str | None:
    """The first field but `tokens` in which two manifests differ, as "k (64, not 32)"."""
    for field in fields(Manifest):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name != "tokens" and a != b:
            return f"{field.name} ({a!r}, not {b!r})"
    return None


def write_all(file: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written."""
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(file, left) :]


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
