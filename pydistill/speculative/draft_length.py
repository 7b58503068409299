"""How many tokens a block drafts: a fixed number, or what pays by measured costs and acceptance.

With K drafted tokens of acceptance a each, a block yields (1 - a^(K+1)) / (1 - a) tokens in
K d + v(K + 1) seconds: d of the draft for one token, v(w) of the target for w. `auto` takes the K
of the largest rate, 0 where no K beats plain decoding. v is what was measured, straight lines
between; a is a count that forgets, over the last 50 evaluated tokens or so.

Trying costs time, and may lose some. What was lost against plain decoding is kept as a debt. `auto`
drafts no more than what, with nothing accepted, leaves the debt within 3 % of the time of the
tokens so far and of at most 64 to come. So a useless draft costs 3 % of a long answer, and a good
one earns what longer drafts need. That a model draft has to read the prompt first is no debt: it is
done where what drafting is expected to save in this answer is twice as much, or for a try, within
the same 3 %.

Costs outlive the call: they are properties of two models on a machine, and a short answer has no
time to find them. Only speed depends on them, and, for `auto`, where blocks start.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

_RECENT = 9  # measurements of one shape; the median of them counts
_SURE = 3  # measurements of a shape from which its median is believed
_MEMORY = 0.98  # of acceptance, for each evaluated token
_ALLOWANCE = 0.03  # of the time of plain decoding
_AHEAD = 64  # tokens to come that the allowance counts on
_GAIN = 1.03  # predicted, below which drafting is not worth its risk
_SLOPE = 0.08  # of a target's run, for each further token, while it is not known
_FIRST_WAIT = 16  # plain blocks before the next try, doubled by each that failed


class Costs:
    """Seconds by shape, and acceptance, of one target and one draft."""

    def __init__(self) -> None:
        self.runs: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self.drafts: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self.guess = 0.0  # a draft's cost of one token over the target's, before any measurement
        self.evaluated, self.accepted = 3.0, 1.8

    def plain(self, batch: int) -> float:
        """A target's run over one token a request; NaN before any was timed. It takes no longer
        than one over more tokens, which may have been timed oftener."""
        own = _median(self.runs.get(self._nearest(batch, 1), ()))
        wider = [
            _median(times)
            for (size, width), times in self.runs.items()
            if size == batch and width > 1 and len(times) >= _SURE
        ]
        return min([own, *wider])

    def run(self, batch: int, width: int) -> float:
        """A target's run over `width` tokens a request."""
        plain = self.plain(batch)
        known = [(1, plain)]
        for (size, w), times in sorted(self.runs.items()):
            if size == batch and w > 1:
                # The first runs of a shape are slow; until there are a few, hope for better.
                hoped = plain * (1 + _SLOPE * (w - 1))
                measured = _median(times)
                known.append((w, min(measured, hoped) if len(times) < _SURE else measured))
        at = next((i for i, (w, _) in enumerate(known) if w >= width), len(known))
        if at < len(known) and known[at][0] == width:
            return known[at][1]
        if at == len(known):
            (w, cost), base = known[-1], known[0]
            slope = (cost - base[1]) / (w - base[0]) if w > 1 else _SLOPE * plain
            return cost + max(0.0, slope) * (width - w)
        (w0, c0), (w1, c1) = known[at - 1], known[at]
        return c0 + (c1 - c0) * (width - w0) / (w1 - w0)

    def draft(self, batch: int) -> float:
        """The draft's seconds for one token of each request."""
        times = self.drafts.get(batch)
        return _median(times) if times else self.guess * self.plain(batch)

    @property
    def acceptance(self) -> float:
        return min(self.accepted / self.evaluated, 0.999)

    def judge(self, evaluated: float, accepted: float) -> None:
        kept = _MEMORY**evaluated
        self.evaluated = self.evaluated * kept + evaluated
        self.accepted = self.accepted * kept + accepted

    def begin(self) -> None:
        """A new text: what is known of acceptance counts little more than a guess."""
        scale = min(1.0, 6 / self.evaluated)
        self.evaluated, self.accepted = self.evaluated * scale, self.accepted * scale

    def speedup(self, batch: int, drafted: float, acceptance: float) -> float:
        """Of blocks with `drafted` tokens, over plain decoding, by the formula above."""
        below = math.floor(drafted)
        low, high = self.run(batch, below + 1), self.run(batch, below + 2)
        cost = drafted * self.draft(batch) + low + (drafted - below) * (high - low)
        return tokens_of_block(acceptance, drafted) * self.plain(batch) / cost

    def _nearest(self, batch: int, width: int) -> tuple[int, int]:
        """Rows finish, and a batch of another size is timed soon; until then the nearest serves."""
        sizes = [size for size, w in self.runs if w == width]
        return (min(sizes, key=lambda size: abs(size - batch)) if sizes else batch, width)


