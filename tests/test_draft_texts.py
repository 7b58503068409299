"""What a draft learns from: the target's answers and states as it wrote them, packed, and the rows
on a sub-vocabulary."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import llama

pytest.importorskip("transformers", reason="drafts need the extra `hf`")

from pydistill.recipes import draft_texts, draft_training
from pydistill.recipes.draft_texts import Reader, Texts, answers_of, pack, write
from pydistill.speculative import feature, reduced
from pydistill.speculative.draft_models import in_dtype

PROMPTS = [[3, 9, 4], [7, 7, 1, 30, 22, 8], [5], [12, 40]]


@pytest.fixture(scope="module")
def target() -> Any:
    return llama()


def written(target: Any, prompts: list[list[int]], seeds: list[int], **more: Any) -> Any:
    return write(target, prompts, seeds, 20, {"temperature": 0.8}, **more)


def test_answers_are_of_their_prompt_and_seed(target: Any) -> None:
    """In any batch, also where most of it has ended: tokens, states and log-normalisers, which are
    those of a run over the whole text."""
    ends = list(range(1, 61, 6))
    many = written(target, PROMPTS * 2, list(range(8)), ends=ends, keep_states=True)
    assert len({len(x.tokens) for x in many}) > 2
    assert [x.tokens for x in many[:4]] != [x.tokens for x in many[4:]]
    for i, prompt in enumerate(PROMPTS * 2):
        tokens = many[i].tokens
        assert written(target, [prompt], [i], ends=ends)[0].tokens == tokens
        assert (tokens[-1] in ends or len(tokens) == 20) and not set(tokens[:-1]) & set(ends)
        with torch.no_grad():
            text = torch.tensor([[*prompt, *tokens[:-1]]])
            want = target.model(input_ids=text).last_hidden_state[0]
            torch.testing.assert_close(many[i].states, want, rtol=1e-3, atol=1e-4)
            lse = (target(text).logits[0, len(prompt) - 1 :] / 0.8).logsumexp(-1)
        torch.testing.assert_close(torch.tensor(many[i].lse), lse, rtol=1e-3, atol=1e-4)


def test_a_reduced_draft_writes_its_tokens(target: Any) -> None:
    words = [2, 9, 33, 60]
    found = written(reduced(target, words), PROMPTS, [0, 1, 2, 3])
    assert {t for x in found for t in x.tokens} == set(words)


def answers(target: Any, **changes: Any) -> Texts:
    settings = {
        "answers": 2, "new_tokens": 6, "batch": 3, "seed": 1, "ends": [1, 2, 3, 4],
        "warpers": {"temperature": 1.0}, "keep_states": True,
    }  # fmt: skip
    return answers_of(target, PROMPTS, **{**settings, **changes})


def test_texts_are_in_the_order_of_the_prompts_and_teach_the_answers(target: Any) -> None:
    texts = answers(target)
    assert len(texts) == 8
    for i, document in enumerate(texts.lists()):
        prompt = PROMPTS[i // 2]
        assert document[: len(prompt)] == prompt
        begin, end = texts.begins[i : i + 2].tolist()
        taught = texts.taught[begin:end].tolist()
        assert taught == [False] * (len(prompt) - 1) + [True] * (len(document) - len(prompt)) + [
            False
        ]
    assert torch.equal(texts.tokens, answers(target, batch=8).tokens)
    chosen = texts[torch.tensor([5, 2])]
    assert chosen.lists() == [texts.lists()[5], texts.lists()[2]]
    assert chosen.states is not None and texts.states is not None
    assert torch.equal(chosen.states[: len(chosen.lists()[0])],
                       texts.states[texts.begins[5] : texts.begins[6]])  # fmt: skip


@pytest.mark.parametrize("width", [1, 20, 1000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_texts_do_not_see_each_other(target: Any, width: int, attention: str) -> None:
    texts, model = answers(target), llama(attn_implementation=attention)
    packed = pack(texts, width)
    assert sorted(packed.index[packed.index >= 0].tolist()) == list(range(len(texts.tokens)))
    assert (packed.ids.shape[0] == 1) == (width == 1000)
    reader = Reader(model, torch.float32)
    with torch.no_grad():
        found = reader.states(packed).flatten(0, 1)[packed.places(texts.taught)]
    assert texts.states is not None  # as they were written, one token at a time
    torch.testing.assert_close(found, texts.states[texts.taught], rtol=1e-3, atol=1e-4)
    again = packed.spread(texts.states).flatten(0, 1)[packed.places(texts.taught)]
    assert torch.equal(again, texts.states[texts.taught])


def test_recorded_states_are_those_of_a_run(target: Any) -> None:
    texts, reader = answers(target), Reader(target, torch.float32)

    class Bar:
        def update(self, count: int) -> None:
            pass

    found = draft_texts.with_states(reader, texts, 20, 1.0, Bar())
    assert found.states is not None and texts.states is not None and found.lse is not None
    taught = texts.taught
    torch.testing.assert_close(found.states[taught], texts.states[taught], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.lse[taught], texts.lse[taught], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_loss_of_a_reduced_head_is_that_of_rows_with_zeros(temperature: float) -> None:
    """tvd, jsd and -log A against the whole rows, of which the draft has 0 elsewhere."""
    torch.manual_seed(0)
    words, p = torch.tensor([2, 9, 10, 33, 40, 60]), torch.randn(7, 61)
    q = torch.randn(7, 6).requires_grad_()
    rest = draft_training.on_tokens(p, words, temperature, rest=True)
    lse = (p / temperature).logsumexp(-1)
    torch.testing.assert_close((rest / temperature).logsumexp(-1), lse, rtol=1e-6, atol=1e-6)
    wide = torch.full((7, 61), -math.inf).index_copy(1, words, q)
    for kind in ("tvd", "jsd", "acceptance"):
        padded = torch.nn.functional.pad(q, (0, 1), value=-math.inf)
        pair = []
        for value in (
            draft_training._mean(padded, rest, kind, temperature),
            draft_training._mean(wide, p, kind, temperature),
        ):
            (grad,) = torch.autograd.grad(value, q, retain_graph=True)
            pair.append((value.detach(), grad))
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-4, atol=1e-6)


def test_files_are_found_by_what_they_depend_on(target: Any, tmp_path: Path) -> None:
    texts = answers(target)
    path = draft_texts.kept(tmp_path / "new", {"seed": 1})
    assert draft_texts.load(path) is None
    draft_texts.store(path, [texts])
    (found,) = draft_texts.load(path) or []
    for name in ("tokens", "begins", "taught", "states", "lse"):
        assert torch.equal(getattr(found, name), getattr(texts, name))
    assert draft_texts.kept(tmp_path / "new", {"seed": 2}) != path
    path.write_bytes(b"half")
    assert draft_texts.load(path) is None
    other = llama(seed=1)
    assert draft_texts.fingerprint(other) != draft_texts.fingerprint(target)
    assert draft_texts.fingerprint(in_dtype(llama(), torch.float32)) == draft_texts.fingerprint(
        target
    )


@pytest.mark.parametrize("schedule", draft_training.SCHEDULES)
def test_rates_rise_and_fall(schedule: str) -> None:
    rates = [draft_training.rate(i, 100, schedule, 0.1) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) <= 1
    assert rates[:10] == sorted(rates[:10]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == 1 if schedule == "constant" else 0.09 < rates[-1] < 0.11


def batch(count: int) -> list[Tensor]:
    return [draft_training.batch_rows(10, count, number, seed=3) for number in range(5)]


def test_batches_take_every_row_once_an_epoch() -> None:
    found = torch.cat(batch(4))
    assert found[:10].sort().values.tolist() == list(range(10))
    assert found[10:].sort().values.tolist() == list(range(10))
    assert found[:10].tolist() != found[10:].tolist()
    assert len(draft_training.batch_rows(3, 8, 1, seed=0)) == 8


@pytest.mark.parametrize("stem", [0, 1])
def test_the_input_of_a_feature_draft_is_fitted(stem: int) -> None:
    """Here the state before the last layer is made a linear function of both, which is found."""
    model = llama(2 + stem)
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):  # the layer between adds nothing to what is below
            part = "self_attn" if name == "o_proj" else "mlp"
            getattr(getattr(model.model.layers[stem], part), name).weight.zero_()
    texts = answers_of(
        model, PROMPTS, answers=40, new_tokens=20, batch=40, seed=0, ends=[],
        warpers={"temperature": 1.0}, keep_states=True,
    )  # fmt: skip
    draft = feature(model, stem=stem)
    torch.nn.init.normal_(draft.fc.weight)
    draft_training.fit_input(draft, model, texts, 64)
    want = torch.cat([torch.zeros(32, 32), torch.eye(32)], -1)
    torch.testing.assert_close(draft.fc.weight.detach(), want, rtol=0, atol=0.05)
