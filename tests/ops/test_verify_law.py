"""`verify` is lossless, or as lossy as it says: the law of its tokens, enumerated exactly."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill.ops._verify_call import rule_of
from pydistill.reference import verify as reference
from verify_law import Law, World, law, rows, support_of

OP = "verify"
Patch = Callable[[pytest.MonkeyPatch], None]
LOSSLESS = ("token", "block")


def world(vocab: int, slots: int, target: str = "", draft: str = "", drafted: int | None = None,
          support: int = 0, tail: bool = False, **options: Any) -> World:  # fmt: skip
    p = rows(vocab, 7, pattern=target)
    q: Any = p if draft == "same" else rows(vocab, 1_000_003, pattern=draft)
    if draft == "greedy":
        q = lambda prefix: len(prefix) % vocab
    few = support_of(vocab, support)
    return World(vocab, slots, p, q, options, drafted, support=few, tail=tail)


WORLDS: dict[str, Callable[[], World]] = {
    "plain-3-3": lambda: world(3, 3),
    "plain-4-3": lambda: world(4, 3),
    "plain-5-3": lambda: world(5, 3),
    "plain-8-2": lambda: world(8, 2),
    "plain-8-3": lambda: world(8, 3),
    "one slot": lambda: world(6, 1),
    "no slots": lambda: world(6, 0),
    "none drafted": lambda: world(4, 3, drafted=0),
    "one drafted": lambda: world(4, 3, drafted=1),
    "two drafted": lambda: world(4, 3, drafted=2),
    "same": lambda: world(4, 3, draft="same"),
    "ties": lambda: world(5, 3, target="ties", draft="ties", top_k=2),
    "ties in top-p": lambda: world(5, 3, target="ties", draft="ties", top_p=0.6),
    "infinite": lambda: world(5, 3, target="infinite", draft="infinite"),
    "disjoint": lambda: world(6, 2, target="low half", draft="high half"),
    "within": lambda: world(6, 2, draft="low half"),
    "around": lambda: world(6, 2, target="high half"),
    "point target": lambda: world(4, 3, target="point"),
    "point draft": lambda: world(4, 3, draft="point"),
    "two points": lambda: world(4, 2, target="point", draft="point"),
    "one-hot": lambda: world(5, 3, draft="greedy"),
    "one-hot with top-p": lambda: world(5, 3, draft="greedy", top_p=0.7),
    "greedy": lambda: world(4, 3, temperature=0.0, draft="greedy"),
    "greedy, sampled draft": lambda: world(4, 2, temperature=0.0, draft_temperature=1.0),
    "tempered": lambda: world(4, 3, temperature=0.6),
    "tempers apart": lambda: world(4, 3, temperature=1.4, draft_temperature=0.7),
    "top-k": lambda: world(5, 3, top_k=3),
    "top-p": lambda: world(5, 3, top_p=0.8),
    "min-p": lambda: world(5, 3, min_p=0.3),
    "all": lambda: world(6, 2, temperature=1.3, top_k=5, top_p=0.9, min_p=0.1),
    "target alone": lambda: world(5, 3, top_k=3, top_p=0.8, draft_top_k=0, draft_top_p=1.0),
    "draft alone": lambda: world(5, 3, draft_top_k=2, draft_min_p=0.2),
    "support": lambda: world(5, 3, support=3),
    "tail": lambda: world(5, 3, support=3, tail=True),
    "tail of nearly all": lambda: world(4, 3, support=1, tail=True, temperature=0.7),
    "support of one": lambda: world(4, 3, support=1),
    "support with warpers": lambda: world(6, 2, support=4, temperature=0.8, top_k=3, top_p=0.9),
    "bias": lambda: world(4, 3, logit_bias=torch.tensor([0.5, -1.0, -math.inf, 2.0]).double()),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("method", LOSSLESS)
def test_lossless(method: str, name: str) -> None:
    found = law(WORLDS[name](), rule_of(method, None, None, None, None))
    assert found.error < 1e-12
    assert abs(float(found.accepted.sum()) - 1) < 1e-12


def two_thirds() -> World:
    p, q = [math.log(1 / 3), math.log(2 / 3)], [math.log(2 / 3), math.log(1 / 3)]
    return World(2, 2, lambda _: p, lambda _: q)


def test_expected_accepted_tokens() -> None:
    token, block = (law(two_thirds(), rule_of(m, None, None, None, None)) for m in LOSSLESS)
    assert token.mean == pytest.approx(10 / 9, abs=1e-12)
    assert block.mean == pytest.approx(11 / 9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in WORLDS if not name.startswith("plain-8")])
def test_block_accepts_no_less_than_token(name: str) -> None:
    token, block = (law(WORLDS[name](), rule_of(m, None, None, None, None)) for m in LOSSLESS)
    assert block.mean >= token.mean - 1e-12


LENIENT = {
    "linear": (("linear", 0.4), None), "barely": (("linear", 1.0), None),
    "square": (("square", 0.6), None), "exponential": (("exponential", 0.5), None),
    "always": (("exponential", 0.0 + 1e-9), None), "ensemble": (("ensemble", 0.7), None),
    "draft": (("ensemble", 0.0), None), "budget": (None, 0.1), "no budget": (None, 0.0),
    "any budget": (None, 1.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["plain-5-3", "one-hot", "top-p", "disjoint", "within", "same", "support"]
)
@pytest.mark.parametrize("form", LENIENT)
def test_reported_bias_is_the_distance_of_the_law(form: str, name: str) -> None:
    lenience, budget = LENIENT[form]
    found = law(WORLDS[name](), rule_of("token", None, lenience, budget, None))
    assert found.first_bias == pytest.approx(found.first_distance(), abs=1e-12)
    plain = law(WORLDS[name](), rule_of("token", None, None, None, None))
    assert found.mean >= plain.mean - 1e-12
    if budget is not None:
        missed = 1 - float(plain.accepted[1:].sum())
        assert found.first_distance() == pytest.approx(min(budget, missed), abs=1e-12)


@pytest.mark.parametrize(
    "name", ["plain-5-3", "one-hot", "top-p", "disjoint", "point target", "support"]
)
@pytest.mark.parametrize("typical", [None, (1.0, 1.0), (0.2, 0.5), (0.0, 0.0), (0.05, 1.0)])
def test_typical_reports_its_bias(typical: tuple[float, float] | None, name: str) -> None:
    found = law(WORLDS[name](), rule_of("typical", None, None, None, typical))
    assert found.first_bias == pytest.approx(found.first_distance(), abs=1e-12)


def _residual_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "final_weights", lambda d, t, n, length, rule: reference._row(d.p, n))


def _wrong_row(patch: pytest.MonkeyPatch) -> None:
    right = reference.final_weights

    def wrong(d: Any, tests: Any, n: Tensor, *rest: Any) -> Tensor:
        return right(d._replace(p=d.p.roll(1, 1)), tests, n, *rest)

    patch.setattr(reference, "final_weights", wrong)


def _residual_of_token(patch: pytest.MonkeyPatch) -> None:
    right = reference.final_weights

    def wrong(d: Any, tests: Any, *rest: Any) -> Tensor:
        return right(d, tests._replace(scale=torch.ones_like(tests.scale)), *rest)

    patch.setattr(reference, "final_weights", wrong)


def _odds(change: Callable[[Any], Any]) -> Patch:
    right = reference.slot_tests

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(reference, "slot_tests", lambda *args: change(right(*args)))

    return apply


def _filter_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = reference.warped
    off = torch.tensor([1.0, 0.0, 1.0, -math.inf], dtype=torch.float64)
    patch.setattr(reference, "warped", lambda x, w: right(x, off.expand_as(w)))


def _tokens_in_order(patch: pytest.MonkeyPatch) -> None:
    right = reference.dense

    def wrong(logits: Tensor, support: Tensor | None, vocab: int) -> Tensor:
        return right(logits, None if support is None else support.sort(-1).values, vocab)

    patch.setattr(reference, "dense", wrong)


MUTANTS: dict[str, tuple[str, str, Patch]] = {
    "tokens of a support mixed up": ("token", "support", _tokens_in_order),
    "tokens of a support mixed up in block": ("block", "support", _tokens_in_order),
    "residual dropped": ("token", "plain-4-3", _residual_dropped),
    "residual dropped in block": ("block", "plain-4-3", _residual_dropped),
    "wrong row": ("token", "plain-4-3", _wrong_row),
    "wrong row in block": ("block", "plain-4-3", _wrong_row),
    "residual of token in block": ("block", "plain-4-3", _residual_of_token),
    "odds swapped": ("token", "plain-4-3", _odds(lambda t: t._replace(num=t.den, den=t.num))),
    "always accepted": ("token", "one-hot", _odds(lambda t: t._replace(num=t.den))),
    "odds of block unbounded": (
        "block", "plain-4-3", _odds(lambda t: t._replace(den=(t.den - t.num).clamp(min=1e-9))),
    ),
    "warpers forgotten": ("token", "all", _filter_forgotten),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, where, mutate = MUTANTS[name]
    mutate(monkeypatch)
    found: Law = law(WORLDS[where](), rule_of(method, None, None, None, None))
    assert found.error > 1e-3
