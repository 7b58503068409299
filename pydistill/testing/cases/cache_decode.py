"""The cases of `cache_decode`: packed rows of every layout, and bytes that were never packed."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydistill.cache.encoding import encode
from pydistill.ops.cache_decode import cache_decode
from pydistill.reference.cache_decode import cache_decode_reference, layout
from pydistill.testing.case import Case, Expected, Tolerance


def _case(
    name: str,
    rows: int,
    vocab: int,
    k: int,
    codes: str = "uint8",
    *,
    chosen: tuple[int, ...] | None = None,
    noise: bool = False,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
) -> Case:
    case_id = f"{name}-{codes}-{rows}x{vocab}-k{k}"
    at = layout(vocab, k, codes)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        random = np.random.default_rng([seed, zlib.crc32(case_id.encode())])
        if noise:
            packed = random.integers(0, 256, (rows, at.stride), dtype=np.uint8)
        else:
            packed = _packed(random, rows, vocab, k, codes)
        out: dict[str, Any] = {"packed": torch.from_numpy(packed).to(device)}
        if chosen is not None:
            picks = random.integers(0, rows, chosen)
            out["rows"] = torch.from_numpy(picks).to(device)
        return {**out, "vocab_size": vocab, "k": k, "codes": codes}

    count = rows if chosen is None else int(np.prod(chosen))
    return Case(
        op="cache_decode",
        id=case_id,
        inputs=inputs,
        shape=(rows, vocab),
        dtypes=(torch.uint8,),
        options={},
        # Ids are exact, and the one product and difference are rounded alike everywhere.
        tolerances={name: Tolerance(0.0, 0.0) for name in ("ids", "log_p", "tail")},
        bytes={"forward": count * (at.stride + 12 * k + 4)},
        flops={"forward": 3 * count * k},
        marks=frozenset(marks),
        gate=gate,
    )


def _packed(random: np.random.Generator, rows: int, vocab: int, k: int, codes: str) -> Any:
    """Rows of random ids, peaked and flat, some with empty slots and some with -inf."""
    few = min(rows, 64)  # drawing without repetition is slow
    ids = np.stack([random.choice(vocab, k, replace=False) for _ in range(few)])
    logits = random.standard_normal((few, k)) * random.choice([0.1, 2.0, 8.0], (few, 1))
    if k > 4:
        logits[::3, 0] = -np.inf
        ids[::2, k // 2 : k // 2 + 2] = -1
    logits = np.where(ids < 0, -np.inf, logits)
    tail = random.standard_normal((few, 1)) if k < vocab else np.full((few, 1), -np.inf)
    both = np.concatenate([logits, tail], 1)
    both -= np.logaddexp.reduce(both, axis=1, keepdims=True)
    packed, _ = encode(ids, both[:, :-1], both[:, -1], vocab, layout(vocab, k, codes))
    return np.resize(packed, (rows, packed.shape[1]))


def _table() -> list[Case]:
    cases = []
    for codes in ("uint8", "uint16"):
        for vocab, k in ((1, 1), (2, 1), (5, 5), (40, 4), (257, 20), (1000, 1000), (49152, 100)):
            cases.append(_case("plain", 5, vocab, k, codes))
        for vocab in (151936, 262144, 2**31):
            for k in (1, 63, 64):
                cases.append(_case("big", 4, vocab, k, codes))
        cases.append(_case("noise", 50, 4096, 33, codes, noise=True))
        cases.append(_case("noise", 50, 7, 3, codes, noise=True))
        cases.append(_case("chosen", 9, 4096, 16, codes, chosen=(3, 5)))
        cases.append(_case("none", 3, 4096, 16, codes, chosen=(0,)))
    cases.append(_case("threads", 5000, 32000, 64))
    gate = _case("bench", 64, 151936, 64)
    cases.append(_case("bench", 65536, 151936, 64, marks=("bench", "slow"), gate=gate))
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`; ids as numbers that fp64 holds exactly."""
    got = cache_decode(**inputs, impl=impl)
    return {"ids": got.topk_ids.double(), "log_p": got.topk_logprobs, "tail": got.tail_logprob}


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference on the same bytes."""
    packed, rows = inputs["packed"], inputs.get("rows")
    prefix = packed.shape[:1] if rows is None else rows.shape
    packed = packed if rows is None else packed[rows.reshape(-1)]
    at = layout(inputs["vocab_size"], inputs["k"], inputs["codes"])
    ids, log_p, tail = cache_decode_reference(packed, at)
    return {
        "ids": Expected(ids.double().reshape(*prefix, at.k)),
        "log_p": Expected(log_p.reshape(*prefix, at.k)),
        "tail": Expected(tail.reshape(prefix)),
    }


CASES: list[Case] = _table()
