"""Where drafted tokens come from: a smaller model, or the text so far.

A draft proposes up to `room[i]` tokens for each request, with the logits they were sampled from;
then it is told how many were accepted. Its tokens are sampled by `verify` itself, from the very
rows that verification will read, with coins of their own: no row is ever warped twice in two ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pydistill.ops.verify import verify
from pydistill.speculative.cached_model import CachedModel, vocabulary_of, vocabulary_of_head
from pydistill.speculative.settings import Processor

_KEY = 0x5851F42D4C957F2D  # parts a draft's coins from those that verify draws with the same seed
_SLOTS = 1 << 20  # more than a block ever has


@dataclass
class Request:
    """One sequence: its prompt and what was committed behind it."""

    index: int
    tokens: list[int]
    prompt: int
    seed: int
    processors: list[Processor]
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


class Proposal(NamedTuple):
    ids: Tensor  # int64 [B, K], on the CPU; -1 where nothing was proposed
    logits: Tensor | None  # [B, K, V], or [B, K, S]; None: the tokens are point masses
    counts: list[int]  # proposed tokens of each request
    vocabulary: Tensor | None = None  # int64 [S]: the tokens of the logits, where these are not all


class Draft(Protocol):
    context: int | None

    def propose(
        self, requests: Sequence[Request], room: Sequence[int], target: CachedModel
    ) -> Proposal:
        """`target` has cached all committed tokens but the last, or nothing yet."""

    def committed(self, lengths: Sequence[int]) -> None:
        """Of each request, how many tokens are committed before the last one."""

    def select(self, rows: Sequence[int]) -> None: ...


class ModelDraft:
    """A causal model with the vocabulary of the target, or with a head over a part of it.

    Every call feeds the last P committed tokens of every request, P being what the request that
    lags most has not fed yet: one, or two after a block that was accepted to its end. A request
    with less to catch up feeds a token again, which is exact, where padding would leave a hole.
    """

    def __init__(self, model: Any, batch: int, warpers: dict[str, Any], vocabulary: int) -> None:
        self.cached = CachedModel(model, batch)
        self.context = self.cached.context
        self.warpers, self.vocabulary = warpers, vocabulary
        self.head = vocabulary_of_head(model)
        if self.head is not None:
            self.known = self.head < vocabulary
            self.head = self.head[self.known]
        self.fed = 0  # tokens of the last call's first run: what it had to catch up
        self._right = [0] * batch  # tokens of the cache that are the committed ones

    @property
    def catching_up(self) -> bool:
        """In the last call: that there was more to read than after any block."""
        return self.fed > 2

    def propose(
        self, requests: Sequence[Request], room: Sequence[int], target: CachedModel
    ) -> Proposal:
        slots, device = max(room), self.cached.model.device
        last = vocabulary_of(self.cached.model) - 1  # the target may know tokens beyond it
        behind = max(len(x.tokens) - right for x, right in zip(requests, self._right, strict=True))
        self.fed = behind
        self.cached.rollback([max(0, len(x.tokens) - behind) for x in requests])
        ids, counts = last_tokens(requests, behind)
        greedy = self.warpers["temperature"] == 0
        texts = [list(x.tokens) for x in requests]
        seeds = torch.tensor([wrapped(x.seed ^ _KEY) for x in requests], device=device)
        starts = torch.tensor([len(x.tokens) for x in requests], device=device) * _SLOTS
        empty = torch.empty(len(requests), 0, dtype=torch.int64, device=device)
        drawn, rows = [], []
        for slot in range(slots):
            ids = ids.to(device).clamp(max=last)
            logits = self._shared(self._extend(ids, counts, None if slot else target))
            logits = self._processed(requests, logits, texts)
            ids = verify(
                logits, None, empty, seed=seeds, position=starts + slot, **self.warpers
            ).tokens
            if self.head is not None:
                ids = torch.where(ids < 0, ids, self.head[ids.clamp(min=0)])
            drawn.append(ids)
            if not greedy:
                rows.append(logits)
            ids, counts = ids.clamp(min=0), [1] * len(requests)  # -1: a row without a softmax
            if any(x.processors for x in requests):
                for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
                    text.append(token)
        self._right = list(self.cached.lengths)
        drafted = torch.cat(drawn, 1).cpu()
        wanted = torch.arange(slots)[None] < torch.tensor(room)[:, None]
        # A processor may leave nothing of a reduced head's tokens: there is nothing to offer.
        cut = self.head is not None and any(x.processors for x in requests)
        if bool((wanted & (drafted < 0)).any()) and not cut:
            warnings.warn(
                "the draft's logits have no softmax (NaN or infinity), so its tokens are not used;"
                " mend its weights, or pass another draft.",
                stacklevel=6,
            )
        drafted[~wanted] = -1
        vocabulary = None if greedy else self.head
        return Proposal(drafted, torch.cat(rows, 1) if rows else None, list(room), vocabulary)

    def _extend(self, ids: Tensor, counts: Sequence[int], target: CachedModel | None) -> Tensor:
        """The logits behind tokens that are committed, which the target knows, or drafted."""
        return self.cached.extend(ids, counts, 1)

    def _processed(
        self, requests: Sequence[Request], logits: Tensor, texts: Sequence[Sequence[int]]
    ) -> Tensor:
        """`processed`, which wants rows over all of the vocabulary."""
        if self.head is None or not any(x.processors for x in requests):
            return processed(requests, logits, texts)
        rows = logits.new_full((*logits.shape[:2], self.vocabulary), -torch.inf)
        rows[..., self.head] = logits
        return processed(requests, rows, texts)[..., self.head]

    def _shared(self, logits: Tensor) -> Tensor:
        """Over the target's vocabulary: rows that pad a head are cut or added."""
        if self.head is not None:
            whole = self.head.numel() == self.known.numel()
            return logits if whole else logits[..., self.known]
        lacking = self.vocabulary - logits.shape[-1]
        if lacking > 0:
            return torch.nn.functional.pad(logits, (0, lacking), value=-torch.inf)
        return logits[..., : self.vocabulary] if lacking < 0 else logits

    def committed(self, lengths: Sequence[int]) -> None:
        self._right = [min(x) for x in zip(self._right, lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self.cached.select(rows)
        self._right = [self._right[row] for row in rows]


class FeatureModelDraft(ModelDraft):
    """A `FeatureDraft`. Committed tokens are fed with the target's states, drafted ones with the
    draft's own, so nothing that it cached of these stays; before the target has read the prompt
    there is nothing to propose."""

    @property
    def catching_up(self) -> bool:
        return self.fed > 9

    def propose(
        self, requests: Sequence[Request], room: Sequence[int], target: CachedModel
    ) -> Proposal:
        if not any(target.lengths):
            nothing = torch.empty(len(requests), 0, dtype=torch.int64)
            return Proposal(nothing, None, [0] * len(requests))
        found = super().propose(requests, room, target)
        self._right = [len(x.tokens) for x in requests]
        return found

    def _extend(self, ids: Tensor, counts: Sequence[int], target: CachedModel | None) -> Tensor:
        if target is not None:
            self._features = target.states(ids.shape[1])
        found = self.cached.run(ids, counts, 1, features=self._features)
        self._features = found.states[:, -1:]
        logits: Tensor = found.logits
        return logits


@dataclass
class Ngram:
    """Prompt lookup: what followed the last tokens where they stood before, in prompt or answer.

    The longest suffix of at most `largest` and at least `smallest` tokens that was seen before
    decides, and of its places the latest; a copy that runs into the end goes on with itself.
    """

    largest: int = 3
    smallest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"Ngram(largest={self.largest}, smallest={self.smallest}) matches nothing; use"
                " 1 <= smallest <= largest."
            )


class NgramDraft:
    """The places of all n-grams of each request, kept up with its tokens."""

    context: int | None = None

    def __init__(self, kind: Ngram, batch: int) -> None:
        self.sizes = range(kind.largest, kind.smallest - 1, -1)
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch)]
        self.known = [0] * batch  # n-grams that end before here are in `places`

    def propose(
        self, requests: Sequence[Request], room: Sequence[int], target: CachedModel
    ) -> Proposal:
        found = [
            self._follow(row, request.tokens, most)
            for row, (request, most) in enumerate(zip(requests, room, strict=True))
        ]
        slots = max(map(len, found))
        ids = torch.tensor([x + [-1] * (slots - len(x)) for x in found], dtype=torch.int64)
        return Proposal(ids.reshape(len(found), slots), None, [len(x) for x in found])

    def _follow(self, row: int, text: list[int], most: int) -> list[int]:
        places, length = self.places[row], len(text)
        for end in range(max(1, self.known[row]), length):
            for size in self.sizes:
                if size <= end:
                    places[tuple(text[end - size : end])] = end
        self.known[row] = length
        for size in self.sizes:
            at = places.get(tuple(text[length - size :])) if size < length else None
            if at is not None:
                copied = text[at : at + most]
                for i in range(len(copied), most):
                    copied.append(copied[i - (length - at)])
                return copied
        return []

    def committed(self, lengths: Sequence[int]) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        self.places = [self.places[row] for row in rows]
        self.known = [self.known[row] for row in rows]


def last_tokens(requests: Sequence[Request], count: int) -> tuple[Tensor, list[int]]:
    """The last `count` tokens of each request, padded on the left `[B, count]`, and how many."""
    rows = [x.tokens[-count:] for x in requests]
    ids = torch.tensor([[0] * (count - len(row)) + row for row in rows])
    return ids, [len(row) for row in rows]


def processed(
    requests: Sequence[Request], logits: Tensor, texts: Sequence[Sequence[int]]
) -> Tensor:
    """Logits `[B, N, V]` after each request's processors, row j seeing its text without the last
    N - 1 - j tokens; fp32 where there are any, as in transformers."""
    if not any(x.processors for x in requests):
        return logits
    rows = logits.shape[1]
    result = logits.float().clone()
    for request, scores, text in zip(requests, result, texts, strict=True):
        seen = torch.tensor([text], device=logits.device)
        for row in range(rows):
            here = scores[row : row + 1]
            for processor in request.processors:
                here = processor(seen[:, : seen.shape[1] - (rows - 1 - row)], here)
            scores[row] = here[0]
    return result


def wrapped(number: int) -> int:
    """As an int64, in two's complement."""
    return (number + 2**63) % 2**64 - 2**63
