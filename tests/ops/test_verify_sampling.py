"""`verify` generates the target's law: chi-square of the joint law of the first four tokens,
drafted and verified block after block, or tree after tree, by one rule for coins.

Target and draft are chains over three tokens, so four tokens have 81 outcomes. The tests together
have a false-alarm rate of 1e-4 (Bonferroni); N = 200,000 sequences, fewer on the reference, whose
law other tests enumerate.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import verify
from pydistill.reference import verify as reference
from verify_law import by_hand

OP = "verify"
pytestmark = pytest.mark.slow
VOCAB, TOKENS, N, FEWER = 3, 4, 200_000, 50_000
WORLDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warped": {"temperature": 0.8, "top_p": 0.9, "draft_temperature": 1.5, "draft_top_p": 1.0},
    "one-hot": {"one_hot": True},
}
TESTS = 60  # more than there are; what 1e-4 is divided by


def tables(world: str) -> tuple[Tensor, Tensor]:
    """Logits [V + 1, V] after each token, the last row for the first; of target and draft."""
    g = torch.Generator().manual_seed(sorted(WORLDS).index(world))
    return 1.2 * torch.randn(VOCAB + 1, VOCAB, generator=g), torch.randn(
        VOCAB + 1, VOCAB, generator=g
    )


def warped(table: Tensor, options: dict[str, Any], prefix: str = "") -> Tensor:
    own = {n: options.get(prefix + n, options.get(n)) for n in ("temperature", "top_p")}
    own = {n: x for n, x in own.items() if x is not None}
    return torch.tensor([by_hand(row, **own) for row in table.tolist()], dtype=torch.float64)


CHAIN, TREE = (-1, 0, 1), (-1, -1, 0, 0, 2)
METHODS = {"token": CHAIN, "block": CHAIN, **dict.fromkeys(reference.TREES, TREE)}


def drafted(q: Tensor, before: list[Tensor], coin: Tensor, one_hot: bool) -> Tensor:
    """A token of each row of q `[N, V]`, none that an earlier sibling has."""
    for tokens in before:
        q = q.scatter(1, tokens[:, None], 0.0)
    if one_hot:
        return q.argmax(-1)
    return reference.sampled(q, coin)


def generate(
    world: str, method: str, impl: str, sequences: int | None = None, **reported: Any
) -> Tensor:
    """Counts [V, V, V, V] of the first four tokens of so many sequences. `reported` is what the
    verifier is told in place of how the draft sampled."""
    if sequences is None:
        sequences = FEWER if impl == "reference" else N
    options = {n: x for n, x in WORLDS[world].items() if n != "one_hot"}
    one_hot = WORLDS[world].get("one_hot", False)
    target, draft = tables(world)
    q = warped(draft, options, "draft_")
    parents = METHODS[method]
    nodes = len(parents)
    if method in reference.TREES:
        options["tree"] = torch.tensor(parents, dtype=torch.int32)
    seed, slot = torch.arange(sequences), torch.arange(TOKENS + nodes + 1)
    tokens = torch.full((sequences, TOKENS + nodes + 1), VOCAB)
    count = torch.zeros(sequences, dtype=torch.int64)
    while int(count.min()) < TOKENS:
        open_ = count < TOKENS
        last = torch.where(
            count > 0, tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0], VOCAB
        )
        after = [last[open_]]  # of each row, what its tokens follow
        for i, parent in enumerate(parents):
            u = reference.coins(seed[open_], count[open_], torch.tensor(i), reference.DRAFT)
            siblings = [after[j + 1] for j in range(i) if parents[j] == parent]
            after.append(drafted(q[after[parent + 1]], siblings, u, one_hot))
        contexts, ids = torch.stack(after, 1), torch.stack(after[1:], 1)
        rows = None if one_hot or method == "tree_target_only" else draft[contexts[:, :-1]]
        found = verify(
            target[contexts], rows, ids, method=method, seed=seed[open_], position=count[open_],
            impl=impl, **{**options, **reported},
        )  # fmt: skip
        emitted = found.num_accepted + 1
        place = count[open_][:, None] + slot[: nodes + 1]
        kept = tokens[open_].scatter(1, place.clamp(max=tokens.shape[1] - 1), found.tokens)
        tokens[open_] = torch.where(
            slot < (count[open_] + emitted)[:, None], torch.where(
                slot < count[open_][:, None], tokens[open_], kept
            ), VOCAB,
        )  # fmt: skip
        count[open_] += emitted
    first = tokens[:, :TOKENS]
    index = (first * VOCAB ** torch.arange(TOKENS - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=VOCAB**TOKENS).reshape([VOCAB] * TOKENS)


def law(world: str) -> Tensor:
    p = warped(tables(world)[0], WORLDS[world])
    joint = p[VOCAB]
    for _ in range(TOKENS - 1):
        joint = joint[..., None] * p[:VOCAB].reshape([1] * (joint.ndim - 1) + [VOCAB, VOCAB])
    return joint


def chance(counts: Tensor, law: Tensor) -> float:
    """The p-value of Pearson's chi-square; 0 for an outcome that cannot be. Outcomes expected fewer
    than five times are taken together."""
    expected = (law * counts.sum()).flatten()
    seen = counts.flatten().double()
    if bool(((expected == 0) & (seen > 0)).any()):
        return 0.0
    rare = (expected < 5) & (expected > 0)
    common = expected >= 5
    if bool(rare.any()):
        expected = torch.cat([expected[common], expected[rare].sum()[None]])
        seen = torch.cat([seen[common], seen[rare].sum()[None]])
    else:
        expected, seen = expected[common], seen[common]
    square = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, square / 2))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", METHODS)
def test_joint_law(method: str, world: str, impl: str) -> None:
    assert chance(generate(world, method, impl), law(world)) > 1e-4 / TESTS


@functools.cache
def of_reference(method: str, sequences: int) -> Tensor:
    return generate("plain", method, "reference", sequences)


@pytest.mark.parametrize("method", ["block", "tree", "traversal"])
def test_the_same_tokens_on_every_instruction_set(method: str, each_cpu: str) -> None:
    """Whose law is then that of the reference."""
    few = 20_000
    assert torch.equal(generate("plain", method, each_cpu, few), of_reference(method, few))


def test_the_test_knows_the_law() -> None:
    exact = law("warped")
    assert float(exact.sum()) == pytest.approx(1, abs=1e-12)
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(exact.flatten(), N, replacement=True, generator=g)
    counts = torch.bincount(drawn, minlength=exact.numel()).reshape(exact.shape)
    assert chance(counts, exact) > 1e-3
    assert chance(counts, law("plain")) < 1e-10


def absolute(right: Callable[..., Tensor], streams: tuple[int, ...]) -> Callable[..., Tensor]:
    """Coins of the absolute position of a token."""

    def coins(seed: Tensor, position: Tensor, slot: Tensor, stream: int) -> Tensor:
        if stream in streams:
            return right(seed, position + slot, slot * 0, stream)
        return right(seed, position, slot, stream)

    return coins


MUTANTS: dict[str, tuple[int, ...]] = {
    "accept": (reference.ACCEPT,), "accept and draft": (reference.ACCEPT, reference.DRAFT),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("method", ["block", "traversal"])
def test_absolute_coins_bias(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tree a node's index stands for its depth in the mutant."""
    monkeypatch.setattr(reference, "coins", absolute(reference.coins, MUTANTS[name]))
    counts = generate("plain", method, "reference", sequences=N)  # the bias is small
    assert chance(counts, law("plain")) < 1e-4 / TESTS


