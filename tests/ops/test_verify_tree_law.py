"""`verify` on trees is lossless: the law of its tokens, enumerated exactly."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill.ops._verify_call import rule_of
from pydistill.reference import verify as reference
from verify_law import World, law, rows, support_of

OP = "verify"
Patch = Callable[[pytest.MonkeyPatch], None]
TREES: dict[str, tuple[int, ...]] = {
    "node": (-1,), "chain": (-1, 0, 1), "pair": (-1, -1), "three": (-1, -1, -1),
    "two below": (-1, 0, 0), "levels": (-1, -1, 0, 0, 1), "by depth": (-1, 0, 0, -1, 3),
    "uneven": (-1, 0, 1, -1, 3), "late": (-1, 0, 1, 0, -1), "none": (),
}  # fmt: skip


def rule(method: str) -> reference.Rule:
    return rule_of(method, torch.zeros(0), None, None, None)


def world(vocab: int, tree: str, target: str = "", draft: str = "", drafted: int | None = None,
          support: int = 0, tail: bool = False, **options: Any) -> World:  # fmt: skip
    p = rows(vocab, 7, pattern=target)
    q: Any = p if draft == "same" else rows(vocab, 1_000_003, pattern=draft)
    if draft == "ranked":  # the draft's most likely tokens, best first
        scores = rows(vocab, 1_000_003)
        q = lambda prefix: tuple(torch.tensor(scores(prefix)).argsort(descending=True).tolist())
    if draft == "twice":  # a token twice
        q = lambda prefix: (0, 0, *range(1, vocab))
    few = support_of(vocab, support)
    return World(vocab, len(TREES[tree]), p, q, options, drafted, TREES[tree], few, tail)


WORLDS: dict[str, Callable[[], World]] = {
    **{tree: lambda tree=tree: world(3, tree) for tree in TREES},
    "pair of 8": lambda: world(8, "pair"),
    "three of 6": lambda: world(6, "three"),
    "two below of 5": lambda: world(5, "two below"),
    "levels of 4": lambda: world(4, "levels"),
    "none drafted": lambda: world(3, "levels", drafted=0),
    "three drafted": lambda: world(3, "levels", drafted=3),
    "same": lambda: world(4, "levels", draft="same"),
    "ties": lambda: world(4, "levels", target="ties", draft="ties", top_k=2, draft_top_k=0),
    "infinite": lambda: world(4, "two below", target="infinite", draft="infinite"),
    "exhausted": lambda: world(4, "three", draft="infinite"),
    "support": lambda: world(5, "levels", support=3),
    "tail": lambda: world(4, "levels", support=2, tail=True),
    "exhausted support": lambda: world(4, "three", support=3),
    "disjoint": lambda: world(6, "two below", target="low half", draft="high half"),
    "within": lambda: world(6, "three", draft="low half"),
    "around": lambda: world(6, "two below", target="high half"),
    "point target": lambda: world(4, "levels", target="point"),
    "ranked": lambda: world(4, "levels", draft="ranked"),
    "all ranked": lambda: world(3, "three", draft="ranked"),
    "ranked with top-p": lambda: world(4, "by depth", draft="ranked", top_p=0.7),
    "a token twice": lambda: world(4, "levels", draft="twice"),
    "greedy": lambda: world(4, "levels", temperature=0.0, draft="ranked"),
    "greedy, sampled draft": lambda: world(4, "levels", temperature=0.0, draft_temperature=1.0),
    "tempers apart": lambda: world(4, "by depth", temperature=1.4, draft_temperature=0.7),
    "top-k": lambda: world(4, "levels", top_k=3, draft_top_k=4),
    "top-p": lambda: world(4, "levels", top_p=0.8, draft_top_p=1.0),
    "min-p": lambda: world(4, "uneven", min_p=0.3, draft_min_p=0.01),
    "all": lambda: world(5, "two below", temperature=1.3, top_k=4, top_p=0.9, min_p=0.1),
    "bias": lambda: world(
        4, "late", logit_bias=torch.tensor([0.5, -1.0, -math.inf, 2.0]).double()
    ),
}  # fmt: skip
POINTED = ("ranked", "all ranked", "ranked with top-p", "a token twice", "greedy", "none")


@cache
def found(method: str, name: str) -> Any:
    return law(WORLDS[name](), rule(method))


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("method", reference.TREES)
def test_lossless(method: str, name: str) -> None:
    assert found(method, name).error < 1e-12
    assert abs(float(found(method, name).accepted.sum()) - 1) < 1e-12


@pytest.mark.parametrize("name", POINTED)
def test_target_only_accepts_what_coins_one_by_one_do(name: str) -> None:
    mine, others = found("tree_target_only", name), found("tree", name)
    torch.testing.assert_close(mine.accepted, others.accepted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WORLDS)
def test_traversal_accepts_no_less_than_tree(name: str) -> None:
    assert found("traversal", name).mean >= found("tree", name).mean - 1e-12


@pytest.mark.parametrize("name", ["chain", "node", "none"])
@pytest.mark.parametrize("pair", [("token", "tree"), ("block", "traversal")])
def test_a_chain_is_a_tree(pair: tuple[str, str], name: str) -> None:
    chain = WORLDS[name]()
    chain.tree = None
    want = law(chain, rule_of(pair[0], None, None, None, None))
    got = found(pair[1], name)
    torch.testing.assert_close(got.tokens, want.tokens, rtol=0, atol=1e-14)
    torch.testing.assert_close(got.accepted, want.accepted, rtol=0, atol=1e-14)


def test_expected_accepted_tokens_of_siblings() -> None:
    """Two of three tokens, by hand: p = (2, 3, 1)/6, q = (4, 1, 1)/6. The first of them is accepted
    with sum min(p, q) = 4/6 and leaves the second token alone: (0, 1, 0) against q without the
    rejected first, (0, 1, 1)/2, whose second is accepted, and third not."""
    p, q = ([math.log(x / 6) for x in row] for row in ((2, 3, 1), (4, 1, 1)))
    one = World(3, 2, lambda _: p, lambda _: q, {}, None, TREES["pair"])
    for method in ("tree", "traversal"):
        assert law(one, rule(method)).mean == pytest.approx(4 / 6 + 2 / 6 / 2, abs=1e-12)
    assert law(one, rule("tree_target_only")).mean == pytest.approx(
        sum(a * b * (c + d) for (a, c), (b, d) in (
            ((4 / 6, 2 / 6), (1 / 2, 3 / 6)), ((4 / 6, 2 / 6), (1 / 2, 1 / 6)),
            ((1 / 6, 3 / 6), (4 / 5, 2 / 6)), ((1 / 6, 3 / 6), (1 / 5, 1 / 6)),
            ((1 / 6, 1 / 6), (4 / 5, 2 / 6)), ((1 / 6, 1 / 6), (1 / 5, 3 / 6)),
        )), abs=1e-12,
    )  # fmt: skip


def _tests(change: Callable[[Any, Any], Any]) -> Patch:
    right = reference.tree_tests

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            reference, "tree_tests", lambda inputs, d, rule: change(right(inputs, d, rule), d)
        )

    return apply


def _rejection(change: Callable[..., Any]) -> Patch:
    right = reference.after_rejection

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(reference, "after_rejection", lambda p, q, ratio: change(right, p, q, ratio))

    return apply


def _q(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    return lambda patch: patch.setattr(reference, "without", change)


def _parents_first(patch: pytest.MonkeyPatch) -> None:
    right = reference.tree_walk

    def wrong(inputs: Any, tests: Any, passes: Tensor, rule: Any) -> Any:
        return right(inputs, tests, passes, rule._replace(method=reference.METHODS.index("tree")))

    patch.setattr(reference, "tree_walk", wrong)


def _last_sibling_first(patch: pytest.MonkeyPatch) -> None:
    """The walk of the mirrored tree."""
    right = reference.tree_tests

    def wrong(inputs: Any, d: Any, rule: Any) -> Any:
        mirrored = right(inputs._replace(ids=inputs.ids.flip(1)), d, rule)
        return mirrored._replace(num=mirrored.num.flip(1), den=mirrored.den.flip(1))

    patch.setattr(reference, "tree_tests", wrong)


def _residual_of_last(right: Callable[..., Any], p: Tensor, q: Tensor, ratio: Tensor) -> Any:
    return p, right(p, q, ratio)[1]


MUTANTS: dict[str, tuple[str, str, Patch]] = {
    "p unchanged between siblings": ("tree", "three", _rejection(_residual_of_last)),
    "residual dropped": ("tree", "pair", _tests(lambda t, d: t._replace(left=d.p))),
    "residual dropped at the end alone": (
        "traversal", "levels", _tests(lambda t, d: t._replace(left=d.p)),
    ),
    "residual of a wrong row": (
        "tree", "levels", _tests(lambda t, d: t._replace(left=t.left.roll(1, 1))),
    ),
    "with replacement": ("tree", "three of 6", _q(lambda q, x: q)),
    "with replacement in traversal": ("traversal", "three of 6", _q(lambda q, x: q)),
    "q not normalised": (
        "tree", "three of 6", _q(lambda q, x: q.scatter(-1, x[:, None], 0.0)),
    ),
    "siblings in the other order": ("tree", "pair of 8", _last_sibling_first),
    "odds swapped": ("tree", "pair", _tests(lambda t, d: t._replace(num=t.den, den=t.num))),
    "p unchanged in traversal": ("traversal", "three", _rejection(_residual_of_last)),
    "ratio unchanged": (
        "traversal", "levels",
        _rejection(lambda right, p, q, ratio: (right(p, q, ratio)[0], ratio)),
    ),
    "ratio of the mass alone": (
        "traversal", "levels",
        _rejection(lambda right, p, q, ratio: (
            right(p, q, ratio)[0], (ratio[:, None] * p - q).clamp(min=0).sum(-1)
        )),
    ),
    "residual of tree in traversal": (
        "traversal", "levels of 4",
        _rejection(lambda right, p, q, ratio: (
            right(p, q, torch.ones_like(ratio))[0], right(p, q, ratio)[1]
        )),
    ),
    "traversal from the root": ("traversal", "levels", _parents_first),
    "one child of the set": (
        "tree_target_only", "three",
        _tests(lambda t, d: t._replace(num=torch.minimum(t.num, t.num[:, :1]))),
    ),
    "the set not taken away": (
        "tree_target_only", "pair of 8", _tests(lambda t, d: t._replace(left=d.p)),
    ),
    "a coin for each child": (
        "tree_target_only", "three",
        _tests(lambda t, d: t._replace(slot=torch.arange(t.num.shape[1]).expand_as(t.num))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, where, mutate = MUTANTS[name]
    mutate(monkeypatch)
    assert law(WORLDS[where](), rule(method)).error > 1e-3