def tokens_of_block(acceptance: float, drafted: float) -> float:
    """Expected tokens of a block: (1 - a^(K+1)) / (1 - a)."""
    return float((1 - acceptance ** (drafted + 1)) / (1 - acceptance))


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, Costs]] = WeakKeyDictionary()


def costs_of(target: Any, draft: Any) -> Costs:
    """What this process has measured of the two models; they are not kept alive."""
    return _known.setdefault(target, WeakKeyDictionary()).setdefault(draft, Costs())


class DraftLength:
    """Chooses the number of drafted tokens of each block, and is told what came of it.

    `wanted`: the fixed number, or None for auto; `most`: the largest that auto takes; `tokens`: the
    new tokens that a request may have.
    """

    def __init__(self, costs: Costs, wanted: int | None, most: int, tokens: int) -> None:
        self.costs, self.wanted, self.most, self.tokens = costs, wanted, most, tokens
        self.debt = 0.0  # seconds lost against plain decoding
        self.written = 0.0  # tokens a request
        self.wait, self.rest, self.trying = _FIRST_WAIT, 0, False

    def choose(self, batch: int, room: int, reading: float = 0.0) -> int:
        """At most `room`; `reading`: seconds until the draft has read the prompt."""
        if self.wanted is not None:
            return min(self.wanted, room)
        plain = self.costs.plain(batch)
        most = min(self.most, room)
        if most < 1 or not plain > 0:  # NaN: this block will be timed
            return 0
        allowance = _ALLOWANCE * plain * (self.written + min(_AHEAD, self.tokens))

        def debt(k: int) -> float:
            spent = k * self.costs.draft(batch) + self.costs.run(batch, k + 1)
            return self.debt + spent - plain

        self.trying = False
        drafted = [k for k in range(1, most + 1) if debt(k) <= allowance]
        if not drafted:
            return 0
        gains = {k: self.costs.speedup(batch, k, self.costs.acceptance) for k in drafted}
        best = max(drafted, key=gains.__getitem__)
        if gains[best] >= _GAIN:
            saved = (1 - 1 / gains[best]) * plain * (self.tokens - self.written)
            return best if saved >= 2 * reading else 0
        tried = drafted[:2][-1]
        if self.rest > 0 or debt(tried) + reading > allowance:
            self.rest = max(0, self.rest - 1)
            return 0
        self.trying = True
        return tried

    def record(
        self,
        batch: int,
        drafted: int,
        draft_seconds: float,
        run_seconds: float,
        tokens: float,
        usual: tuple[bool, bool],
    ) -> None:
        """A block: `tokens` is the mean of its requests'; `usual`: that the draft, and the target,
        had no prompt or longer text to catch up."""
        costs = self.costs
        self.written += tokens
        if usual[1]:
            costs.runs[batch, drafted + 1].append(run_seconds)
        if not drafted:
            return
        if self.trying:
            self.wait, self.rest = 2 * self.wait, self.wait
        if usual[0]:
            costs.drafts[batch].append(draft_seconds / drafted)
        plain = costs.plain(batch)
        if plain > 0:
            known = not usual[1] or len(costs.runs[batch, drafted + 1]) >= _SURE
            spent = costs.run(batch, drafted + 1) if known else run_seconds
            self.debt += spent + drafted * costs.draft(batch) - tokens * plain


def _median(values: Sequence[float] | deque[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan
