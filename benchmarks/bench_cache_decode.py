"""`cache_decode`: rows of a teacher cache unpacked, and a slice of one beside the loss it feeds.

The first case unpacks many rows into fresh tensors; its floor writes as many bytes into fresh
tensors, as no decoder can avoid. Entries of 8 bytes (an int32 id and an fp32 log-probability) a
second are 8 K rows / time. The peer is the reference.

The second reads a slice of a cache on disk, checksums compared, and computes the loss and the
gradient of as many rows of logits over themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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


class Beside:
    """A cache on disk of a few thousand rows, and logits that as many of its rows teach."""

    def __init__(self, rows: int) -> None:
        case = next(c for c in CASES if "bench" in c.marks)
        given = case.inputs("cpu", 0)
        given["packed"] = given["packed"][:4096].contiguous()
        teacher = cache_decode(**given)
        self.folder = tempfile.TemporaryDirectory()
        manifest = Manifest("bench", "sha256:0", given["vocab_size"], given["k"])
        with CacheWriter(Path(self.folder.name) / "c", manifest) as writer:
            writer.append(torch.zeros(4096).long(), teacher.topk_ids, *teacher[0:3:2])
        self.cache = TeacherCache.open(Path(self.folder.name) / "c")
        self.rows = rows
        self.student = torch.randn(rows, given["vocab_size"]).bfloat16()


def read(x: Beside) -> Step:
    return Step(lambda: x.cache[1000 : 1000 + x.rows])


def loss(x: Beside) -> Step:
    teacher, leaf = x.cache[1000 : 1000 + x.rows], x.student.clone().requires_grad_()

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
    chosen = _registry.explain(_registry.OPERATORS["cache_decode"], "cpu")
    notes = {"backend": f"{chosen.backend} ({chosen.reason})", "entries": f"{8 * k * rows:,} bytes"}
    few = 16 if quick else 256
    return [
        Case(
            f"decode ({rows}, {vocab}), K = {k}",
            bytes=TABLE.bytes["forward"] * rows / TABLE.shape[0],
            flops=TABLE.flops["forward"] * rows / TABLE.shape[0],
            inputs=partial(Packed, rows),
            notes=notes,
            contestants=(
                Contestant("decode", partial(decode, impl="auto"), against=("reference",)),
                Contestant("reference", partial(decode, impl="reference"), "peer"),
                Contestant("floor: fill the outputs", fill, "floor"),
            ),
        ),
        Case(
            f"cache slice beside topk_divergence bf16 ({few}, {vocab}), K = {k}",
            bytes=4.0 * few * vocab,
            flops=6.0 * few * vocab,
            inputs=partial(Beside, few),
            notes=notes,
            contestants=(
                Contestant("cache[a:b]", read),
                Contestant("loss, overwrite_logits", loss),
                Contestant("floor: s *= 1", floor, "floor"),
            ),
            claims=(Claim("cache[a:b]", "loss, overwrite_logits", at_most=0.05),),
        ),
    ]


@pytest.mark.benchmark(timer=played_back)
def test_cache_decode(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
