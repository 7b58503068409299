"""`certify` calls right pairs lossless, and finds what is wrong with the others."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pydistill
from pydistill import certify, cli
from pydistill.reference import verify as reference
from pydistill.speculative import decoding, drafts, sample_tests, truncated
from tiny_models import llama
from verify_law import by_hand, rows

P, Q = rows(4, 7), rows(4, 1_000_003)


def at(temperature: float) -> Any:
    """What a draft at this temperature samples from."""
    return lambda prefix: by_hand(Q(prefix), temperature)


@pytest.mark.parametrize("method", ["token", "block"])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"num_draft_tokens": 0}, {"num_draft_tokens": 3, "temperature": 0.7, "top_p": 0.8},
        {"top_k": 3, "draft_top_k": 0, "min_p": 0.1}, {"temperature": 0.0},
        {"temperature": 0.0, "draft_temperature": 1.0},
        {"logit_bias": torch.tensor([0.5, -1.0, -math.inf, 2.0])},
        {"draft_temperature": 1.5, "sampled": at(1.5)},
    ],
)  # fmt: skip
def test_lossless_settings_are_proved(settings: dict[str, Any], method: str) -> None:
    for draft in (Q, lambda prefix: len(prefix) % 4):
        found = certify(P, draft, method=method, **settings)
        assert found.exact and found.lossless and found.error < 1e-14, found
        assert found.verdict.startswith("Lossless")


def test_the_law_is_that_of_the_rows() -> None:
    """By hand: where the drafted token is always accepted, the first law is the draft's."""
    found = certify(P, Q, num_draft_tokens=1, lenience=("ensemble", 0.0))
    pairs = zip(by_hand(P(())), by_hand(Q(())), strict=True)
    assert found.distance == pytest.approx(sum(abs(p - q) for p, q in pairs) / 2, abs=1e-12)
    one = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).log()
    half = certify(one, one.flip(0), num_draft_tokens=1, tv_budget=0.1)
    assert half.distance == pytest.approx(0.1, abs=1e-12) and not half.lossless


def test_a_draft_that_reports_another_temperature_is_disproved() -> None:
    for method in ("token", "block"):
        found = certify(P, Q, sampled=at(1.2), draft_temperature=1.0, method=method)
        assert not found.lossless and found.distance > 0.01
        assert "Not lossless" in found.verdict
    # Rounded probabilities are not another distribution.
    rounded = lambda prefix: torch.tensor(at(1.2)(prefix))
    assert certify(P, Q, sampled=rounded, draft_temperature=1.2).lossless


