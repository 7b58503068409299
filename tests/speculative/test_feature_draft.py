"""Drafts on the target's hidden states: they propose by the text's true states, whatever was
accepted before, and learn the steps that they will be asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import llama, prompts

pytest.importorskip("transformers", reason="models need the extra `hf`")

import pydistill
from pydistill.speculative import feature, load_draft, truncated
from pydistill.speculative.decoding import Decoder
from pydistill.speculative.draft_length import Costs, DraftLength
from pydistill.speculative.drafts import FeatureModelDraft, Request
from pydistill.speculative.settings import read

WORDS = [3, 60, 7, 20, 21, 22, 41, 5, 9, 33]
FORMS = (
    {}, {"layers": 2, "draft_vocab": WORDS}, {"width": 16}, {"width": 24, "draft_vocab": 30},
    {"stem": 2, "draft_vocab": WORDS},
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Any:
    return llama()


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    return feature(target, 2)


@torch.no_grad()
def unrolled(target: Any, draft: Any, text: Tensor, steps: int) -> list[Tensor]:
    """The logits of each step at every position of one text `[n]`, without any cache."""
    states = target.model(input_ids=text[None]).last_hidden_state
    features = torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
    seen = torch.ones(1, len(text), len(text), dtype=torch.bool).tril()
    found = draft.unroll(text[None], features, seen, torch.arange(len(text))[None], steps)
    return [draft.logits(x)[0] for x in found]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_greedy_text_is_that_of_the_target(target: Any, form: dict[str, Any]) -> None:
    ids, mask = prompts()
    settings = {"max_new_tokens": 24, "do_sample": False}
    want = target.generate(input_ids=ids, attention_mask=mask, **settings)[:, 9:]
    draft = feature(target, **form)
    for drafted in (4,) if form else (1, 4, "auto"):
        found = pydistill.generate(
            target, draft, ids, attention_mask=mask, num_draft_tokens=drafted, **settings
        )
        assert torch.equal(found.tokens, want)


def test_a_batch_is_its_requests_seed_for_seed(target: Any, draft: Any) -> None:
    ids, mask = prompts()
    seeds = [11, 2**62, -7]
    settings = {
        "max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 20,
        "eos_token_id": list(range(1, 61, 8)), "num_draft_tokens": 3,
    }  # fmt: skip
    many = pydistill.generate(target, draft, ids, attention_mask=mask, seed=seeds, **settings)
    assert many.stats.accepted > 0
    assert len(set(many.num_tokens.tolist())) > 1
    for row, seed in enumerate(seeds):
        prompt = ids[row : row + 1, 9 - int(mask[row].sum()) :]
        one = pydistill.generate(target, draft, prompt, seed=[seed], **settings)
        assert torch.equal(many.tokens[row, : int(one.num_tokens)], one.tokens[0])


@pytest.mark.parametrize(
    "form", [{"layers": 2}, {"width": 16, "draft_vocab": WORDS}, {"stem": 1}], ids=str
)
def test_proposals_are_those_of_training(target: Any, form: dict[str, Any]) -> None:
    """After blocks of unequal acceptance, and plain ones between: the rows that a batch drafts from
    are step by step those of `unroll` on each text, which has no cache."""
    draft, (ids, mask) = feature(target, **form), prompts()
    chosen = read(target, 9, None, {"max_new_tokens": 60, "do_sample": True}, None, None, None)
    texts = [row[shown.bool()].tolist() for row, shown in zip(ids, mask, strict=True)]
    requests = [Request(i, x, len(x), i, []) for i, x in enumerate(texts)]
    source: Any = FeatureModelDraft(draft, 3, chosen.warpers, 61)
    run = Decoder(
        target, source, requests, chosen, "token", DraftLength(Costs(), 3, 8, chosen.max_new_tokens)
    )
    compared, proposed, propose = 0, [], source.propose
    source.propose = lambda *given: proposed.append(propose(*given)) or proposed[-1]
    with torch.inference_mode():
        for block in range(9):
            run.length.wanted = 0 if block in (4, 5) else 3
            before = [list(x.tokens) for x in run.active]
            run._block()
            if block in (0, 4, 5):  # nothing proposed: the target had not read the prompt, or plain
                continue
            for row, tokens in enumerate(before):
                text = torch.tensor([*tokens, *proposed[-1].ids[row].tolist()])
                steps = unrolled(target, draft, text, 3)
                for slot in range(3):
                    torch.testing.assert_close(
                        proposed[-1].logits[row, slot], steps[slot][len(tokens) - 1 + slot],
                        rtol=1e-3, atol=2e-4,
                    )  # fmt: skip
                    compared += 1
    assert compared == 54 and proposed[0].ids.shape == (3, 0)
    assert len({len(x.tokens) - x.prompt for x in run.requests}) > 1  # unequal acceptance


def test_states_are_rolled_back_with_the_cache(target: Any, draft: Any) -> None:
    from pydistill.speculative.cached_model import CachedModel

    cached = CachedModel(target, 3, keep_states=True)
    texts = torch.randint(1, 61, (3, 9))
    with torch.inference_mode():
        cached.extend(texts, [9, 9, 9], 1)
        cached.rollback([9, 4, 6])
        cached.extend(texts[:, :2], [2, 2, 2], 1)
        cached.select([1, 2])
        cached.rollback([5, 8])
        found = cached.states(10)
        for row, (first, kept) in enumerate([(texts[1, :4], 5), (texts[2, :6], 8)]):
            text = torch.cat([first, texts[row + 1, :2]])[:kept]
            want = target.model(input_ids=text[None]).last_hidden_state[0]
            torch.testing.assert_close(found[row, -kept:], want, rtol=1e-4, atol=1e-5)
            assert not found[row, :-kept].any()


def test_unrolled_steps_have_gradients_of_each_other(target: Any, draft: Any) -> None:
    """The second step's loss reaches the weights by the first step's states: its gradient is that
    of central differences."""
    torch.manual_seed(0)
    ids, features = torch.randint(1, 61, (2, 6)), torch.randn(2, 6, 32)
    draft = feature(target, 1).requires_grad_(True)
    seen, places = torch.ones(2, 6, 6, dtype=torch.bool).tril(), torch.arange(6).expand(2, 6)

    def value() -> Tensor:
        return draft.unroll(ids, features, seen, places, 3)[2].square().mean()

    (grad,) = torch.autograd.grad(value(), draft.fc.weight)
    direction = torch.randn_like(grad)
    with torch.no_grad():
        draft.fc.weight += 1e-2 * direction
        high = value()
        draft.fc.weight -= 2e-2 * direction
        low = value()
        draft.fc.weight += 1e-2 * direction
    torch.testing.assert_close((grad * direction).sum(), (high - low) / 2e-2, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize(
    "form", [{"layers": 2}, {"layers": 1, "stem": 2}, {"layers": 2, "stem": 1}]
)
def test_states_are_those_of_the_formula(target: Any, form: dict[str, int]) -> None:
    """N(layers(W [f; s])), by the target's own first and last layers."""
    draft, (ids, mask) = feature(target, **form), prompts()
    torch.nn.init.normal_(draft.fc.weight, std=0.2)
    last = truncated(target, list(range(3 - form["layers"], 3)))
    features = torch.randn(3, 9, 32)
    given = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        below = target.model(**given).hidden_states[form.get("stem", 0)]
        inside = draft.fc(torch.cat([features, below], -1))
        want = last.model(inputs_embeds=inside, attention_mask=mask).last_hidden_state
        found = draft.states(ids, features, mask)
    here = mask.bool()
    torch.testing.assert_close(found[here], want[here], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_saved_and_loaded(target: Any, tmp_path: Path, form: dict[str, Any]) -> None:
    draft = feature(target, **form)
    draft.save_pretrained(tmp_path)
    found = load_draft(tmp_path, torch.float32, target)
    ids, features = prompts()[0], torch.randn(3, 9, 32)
    with torch.no_grad():
        assert torch.equal(found(ids, features).logits, draft(ids, features).logits)
    with pytest.raises(ValueError, match=r"reads a target's states; pass target="):
        load_draft(tmp_path, torch.float32)
    with pytest.raises(ValueError, match=r"hidden states of 32 numbers, the target has 16"):
        load_draft(tmp_path, torch.float32, llama(hidden_size=16))


def test_the_target_is_shared_and_not_trained(target: Any) -> None:
    draft = feature(target, draft_vocab=WORDS)
    ours, theirs = ({id(x) for x in m.parameters()} for m in (draft, target))
    assert not ours & theirs
    assert draft.num_parameters() < 2 * 32 * 32 + 3 * 32 * 64 + 4 * 32 * 32 + 10 * 32 + 200
    with pytest.raises(ValueError, match=r"layers=4 is outside 1\.\.3"):
        feature(target, 4)
    with pytest.raises(ValueError, match=r"stem=3 is outside 0\.\.2, the layers that"):
        feature(target, 1, stem=3)
    with pytest.raises(ValueError, match=r"stem=1, the target's layers, .* drop width=16"):
        feature(target, 1, stem=1, width=16)
    with pytest.raises(ValueError, match=r"width=20 is not a multiple of 8"):
        feature(target, width=20)
    other = llama(hidden_size=16)
    with pytest.raises(ValueError, match="hidden states of 32 numbers, the target has 16"):
        pydistill.generate(other, draft, prompts()[0])


def test_the_law_is_the_targets() -> None:
    target = llama(2, vocabulary=12, initializer_range=0.15, pad_token_id=None)
    found = pydistill.certify(
        target, feature(target, draft_vocab=[1, 4, 5, 8, 11]), torch.tensor([[1, 2, 1, 2]]),
        num_draft_tokens=2, samples=1024, batch_size=512, top_k=4, temperature=0.9,
    )  # fmt: skip
    assert found.lossless, found.verdict
