"""The exact law of what `verify` emits, by enumeration: every drafted sequence, or tree of tokens,
with each coin integrated out through the odds and the weights that the reference itself decides by.

A `World` is a target and a draft: for every prefix of drafted tokens a row of logits of each. Its
law is a table over the first K + 1 tokens that are committed (in a tree, one more than it is deep),
the ones after the block drawn from the target. Warpers are written out once more here, token by
token in Python's floats.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pydistill.ops import _verify_call
from pydistill.reference import verify as reference

Row = list[float]
WARPERS = ("temperature", "top_k", "top_p", "min_p")


def by_hand(row: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0) -> Row:  # fmt: skip
    """The warped distribution of one row of logits."""
    largest = max(row)
    if temperature == 0:
        return [float(i == row.index(largest)) for i in range(len(row))]
    mass = [math.exp((x - largest) / temperature) for x in row]
    if top_k:
        cut = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        mass = [m if x >= cut else 0.0 for m, x in zip(mass, row, strict=True)]
    if top_p < 1:
        whole = math.fsum(mass)
        above = [math.fsum(m for m, y in zip(mass, row, strict=True) if y > x) for x in row]
        mass = [m if a < top_p * whole else 0.0 for m, a in zip(mass, above, strict=True)]
    if min_p:
        mass = [m if m >= min_p * (1 - 1e-12) else 0.0 for m in mass]
    whole = math.fsum(mass)
    return [m / whole for m in mass]


def rows(
    vocab: int, salt: int, spread: float = 1.5, pattern: str = ""
) -> Callable[[tuple[int, ...]], Row]:
    """A random row of logits for every prefix."""

    @cache
    def row(prefix: tuple[int, ...]) -> Row:
        seed = salt
        for token in prefix:
            seed = 31 * seed + token + 1
        z = spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed)).double()
        if pattern == "ties":
            z = z.round()
        elif pattern == "infinite":
            z[seed % vocab] = -math.inf
        elif pattern == "low half":
            z[vocab // 2 :] = -math.inf
        elif pattern == "high half":
            z[: vocab // 2] = -math.inf
        elif pattern == "point":
            z[torch.arange(vocab) != seed % vocab] = -math.inf
        return z.tolist()

    return row


def support_of(vocab: int, size: int) -> Callable[[tuple[int, ...]], tuple[int, ...]] | None:
    """So many tokens for every prefix, in an order that is not theirs; all for 0."""
    if not size:
        return None
    return lambda prefix: tuple((sum(prefix) + 2 * size - i) % vocab for i in range(size))


@dataclass
class World:
    vocab: int
    slots: int
    target: Callable[[tuple[int, ...]], Row]
    draft: Callable[[tuple[int, ...]], Row] | Callable[[tuple[int, ...]], Any]  # a token: one-hot
    options: dict[str, Any] = field(default_factory=dict)  # of `verify`
    drafted: int | None = None
    tree: tuple[int, ...] | None = None  # parents; a draft of point masses gives a token a sibling
    support: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # the draft's known tokens
    tail: bool = False  # it sampled from the others too
    known: dict[tuple[int, ...], Row] = field(default_factory=dict)  # p of a prefix

    def warpers(self, prefix: str = "") -> dict[str, Any]:
        own = {name: self.options.get(name) for name in WARPERS}
        if prefix:
            own = {n: self.options.get(prefix + n, value) for n, value in own.items()}
        return {name: value for name, value in own.items() if value is not None}

    def p(self, prefix: tuple[int, ...]) -> Row:
        if prefix not in self.known:
            self.known[prefix] = self._p(prefix)
        return self.known[prefix]

    def _p(self, prefix: tuple[int, ...]) -> Row:
        bias = self.options.get("logit_bias")
        row = self.target(prefix)
        if bias is not None:
            row = [x + b for x, b in zip(row, bias.tolist(), strict=True)]
        return by_hand(row, **self.warpers())

    def q(self, prefix: tuple[int, ...]) -> Row:
        row = self.draft(prefix)
        if isinstance(row, int):
            return [float(i == row) for i in range(self.vocab)]
        if self.support is None or self.tail:
            return by_hand(row, **self.warpers("draft_"))
        known = by_hand(self.drafted_row(prefix), **self.warpers("draft_"))
        q = dict(zip(self.support(prefix), known, strict=True))
        return [q.get(token, 0.0) for token in range(self.vocab)]

    def drafted_row(self, prefix: tuple[int, ...]) -> Row:
        """The draft's logits as `verify` is given them."""
        row = self.draft(prefix)
        return row if self.support is None else [row[token] for token in self.support(prefix)]