def test_coins_shared_by_draft_and_verifier_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.coins
    one = lambda seed, position, slot, stream: right(seed, position, slot, 0)
    monkeypatch.setattr(reference, "coins", one)
    assert chance(generate("plain", "token", "reference"), law("plain")) < 1e-4 / TESTS


def test_residual_dropped_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = lambda d, t, n, *rest: reference._row(d.p, n)
    monkeypatch.setattr(reference, "final_weights", dropped)
    for method in ("token", "block"):
        assert chance(generate("plain", method, "reference"), law("plain")) < 1e-4 / TESTS


def test_an_unchanged_p_between_siblings_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.after_rejection
    wrong = lambda p, q, ratio: (p, right(p, q, ratio)[1])
    monkeypatch.setattr(reference, "after_rejection", wrong)
    for method in ("tree", "traversal"):
        assert chance(generate("plain", method, "reference"), law("plain")) < 1e-4 / TESTS


@pytest.mark.parametrize("method", ["tree", "traversal"])
def test_siblings_drawn_independently(
    method: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also lossless: of those with one token, the first counts."""
    monkeypatch.setitem(globals(), "drafted", lambda q, before, u, one: reference.sampled(q, u))
    assert chance(generate("plain", method, impl), law("plain")) > 1e-4 / TESTS


def test_a_draft_that_reports_another_temperature_is_seen() -> None:
    counts = generate("warped", "token", "reference", draft_temperature=1.0)
    assert chance(counts, law("warped")) < 1e-4 / TESTS
