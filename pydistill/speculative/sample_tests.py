"""Do sampled tokens follow the target's law? Tests and bounds that hold at any number of samples.

At each position the samples are parted by the tokens before it, their context; given the contexts,
the next tokens are independent, each with the target's distribution after its context. Pearson's
statistic of all contexts together is compared with chi-square, and before it disproves anything
with simulations from the target's own distribution, so that the false-alarm rate is no
approximation. docs/certify.md proves the bound on the total variation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Context = tuple[int, ...]
BINS = 32
_CONTEXTS = 16  # the most that are tested at a position
_LEAST = 50  # samples of a context that is tested
_EXPECTED = 10  # samples of a token that has a cell of its own
_CHUNK = 4096  # simulations at a time


class PositionTest(NamedTuple):
    """The samples of one position, 0 being the first new token."""

    position: int
    samples: int
    contexts: int
    statistic: float  # Pearson's
    freedom: int  # its degrees
    p_value: float  # by chi-square
    disproved: bool
    impossible: int | None  # a sampled token of probability 0
    distance: float  # total variation of the binned samples from the binned law
    distance_bound: float  # of the binned laws


def examine(
    tokens: Tensor,
    law: Callable[[Sequence[Context]], Tensor],
    false_alarm: float,
    confidence: float,
    seed: int,
) -> list[PositionTest]:
    """Of samples int64 `[N, T]`, -1 behind their end, each position that has a context of 50
    samples. `law` gives the target's distributions `[C, V]` after contexts. A lossless pair fails
    any of the tests with a chance of at most `false_alarm`; all bounds hold together with
    `confidence`."""
    found = []
    samples, positions = tokens.tolist(), tokens.shape[1]
    level, miss = false_alarm / positions, (1 - confidence) / positions
    generator = torch.Generator().manual_seed(seed)
    for position in range(positions):
        there = [x[: position + 1] for x in samples if x[position] >= 0]
        # Chosen by what came before: what follows is still independent, with the target's law.
        visits = Counter(tuple(x[:-1]) for x in there)
        contexts = [x for x, n in visits.most_common(_CONTEXTS) if n >= _LEAST]
        if not contexts:
            continue
        p = law(contexts).double().cpu()
        row = {context: i for i, context in enumerate(contexts)}
        pairs = [(row[tuple(x[:-1])], x[-1]) for x in there if tuple(x[:-1]) in row]
        wrong = [token for _, token in pairs if token >= p.shape[1]]
        if wrong:
            raise ValueError(
                f"tokens hold {wrong[0]}, outside the target's {p.shape[1]} tokens; pass samples of"
                " the target's vocabulary."
            )
        seen = torch.zeros_like(p).index_put_(
            tuple(torch.tensor(pairs).T), torch.ones((), dtype=p.dtype), accumulate=True
        )
        found.append(_test(position, seen, p, level, miss, generator))
    return found


def _test(
    position: int, seen: Tensor, p: Tensor, level: float, miss: float, generator: torch.Generator
) -> PositionTest:
    """Of counts and probabilities `[C, V]`."""
    impossible = ((seen > 0) & (p == 0)).any(0).nonzero()
    cells = [_cells(*x) for x in zip(seen, p, strict=True)]
    statistic = sum(_pearson(counts, chances, counts.sum()) for counts, chances in cells)
    freedom = sum(len(chances) - 1 for _, chances in cells)
    p_value, value = 1.0, float(statistic)
    if freedom:
        half = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
        p_value = float(torch.special.gammaincc(half[0], half[1]))
    disproved = bool(len(impossible))
    if p_value < level and not disproved:
        disproved = _never_reached(value, cells, level, generator)
    distance, bound = _distance(seen, p, miss)
    return PositionTest(
        position, int(seen.sum()), len(seen), value, freedom,
        0.0 if len(impossible) else p_value, disproved,
        int(impossible[0]) if len(impossible) else None, distance, bound,
    )  # fmt: skip


def _cells(seen: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and probabilities of a context's cells: tokens that are expected often, and the rest
    together."""
    common = p * seen.sum() >= _EXPECTED
    rare = ~common & (p > 0)
    counts, chances = seen[common], p[common]
    if bool(rare.any()):
        counts = torch.cat([counts, seen[rare].sum()[None]])
        chances = torch.cat([chances, p[rare].sum()[None]])
    return counts, chances / chances.sum()


def _pearson(counts: Tensor, chances: Tensor, total: Tensor) -> Tensor:
    due = chances * total
    return ((counts - due) ** 2 / due).sum(-1)


def _never_reached(
    statistic: float, cells: list[tuple[Tensor, Tensor]], level: float, generator: torch.Generator
) -> bool:
    """Barnard's Monte Carlo test: with n simulations of the target's law, its own samples exceed
    all of them with a chance of at most 1 / (n + 1)."""
    left = math.ceil(1 / level) - 1
    while left > 0:
        size = min(left, _CHUNK)
        simulated = torch.zeros(size, dtype=torch.float64)
        for counts, chances in cells:
            drawn = _multinomial(int(counts.sum()), chances, size, generator)
            simulated += _pearson(drawn, chances, counts.sum())
        if bool((simulated >= statistic).any()):
            return False
        left -= size
    return True


def _multinomial(total: int, chances: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Counts `[size, cells]`, one binomial a cell of what the cells before it left."""
    left = torch.full((size,), float(total), dtype=torch.float64)
    behind = chances.flip(0).cumsum(0).flip(0)
    counts = []
    for i in range(len(chances) - 1):
        share = (chances[i] / behind[i]).clamp(max=1).expand(size)
        counts.append(torch.binomial(left, share.contiguous(), generator=generator))
        left = left - counts[-1]
    return torch.stack([*counts, left], 1)


def _distance(seen: Tensor, p: Tensor, miss: float) -> tuple[float, float]:
    """Total variation over bins, a token's bin being its rank in the target's distribution, and
    what the laws' exceeds with a chance of `miss` at most."""
    order = p.sort(dim=-1, descending=True, stable=True).indices
    total, bins = float(seen.sum()), min(BINS, p.shape[1])
    due = _binned(p.gather(1, order), bins) * seen.sum(-1, keepdim=True)
    got = _binned(seen.gather(1, order), bins)
    distance = float((got - due).sum(0).abs().sum()) / total / 2
    spread = math.sqrt((bins - 1) / total) / 2
    return distance, min(1.0, distance + spread + math.sqrt(math.log(1 / miss) / (2 * total)))


def _binned(rows: Tensor, bins: int) -> Tensor:
    return torch.cat([rows[:, : bins - 1], rows[:, bins - 1 :].sum(-1, keepdim=True)], 1)