@dataclass
class Law:
    tokens: Tensor  # [V, ..., V], K + 1 times
    truth: Tensor
    accepted: Tensor  # [K + 1], of the number of accepted tokens
    first_bias: float | None  # what is reported at offset 0

    @property
    def error(self) -> float:
        return float((self.tokens - self.truth).abs().max())

    @property
    def mean(self) -> float:
        return float((self.accepted * torch.arange(len(self.accepted))).sum())

    def first_distance(self) -> float:
        """Total variation between the law of the first token and the target's."""
        rest = tuple(range(1, self.tokens.ndim))
        return float((self.tokens - self.truth).sum(rest).abs().sum() / 2)


def law(world: World, rule: reference.Rule) -> Law:
    if world.tree is not None:
        return _tree_law(world, world.tree, rule)
    v, k = world.vocab, world.slots
    sequences = list(itertools.product(range(v), repeat=k))
    drafted = k if world.drafted is None else world.drafted
    odds = [math.prod(world.q(s[:i])[s[i]] for i in range(drafted)) for s in sequences]
    # Slots behind the drafted ones hold anything: once is enough.
    odds = [0.0 if any(s[drafted:]) else o for o, s in zip(odds, sequences, strict=True)]
    kept = [(s, o) for s, o in zip(sequences, odds, strict=True) if o > 0]
    sequences, odds = [s for s, _ in kept], [o for _, o in kept]
    inputs = _inputs(world, sequences, rule)
    d = reference.distributions(inputs)
    length, _ = reference.usable(inputs, d)
    tests = reference.slot_tests(d, inputs.ids, length, rule)
    slot = torch.arange(k)
    passes = torch.where(slot < length[:, None], (tests.num / tests.den).clamp(0, 1), 0)
    fails = 1 - passes
    tokens = torch.zeros((v,) * (k + 1), dtype=torch.float64)
    accepted = torch.zeros(k + 1, dtype=torch.float64)
    for n in range(k + 1):
        if reference.METHODS[rule.method] == "block":  # the last slot that passes
            chance = fails[:, n:].prod(-1) * (passes[:, n - 1] if n else 1)
        else:  # up to the first that fails
            chance = passes[:, :n].prod(-1) * (fails[:, n] if n < k else 1)
        count = torch.full_like(length, n)
        weights = reference.final_weights(d, tests, count, length, rule)
        chance = chance * torch.tensor(odds, dtype=torch.float64)
        accepted[n] += chance.sum()
        y = weights / weights.sum(-1, keepdim=True)
        for s, each, row in zip(sequences, chance.tolist(), y.tolist(), strict=True):
            for token in range(v):
                if each * row[token] > 0:
                    _complete(world, tokens, (*s[:n], token), each * row[token])
    truth = torch.zeros_like(tokens)
    _complete(world, truth, (), 1.0)
    first = float(tests.bias[0, 0]) if k else None
    return Law(tokens, truth, accepted, first)


Drafted = list[tuple[tuple[int, ...], float]]


def _drawn(world: World, tree: tuple[int, ...], count: int) -> Drafted:
    """The tokens of every tree that may be drafted, and its chance: siblings are drawn without
    replacement. Nodes from `count` on hold 0."""
    out: Drafted = [((), 1.0)]
    for i, parent in enumerate(tree):
        grown: Drafted = []
        for tokens, chance in out:
            before = [tokens[j] for j in range(i) if tree[j] == parent]
            row = world.draft(prefix_of(tokens, tree, parent))
            if i >= count:
                grown.append(((*tokens, 0), chance))
            elif isinstance(row, tuple):
                grown.append(((*tokens, row[len(before)]), chance))
            else:
                q = world.q(prefix_of(tokens, tree, parent))
                left = math.fsum(m for t, m in enumerate(q) if t not in before)
                for token, m in enumerate(q):
                    if m > 0 and token not in before:
                        grown.append(((*tokens, token), chance * m / left))
        out = grown
    return out


def prefix_of(tokens: tuple[int, ...], tree: tuple[int, ...], node: int) -> tuple[int, ...]:
    """The tokens up to a node, -1 being the root."""
    path: tuple[int, ...] = ()
    while node >= 0:
        path, node = (tokens[node], *path), tree[node]
    return path