EXACT = {
    "residual dropped": ("final_weights", lambda d, t, n, *_: reference._row(d.p, n)),
    "coins too kind": (
        "slot_tests", lambda *args, right=reference.slot_tests: right(*args)._replace(
            num=right(*args).den
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_mutants_of_the_rule_are_disproved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, *EXACT[name])
    for method in ("token", "block"):
        found = certify(P, Q, method=method)
        assert not found.lossless and found.distance > 0.01


def drawn(p: Tensor, count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(p, count, replacement=True, generator=g)


def test_samples_of_another_engine() -> None:
    """Of a chain over 40 tokens: its own samples pass, those of another temperature do not, nor do
    tokens that the settings cut. The bound holds the distance that there is."""
    z = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3)).double()
    p, q = z.softmax(-1), (z / 1.25).softmax(-1)
    for law, lossless in ((p, True), (q, False)):
        found = certify(z, tokens=drawn(law, 12_000).reshape(6_000, 2))
        assert found.lossless is lossless and not found.exact
        assert len(found.positions) == 2 and found.samples == 6_000
        assert found.distance > float((law - p).abs().sum() / 2)
        assert found.distance < float((law - p).abs().sum() / 2) + 0.09
    cut = certify(z, tokens=drawn(p, 6_000).reshape(3_000, 2), top_k=5)
    assert not cut.lossless and cut.positions[0].impossible is not None
    assert "never emits" in cut.verdict
    ended = drawn(p, 6_000).reshape(3_000, 2)
    ended[::2, 1] = -1
    assert certify(z, tokens=ended).positions[1].samples < 1_500


def test_the_rate_of_false_alarms() -> None:
    """At a rate of 0.2, in 100 runs on cells of few samples."""
    z = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    draws = [drawn(z.softmax(-1), 150, seed=i)[:, None] for i in range(100)]
    alarms = sum(
        not certify(z, tokens=x, false_alarm=0.2, seed=i).lossless for i, x in enumerate(draws)
    )
    assert alarms <= 35  # of 100 with a chance of 0.2, 35 are exceeded once in 6,000


def test_chi_square_alone_disproves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample in a cell of 0.02 expected has a tiny p by chi-square, and is no proof."""
    p = torch.tensor([0.9998, 0.0002], dtype=torch.float64)
    tokens = torch.zeros(100, 1, dtype=torch.int64)
    tokens[0] = 1
    found = certify(p.log(), tokens=tokens)
    assert found.p_value < 1e-8 and found.lossless


transformers = pytest.importorskip("transformers", reason="models need the extra `hf`")
PROMPT = torch.tensor([[1, 2, 1, 2, 1]])
FEW = {"num_draft_tokens": 2, "new_tokens": 3, "samples": 3072, "batch_size": 1024, "top_k": 0}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    target = llama(2, vocabulary=8, initializer_range=0.2, pad_token_id=None)
    return target, truncated(target, 1)


@pytest.mark.parametrize("method", ["token", "block"])
def test_models_pass(pair: tuple[Any, Any], method: str) -> None:
    done: list[int] = []
    found = certify(*pair, PROMPT, method=method, temperature=1.3, progress=done.append, **FEW)
    assert found.lossless and found.distance < 0.2, found
    assert done == [1024, 2048, 3072]
    assert [x.position for x in found.positions] == [0, 1, 2]
    assert "No loss found" in found.verdict


def test_greedy_models_and_ends(pair: tuple[Any, Any]) -> None:
    few = {**FEW, "samples": 100, "new_tokens": 4}
    found = certify(*pair, PROMPT, do_sample=False, **few)
    assert found.lossless and found.positions[3].samples == 100
    assert certify(pair[0], "ngram", PROMPT, eos_token_id=[1, 2, 3], **FEW).lossless


def _another_temperature(patch: pytest.MonkeyPatch) -> None:
    right = drafts.ModelDraft.propose

    def wrong(self: Any, *args: Any) -> drafts.Proposal:
        found = right(self, *args)
        assert found.logits is not None
        return found._replace(logits=found.logits / 2)

    patch.setattr(drafts.ModelDraft, "propose", wrong)


def _coins_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drafts, "_KEY", 0)
    patch.setattr(drafts, "_SLOTS", 1)


def _residual_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoding, "verify", functools.partial(pydistill.verify, impl="reference"))
    patch.setattr(reference, "final_weights", lambda d, t, n, *_: reference._row(d.p, n))


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [_another_temperature, _coins_shared, _residual_dropped])
def test_mutants_of_decoding_are_disproved(
    pair: tuple[Any, Any], mutate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    found = certify(*pair, PROMPT, **FEW)
    assert not found.lossless, found
    assert "chi-square" in found.verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": P}, "draft is None"),
        ({"target": P, "draft": Q, "num_draft_tokens": 12}, "num_draft_tokens of at most 9"),
        ({"target": P, "draft": Q, "num_draft_tokens": -1}, "num_draft_tokens=-1"),
        ({"target": P, "draft": Q, "method": "tree"}, "method='tree' is not enumerated"),
        ({"target": P, "draft": Q, "logit_bias": torch.zeros(3)}, "logit_bias has 3 tokens"),
        ({"target": P, "draft": Q, "top_q": 1}, "top_q is not one of"),
        ({"target": P, "draft": Q, "input_ids": PROMPT}, "input_ids is given"),
        ({"target": P, "draft": rows(5, 1)}, "rows of 5 tokens where 4"),
        ({"target": P, "draft": Q, "sampled": lambda x: [1.0, 1, 1, 1]}, "its sum is 4"),
        ({"target": lambda x: [math.nan] * 4, "draft": Q}, "without a softmax"),
        ({"target": P, "draft": lambda x: 9}, "draft gives 9"),
        ({"target": P, "tokens": torch.zeros(9, 2).long()}, r"shape \(9, 2\)"),
        ({"target": P, "tokens": torch.full((100, 2), 7)}, "tokens hold 7"),
        ({"target": P, "tokens": torch.full((100, 2), -1)}, "samples without a token"),
        ({"target": P, "tokens": torch.zeros(100, 2).long(), "draft": Q}, "tokens and draft"),
        ({"target": P, "tokens": torch.zeros(100, 2).long(), "false_alarm": 0}, "false_alarm=0"),
    ],
)
def test_what_cannot_be_certified_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        certify(**arguments)


def test_models_that_cannot_be_certified(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="one prompt without padding"):
        certify(*pair, PROMPT.expand(2, -1))
    with pytest.raises(TypeError, match="input_ids is NoneType"):
        certify(*pair)
    with pytest.raises(ValueError, match="samples=5 is too few"):
        certify(*pair, PROMPT, samples=5)


def test_the_command(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "certify",
        "hello",
        "--model",
        str(tiny),
        "--draft",
        "layers:2",
        "--samples",
        "256",
    ]
    arguments += ["--num-draft-tokens", "1", "--max-new-tokens", "2", "--top-k", "4"]
    assert cli.main(arguments) == 0
    assert "No loss found: 256 samples" in capsys.readouterr().out
    assert cli.main([*arguments, "--samples", "3"]) == 2
    assert "samples=3" in capsys.readouterr().err
    monkeypatch.setattr(sample_tests, "_never_reached", lambda *_: True)
    monkeypatch.setattr(sample_tests, "_pearson", lambda *_: torch.tensor(1e9))
    assert cli.main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["lossless"] is False and found["verdict"].startswith("Not lossless")
    assert found["positions"][0]["samples"] == 256
