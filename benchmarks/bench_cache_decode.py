"""`cache_decode`: rows of a teacher cache unpacked, a cache of 1e6 tokens written and read back,
and a slice of it beside the loss it feeds.

What is counted is entries of 8 bytes, an int32 id and an fp32 log-probability: 8 K rows / time. The
tails, the int64 that ids come in and the packed bytes read are not. The floor writes the outputs
into fresh tensors, as no decoder can avoid.

The cache is made by `CacheWriter`, every row another, in several shards. Its gate reads all of it
in slices that fit neither shards nor blocks and compares every id and log-probability with what was
given; bytes a token are those on disk, KL(stored || given) is recomputed from what is read. *Read*
has compared the checksums before, *first read* opens the cache anew and compares them as it goes.

The loss of the last case writes its gradient over as many rows of logits as the slice has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import TopkTeacher, _registry, cache_decode, topk_divergence
from pydistill.cache import CacheWriter, Manifest, TeacherCache
from pydistill.testing.cases.cache_decode import CASES

TABLE = next(case for case in CASES if "bench" in case.marks)
LIMITS = {"ids": 0.0, "log_p": 0.0}
TOKENS, BATCH, SLICE = 1_000_000, 4000, 4099  # a slice ends where no batch, block or shard does
# What is promised at K = 64 of 151,936: bytes a token on disk, nats of any one row.
STORED = {"bytes a token": 200.0, "KL": 5e-4, "wrong ids": 0.0, "log_p": 0.02, "tail": 1e-5}


class Packed:
    """The rows of the case, and what the reference makes of some of them."""

    def __init__(self, rows: int) -> None:
        self.given = TABLE.inputs("cpu", 0)
        self.given["packed"] = self.given["packed"][:rows].contiguous()
        few = {**self.given, "packed": self.given["packed"][:64]}
        self.want = cache_decode(**few, impl="reference")

    def gate(self, got: TopkTeacher) -> Gate:
        off = (got.topk_logprobs[:64] - self.want.topk_logprobs).nan_to_num(0).abs().max()
        wrong = (got.topk_ids[:64] != self.want.topk_ids).sum()
        return Gate({"ids": float(wrong), "log_p": float(off)}, LIMITS)


def decode(x: Packed, impl: str) -> Step:
    return Step(partial(cache_decode, **x.given, impl=impl), check=x.gate)


def fill(x: Packed) -> Step:
    shape = len(x.given["packed"]), x.given["k"]

    def run() -> tuple[Tensor, ...]:
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape[0])

    return Step(run)


def batch(number: int, vocab: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and tails of rows [BATCH number, BATCH (number + 1)): flat, ordinary
    and peaked ones, ids in ascending order."""
    random = np.random.default_rng(number)
    logits = random.standard_normal((BATCH, k + 1), dtype=np.float32)
    logits[:, :k] *= random.choice(np.array([0.5, 3.0, 9.0], np.float32), (BATCH, 1))
    ids = random.integers(1, vocab // k, (BATCH, k)).cumsum(1) - 1
    log_p = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    return torch.from_numpy(ids), log_p[:, :k], log_p[:, k]


class Stored:
    """A cache on disk, and what went into it, made again a batch at a time."""

    def __init__(self, tokens: int, vocab: int, k: int) -> None:
        self.tokens, self.vocab, self.k = tokens, vocab, k
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "cache"
        manifest = Manifest("bench", "sha256:0", vocab, k, shard_rows=-(-tokens // 4) + 1)
        with CacheWriter(self.folder, manifest) as writer:
            for number in range(tokens // BATCH):
                ids, log_p, tail = batch(number, vocab, k)
                writer.append(ids[:, 0], ids, log_p, tail)
        self.cache = TeacherCache.open(self.folder, tokenizer=None)

    def slices(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.tokens, SLICE):
            yield begin, min(begin + SLICE, self.tokens)

    def given(self) -> Iterator[tuple[Tensor, ...]]:
        """What went into each of `slices`."""
        rest: tuple[Tensor, ...] = batch(0, self.vocab, self.k)
        at = 1
        for begin, end in self.slices():
            while len(rest[0]) < end - begin:
                more = batch(at, self.vocab, self.k)
                rest = tuple(torch.cat(pair) for pair in zip(rest, more, strict=True))
                at += 1
            yield tuple(x[: end - begin] for x in rest)
            rest = tuple(x[end - begin :] for x in rest)

    @cached_property
    def errors(self) -> dict[str, float]:
        found = dict.fromkeys(STORED, 0.0)
        found["bytes a token"] = self.cache.disk_bytes() / self.tokens
        for (begin, end), (ids, log_p, tail) in zip(self.slices(), self.given(), strict=True):
            got = self.cache[begin:end]
            q, q_tail = got.topk_logprobs.double(), got.tail_logprob.double()
            kl = (q.exp() * (q - log_p)).sum(-1) + q_tail.exp() * (q_tail - tail)
            off = {
                "KL": kl,
                "wrong ids": (got.topk_ids != ids).sum().double(),
                "log_p": ((q - log_p) / (1 - log_p)).abs(),
                "tail": ((q_tail - tail) / (1 - tail)).abs(),
            }
            for name, values in off.items():
                found[name] = max(found[name], float(values.max()))
        return found

    def gate(self, output: Any) -> Gate:
        return Gate(self.errors, STORED)


stored = cache(Stored)  # one cache for both of its cases


def read(x: Stored) -> Step:
    def run() -> None:
        for begin, end in x.slices():
            x.cache[begin:end]

    return Step(run, check=x.gate)


def first_read(x: Stored) -> Step:
    def run() -> None:
        opened = TeacherCache.open(x.folder, tokenizer=None)
        for begin, end in x.slices():
            opened[begin:end]

    return Step(run, check=x.gate)


def fill_slices(x: Stored) -> Step:
    def run() -> None:
        for begin, end in x.slices():
            n = end - begin
            torch.zeros((n, x.k), dtype=torch.int64), torch.zeros((n, x.k)), torch.zeros(n)

    return Step(run)


class Beside:
    """A slice of the cache, and logits that its rows teach."""

    def __init__(self, rows: int, tokens: int, vocab: int, k: int) -> None:
        self.cache = stored(tokens, vocab, k).cache
        self.range = slice(1000, 1000 + rows)
        self.student = torch.randn(rows, vocab).bfloat16()


def slice_of(x: Beside) -> Step:
    return Step(lambda: x.cache[x.range])


def loss(x: Beside) -> Step:
    teacher, leaf = x.cache[x.range], x.student.clone().requires_grad_()

    def run() -> Any:
        value = topk_divergence(leaf, teacher, overwrite_logits=True)
        return torch.autograd.grad(value, leaf)

    return Step(run, partial(leaf.detach().copy_, x.student))


def floor(x: Beside) -> Step:
    s = x.student.clone()
    return Step(partial(s.mul_, 1.0), partial(s.copy_, x.student))


def cases(quick: bool = False) -> list[Case]:
    (rows, vocab), k = TABLE.shape, 64
    rows = 512 if quick else rows
    tokens = 5 * BATCH if quick else TOKENS
    chosen = _registry.explain(_registry.OPERATORS["cache_decode"], "cpu")
    notes = {"backend": f"{chosen.backend} ({chosen.reason})"}
    few = 16 if quick else 256
    share = Claim("cache[a:b]", "loss, overwrite_logits", at_most=0.05)
    return [
        Case(
            f"decode ({rows}, {vocab}), K = {k}",
            bytes=8.0 * k * rows,
            flops=TABLE.flops["forward"] * rows / TABLE.shape[0],
            inputs=partial(Packed, rows),
            notes=notes,
            contestants=(
                Contestant("decode", partial(decode, impl="auto"), against=("reference",)),
                Contestant("reference", partial(decode, impl="reference"), "peer"),
                Contestant("floor: fill the outputs", fill, "floor"),
            ),
            claims=(Claim("decode", at_least=1.0, of="rate"),),
        ),
        Case(
            f"a cache of {tokens:,} tokens, V = {vocab}, K = {k}, in slices of {SLICE}",
            bytes=8.0 * k * tokens,
            flops=TABLE.flops["forward"] * tokens / TABLE.shape[0],
            inputs=partial(stored, tokens, vocab, k),
            notes=notes,
            contestants=(
                Contestant("read", read),
                Contestant("first read", first_read),
                Contestant("floor: fill the outputs", fill_slices, "floor"),
            ),
            claims=(Claim("read", at_least=1.0, of="rate"),),
        ),
        Case(
            f"cache slice beside topk_divergence bf16 ({few}, {vocab}), K = {k}",
            bytes=4.0 * few * vocab,
            flops=6.0 * few * vocab,
            inputs=partial(Beside, few, tokens, vocab, k),
            notes=notes,
            contestants=(
                Contestant("cache[a:b]", slice_of),
                Contestant("loss, overwrite_logits", loss),
                Contestant("floor: s *= 1", floor, "floor"),
            ),
            claims=(share,),
        ),
    ]


@pytest.mark.benchmark(timer=played_back)
def test_cache_decode(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