def _tree_law(world: World, tree: tuple[int, ...], rule: reference.Rule) -> Law:
    drafted = len(tree) if world.drafted is None else world.drafted
    drawn = _drawn(world, tree, drafted)
    sequences, odds = [s for s, _ in drawn], [o for _, o in drawn]
    inputs = _inputs(world, sequences, rule)
    tests = reference.tree_tests(inputs, reference.distributions(inputs), rule)
    depth = max(len(prefix_of(sequences[0], tree, i)) for i in range(-1, len(tree)))
    tokens = torch.zeros((world.vocab,) * (depth + 1), dtype=torch.float64)
    accepted = torch.zeros(depth + 1, dtype=torch.float64)
    ends: dict[tuple[int, ...], Tensor] = {}
    for passes, chance in _coins(tests):
        end = reference.tree_walk(inputs, tests, passes, rule).end
        weights = tests.left[torch.arange(len(end)), end]
        mass = (chance * torch.tensor(odds, dtype=torch.float64))[:, None] * weights
        mass = mass / weights.sum(-1, keepdim=True)
        for s, node, row in zip(sequences, (end - 1).tolist(), mass, strict=True):
            path = prefix_of(s, tree, node)
            accepted[len(path)] += row.sum()
            ends[path] = ends.get(path, 0) + row
    for path, row in ends.items():
        for token, mass in enumerate(row.tolist()):
            if mass > 0:
                _complete(world, tokens, (*path, token), mass)
    truth = torch.zeros_like(tokens)
    _complete(world, truth, (), 1.0)
    return Law(tokens, truth, accepted, 0.0)


def _coins(tests: reference.TreeTests) -> Iterator[tuple[Tensor, Tensor]]:
    """Every outcome of the coins: what passes `[B, K]` and its chance `[B]`. Nodes that share a
    coin have bounds that rise: those from some node on pass."""
    batch, nodes = tests.num.shape
    bounds = torch.where(tests.usable, (tests.num / tests.den).clamp(0, 1), 0)
    slots = tests.slot[0].tolist()
    groups = [[i for i in range(nodes) if slots[i] == slot] for slot in sorted(set(slots))]
    for firsts in itertools.product(*(range(len(group) + 1) for group in groups)):
        passes = torch.zeros(batch, nodes, dtype=torch.bool)
        chance = torch.ones(batch, dtype=torch.float64)
        for group, first in zip(groups, firsts, strict=True):
            rising = bounds[:, group].cummax(-1).values
            edges = torch.cat([torch.zeros(batch, 1), rising, torch.ones(batch, 1)], 1)
            passes[:, group[first:]] = True
            chance = chance * (edges[:, first + 1] - edges[:, first])
        yield passes & tests.usable, chance


def _complete(world: World, table: Tensor, prefix: tuple[int, ...], mass: float) -> None:
    """Adds the mass of a prefix, continued by the target, to the table."""
    if len(prefix) == table.ndim:
        table[prefix] += mass
        return
    for token, p in enumerate(world.p(prefix)):
        if p > 0:
            _complete(world, table, (*prefix, token), mass * p)


def _inputs(
    world: World, sequences: list[tuple[int, ...]], rule: reference.Rule
) -> reference.Inputs:
    k, v = world.slots, world.vocab
    chain = tuple(range(-1, k - 1))
    tree = chain if world.tree is None else world.tree
    places = [[prefix_of(s, tree, i) for i in range(-1, k)] for s in sequences]
    target = torch.tensor([[world.target(p) for p in row] for row in places], dtype=torch.float64)
    target_only = reference.METHODS[rule.method] == "tree_target_only"
    pointed = target_only or isinstance(world.draft(()), (int, tuple))
    draft = None if pointed else torch.tensor(
        [[world.drafted_row(p) for p in row[:-1]] for row in places], dtype=torch.float64
    ).reshape(len(sequences), k, v if world.support is None else -1)  # fmt: skip
    support = None if world.support is None or pointed else torch.tensor(
        [[world.support(p) for p in row[:-1]] for row in places]
    )  # fmt: skip
    ids = torch.tensor(sequences, dtype=torch.int64).reshape(len(sequences), k)
    options = world.options
    call = _verify_call.prepare(
        "verify", target, draft, ids, rule, "reference",
        draft_topk_ids=support,
        tree=None if world.tree is None else torch.tensor(world.tree, dtype=torch.int32),
        num_drafted=world.drafted,
        warpers=tuple(options.get(n) for n in WARPERS),
        drafts=tuple(options.get("draft_" + n) for n in WARPERS),
        logit_bias=options.get("logit_bias"), seed=0, position=0,
    )  # fmt: skip
    return call.inputs
