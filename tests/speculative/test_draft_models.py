"""Drafts with a head over some of the tokens: the same law, and what they are made of."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import llama, prompts

pytest.importorskip("transformers", reason="models need the extra `hf`")

import pydistill
from pydistill.speculative import frequent_tokens, load_draft, reduced, truncated
from pydistill.speculative.draft_models import in_dtype

WORDS = [3, 60, 7, 20, 21, 22, 41, 5, 9, 33]


@pytest.fixture(scope="module")
def target() -> Any:
    return llama(tie_word_embeddings=True)


def test_the_head_is_the_rows_of_its_tokens(target: Any) -> None:
    """Its product is H x S, the logits those of the whole draft at these tokens, and the embeddings
    that it was tied to stay whole."""
    whole, ids = truncated(target, 2), prompts()[0]
    few = truncated(target, 2, draft_vocab=WORDS)
    assert few.get_output_embeddings().weight.shape == (10, 32)
    assert few.get_input_embeddings().weight.shape == (61, 32)
    with torch.no_grad():
        want, found = whole(ids).logits[..., sorted(WORDS)], few(ids).logits
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(reduced(whole, torch.tensor(WORDS))(ids).logits, want)
        few.get_output_embeddings().weight.zero_()
        torch.testing.assert_close(whole(ids).logits[..., sorted(WORDS)], want)


def test_saved_and_loaded(target: Any, tmp_path: Path) -> None:
    few, ids = truncated(target, [0, 2], draft_vocab=WORDS), prompts()[0]
    few.save_pretrained(tmp_path)
    found = load_draft(tmp_path, torch.float32)
    assert torch.equal(found.draft_vocab, few.draft_vocab)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, few(ids).logits)
    half = load_draft(tmp_path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_draft_of_a_bf16_target_turns_positions_as_the_target_does() -> None:
    """Frequencies that were rounded to bf16 are wrong by 0.4 %, that is by a radian at 250."""
    target = llama().bfloat16()
    exact = llama().model.rotary_emb.inv_freq
    target.model.rotary_emb.inv_freq = exact  # as a model loaded in bf16 has it
    draft = in_dtype(truncated(target, 2), torch.float32)
    assert torch.equal(draft.model.rotary_emb.inv_freq, exact)


def test_tokens_by_their_frequency() -> None:
    texts = [torch.tensor([[4, 4, 9], [9, 9, 2]]), [2, 7]]
    assert frequent_tokens(texts, 2).tolist() == [2, 9]  # 4 is as frequent as 2
    assert frequent_tokens(texts, 1).tolist() == [9]
    assert frequent_tokens(texts, 3).tolist() == [2, 4, 9]
    assert frequent_tokens(texts, 6, always=[12]).tolist() == [0, 2, 4, 7, 9, 12]
    with pytest.raises(ValueError, match=r"count=1 is less than the 2 tokens of always"):
        frequent_tokens(texts, 1, always=[3, 5])


def test_a_number_takes_the_lowest_ids_and_the_ends() -> None:
    model = llama(eos_token_id=50)
    assert truncated(model, 1, draft_vocab=4).draft_vocab.tolist() == [0, 1, 2, 50]


@pytest.mark.parametrize(
    ("draft_vocab", "words"),
    [
        (0, "draft_vocab=0 is outside 1..61"),
        (62, "draft_vocab=62 is outside 1..61"),
        ([3, 61], "draft_vocab holds 61, outside the model's 61 tokens"),
        ([-1, 3], "draft_vocab holds -1"),
        ([3, 4, 3], "draft_vocab holds 3 twice"),
        ([], "draft_vocab is torch.float32 of 0; pass token ids"),
    ],
)
def test_wrong_sub_vocabularies_are_named(target: Any, draft_vocab: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        truncated(target, 1, draft_vocab=draft_vocab)
    with pytest.raises(ValueError, match="reduced already"):
        reduced(truncated(target, 1, draft_vocab=WORDS), 5)


def test_greedy_text_is_that_of_the_target(target: Any) -> None:
    ids, mask = prompts()
    settings = {"max_new_tokens": 24, "do_sample": False}
    want = target.generate(input_ids=ids, attention_mask=mask, **settings)[:, 9:]
    for draft in (reduced(target, WORDS), truncated(target, 2, draft_vocab=WORDS)):
        found = pydistill.generate(
            target, draft, ids, attention_mask=mask, num_draft_tokens=3, **settings
        )
        assert torch.equal(found.tokens, want)
        assert found.stats.accepted > 0
    assert set(want.flatten().tolist()) - set(WORDS)  # text beyond the draft's tokens


def test_samples_are_proposed_from_the_head_alone(target: Any) -> None:
    """The q that is reported is the softmax over the head's tokens: the mean acceptance of a draft
    that is the target, on S tokens, is the target's mass there, by the rows themselves."""
    ids = prompts()[0][2:]
    seen = []
    draft = reduced(target, WORDS)
    proposals = pydistill.speculative.drafts.ModelDraft.propose

    def spied(self: Any, *args: Any) -> Any:
        seen.append(proposals(self, *args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydistill.speculative.drafts.ModelDraft, "propose", spied)
        found = pydistill.generate(
            target, draft, ids, num_draft_tokens=2, max_new_tokens=40, do_sample=True, top_k=0,
            seed=3,
        )  # fmt: skip
    assert {x for p in seen for x in p.ids.flatten().tolist()} <= {-1, *WORDS}
    assert all(p.logits.shape[-1] == 10 and p.vocabulary.tolist() == sorted(WORDS) for p in seen)
    assert 0 < found.stats.acceptance < 1
    with torch.no_grad():
        mass = target(found.sequences).logits.softmax(-1)[..., WORDS].sum(-1)
    assert float(mass.min()) < found.stats.overlap < float(mass.max())


def test_processors_see_whole_rows(target: Any) -> None:
    """One that forbids all of the head's tokens leaves nothing to propose, without a warning."""
    ids = prompts()[0][2:]

    def only(words: list[int]) -> Any:
        def processor(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert scores.shape == (1, 61)
            return torch.full_like(scores, -math.inf).index_copy(
                1, torch.tensor(words), scores[:, words]
            )

        return processor

    draft = reduced(target, WORDS)
    for words, drafted in (([20, 21, 1], True), ([1, 2], False)):
        for sample in (False, True):
            settings = {"max_new_tokens": 12, "do_sample": sample}
            processors = [only(words)]
            found = pydistill.generate(
                target, draft, ids, num_draft_tokens=3, logits_processor=processors, seed=0,
                **settings,
            )  # fmt: skip
            assert set(found.tokens.flatten().tolist()) <= set(words)
            assert bool(found.stats.evaluated) == drafted


@pytest.mark.parametrize("method", ["token", "block"])
def test_the_law_is_the_targets(method: str) -> None:
    """By certify's tests of samples, on 12 tokens of which the draft knows 5."""
    target = llama(2, vocabulary=12, initializer_range=0.15, pad_token_id=None)
    draft = truncated(target, 1, draft_vocab=[1, 4, 5, 8, 11])
    found = pydistill.certify(
        target, draft, torch.tensor([[1, 2, 1, 2]]), num_draft_tokens=2, samples=1024,
        batch_size=512, method=method, top_k=4, temperature=0.9,
    )  # fmt: skip
    assert found.lossless, found.verdict
