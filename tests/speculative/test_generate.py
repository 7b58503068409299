"""Speculative decoding against decoding without a draft, on random models in fp32."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import llama, prompts

pytest.importorskip("transformers", reason="models need the extra `hf`")

import pydistill
from pydistill.speculative import Ngram, truncated
from pydistill.speculative.cached_model import CachedModel
from pydistill.speculative.decoding import Decoder, ModelDraft
from pydistill.speculative.draft_length import Costs, DraftLength
from pydistill.speculative.drafts import NgramDraft, Request
from pydistill.speculative.settings import Settings, read


@pytest.fixture(scope="module")
def target() -> Any:
    return llama()


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    return truncated(target, 2)


def plain(target: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """What transformers writes behind the prompts."""
    mask = torch.ones_like(ids) if mask is None else mask
    found = target.generate(input_ids=ids, attention_mask=mask, **settings)
    return found[:, ids.shape[1] :]


KINDS = ("truncated", "ngram", "other", "itself", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_the_target(target: Any, draft: Any, kind: str) -> None:
    """Whatever the draft and the number of drafted tokens, alone and in a batch."""
    source = {
        "truncated": draft, "ngram": "ngram", "other": llama(1, seed=1), "itself": target,
        "none": None,
    }[kind]  # fmt: skip
    ids, mask = prompts()
    settings = {"max_new_tokens": 24, "do_sample": False}
    want = plain(target, ids, mask, **settings)
    for drafted in (0, 1, 2, 5, "auto") if kind == "truncated" else (3, 4):
        found = pydistill.generate(
            target, source, ids, attention_mask=mask, num_draft_tokens=drafted, **settings
        )
        assert torch.equal(found.tokens, want), drafted
        stats = found.stats
        assert stats.tokens == found.num_tokens.sum() == want.numel()
        if kind == "itself":
            assert stats.acceptance == 1
            assert stats.block_efficiency == 24 / math.ceil(24 / (drafted + 1))
            assert stats.predicted_speedup > 0 and stats.measured_speedup > 0
    alone = pydistill.generate(target, source, ids[2:], num_draft_tokens=3, **settings)
    assert torch.equal(alone.tokens, want[2:])


def test_padding_may_be_anywhere(target: Any, draft: Any) -> None:
    left, right = prompts(), prompts(side="right")
    settings = {"max_new_tokens": 12, "do_sample": True, "seed": 5, "num_draft_tokens": 3}
    want = pydistill.generate(target, draft, left[0], attention_mask=left[1], **settings)
    assert torch.equal(want.sequences[:, :9], left[0])
    assert torch.equal(want.sequences[:, 9:], want.tokens)
    for ids, mask in (right, (left[0], None), (right[0], None)):
        found = pydistill.generate(target, draft, ids, attention_mask=mask, **settings)
        assert torch.equal(found.sequences, want.sequences)


@pytest.mark.parametrize("method", ["token", "block"])
@pytest.mark.parametrize("kind", ["truncated", "ngram"])
def test_a_batch_is_its_requests_seed_for_seed(
    target: Any, draft: Any, kind: str, method: str
) -> None:
    """Also where requests end at different times. Logits differ by rounding only, which moves no
    sample here."""
    source = draft if kind == "truncated" else "ngram"
    ids, mask = prompts()
    seeds = [11, 2**62, -7]
    settings = {
        "max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9,
        "eos_token_id": list(range(1, 61, 8)), "num_draft_tokens": 3, "method": method,
    }  # fmt: skip
    many = pydistill.generate(target, source, ids, attention_mask=mask, seed=seeds, **settings)
    again = pydistill.generate(target, source, ids, attention_mask=mask, seed=seeds, **settings)
    assert torch.equal(many.tokens, again.tokens)
    assert len(set(many.num_tokens.tolist())) > 1
    for row, seed in enumerate(seeds):
        one = pydistill.generate(
            target, source, ids[row : row + 1, 9 - int(mask[row].sum()) :], seed=[seed], **settings
        )
        count = int(one.num_tokens)
        assert int(many.num_tokens[row]) == count
        assert torch.equal(many.tokens[row, :count], one.tokens[0])
        torch.testing.assert_close(
            many.logprobs[row, :count], one.logprobs[0], rtol=1e-3, atol=1e-4
        )
        assert bool((many.tokens[row, count:] == 0).all())
        assert bool(many.logprobs[row, count:].isnan().all())
    other = pydistill.generate(target, source, ids, attention_mask=mask, seed=3, **settings)
    assert not torch.equal(other.sequences, many.sequences)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "ngram"])
@pytest.mark.parametrize("method", ["token", "block"])
def test_sampled_text_has_the_law_of_the_target(kind: str, method: str) -> None:
    """Chi-square of the joint law of three tokens, across blocks, on 6 tokens; 4 tests at 1e-4
    together."""
    target = llama(2, vocabulary=6, initializer_range=0.15, pad_token_id=None)
    source = truncated(target, 1) if kind == "truncated" else Ngram(2)
    prompt, count = torch.tensor([[1, 2, 1, 2, 1]]), 2048
    settings = {"temperature": 0.9, "top_k": 5}
    found = Counter[tuple[int, ...]]()
    for run in range(2):
        text = pydistill.generate(
            target, source, prompt.expand(count, -1), max_new_tokens=3, do_sample=True,
            num_draft_tokens=2, seed=run * count, method=method, **settings,
        )  # fmt: skip
        found.update(map(tuple, text.tokens.tolist()))
        assert text.stats.blocks > 1
    law = joint_law(target, prompt, 3, settings)
    total = 2 * count
    rare = {x for x, p in law.items() if p * total < 5}
    assert not any(law.get(x, 0) == 0 for x in found)
    cells = [(found[x], p * total) for x, p in law.items() if x not in rare]
    cells.append((sum(found[x] for x in rare), sum(law[x] for x in rare) * total + 1e-9))
    statistic = sum((seen - due) ** 2 / due for seen, due in cells if due > 1e-6)
    freedom = len(cells) - 1
    # Wilson and Hilferty's quantile, at 2.5e-5
    limit = freedom * (1 - 2 / (9 * freedom) + 4.06 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, freedom)


@torch.no_grad()
def joint_law(
    target: Any, prompt: Tensor, length: int, settings: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    law = {(): 1.0}
    for _ in range(length):
        texts = torch.tensor([[*prompt[0].tolist(), *x] for x in law])
        logits = target(texts).logits[:, -1]
        cut = logits.topk(settings["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < cut, -math.inf) / settings["temperature"]
        rows = logits.double().softmax(-1).tolist()
        law = {
            (*x, token): mass * p
            for (x, mass), row in zip(law.items(), rows, strict=True)
            for token, p in enumerate(row)
            if p > 0
        }
    return law


def decoder(
    target: Any, source: Any, ids: Tensor, mask: Tensor, drafted: int, **changes: Any
) -> Any:
    chosen = read(target, ids.shape[1], None, changes, None, None, None)
    texts = [row[shown.bool()].tolist() for row, shown in zip(ids, mask, strict=True)]
    requests = [Request(i, x, len(x), i, []) for i, x in enumerate(texts)]
    length = DraftLength(Costs(), drafted, 8, chosen.max_new_tokens)
    held = ModelDraft(source, len(texts), chosen.warpers, 61)
    return Decoder(target, held, requests, chosen, "token", length)


@pytest.mark.parametrize("sliding", [False, True])
def test_caches_are_those_of_a_fresh_run(sliding: bool) -> None:
    """After blocks of different acceptance: every row's keys and values, to rounding."""
    target = llama()
    if sliding:
        from transformers import MistralConfig, MistralForCausalLM

        config = {k: v for k, v in target.config.to_dict().items() if k in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "initializer_range")}  # fmt: skip
        target = MistralForCausalLM(MistralConfig(**config, sliding_window=6)).eval()
        target.generation_config.eos_token_id = None
    ids, mask, draft = *prompts(), truncated(target, 2)
    with torch.inference_mode():
        run = decoder(
            target, draft, ids, mask, 3, max_new_tokens=40, do_sample=True, temperature=0.5
        )
        for _ in range(6):
            run._block()
    assert len({len(x.tokens) - x.prompt for x in run.requests}) > 1  # unequal acceptance
    for cached, model in ((run.target, target), (run.draft.cached, draft)):
        kept = cached.lengths
        assert model is draft or kept == [len(x.tokens) - 1 for x in run.requests]
        cache = cached.cache
        assert cache.get_seq_length() == max(kept)
        for row, request in enumerate(run.requests):
            right = run.draft._right[row] if model is draft else kept[row]
            fresh = CachedModel(model, 1)
            with torch.inference_mode():
                fresh.extend(torch.tensor([request.tokens[:right]]), [right], 1)
            begin = max(kept) - kept[row]
            for layer, want in zip(cache.layers, fresh.cache.layers, strict=True):
                for name in ("keys", "values"):
                    torch.testing.assert_close(
                        getattr(layer, name)[row, :, begin : begin + right],
                        getattr(want, name)[0],
                        rtol=1e-4,
                        atol=1e-5,
                    )
    if sliding:
        found = pydistill.generate(
            target, draft, ids, attention_mask=mask, max_new_tokens=15, do_sample=False,
            num_draft_tokens=3,
        )  # fmt: skip
        want = plain(target, ids, mask, max_new_tokens=15, do_sample=False, pad_token_id=0)
        assert torch.equal(found.tokens, want)


def test_an_end_token_inside_a_block_ends_the_text(target: Any) -> None:
    """Here the draft is the target, so that all of a block is accepted."""
    ids, mask = prompts()
    free = plain(target, ids, mask, max_new_tokens=16, do_sample=False)
    end = int(free[1, 6])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": [end]}
    want = plain(target, ids, mask, **settings)
    for drafted in (0, 3, 5):
        found = pydistill.generate(
            target, target, ids, attention_mask=mask, num_draft_tokens=drafted, **settings
        )
        assert torch.equal(found.tokens, want)
        count = int(found.num_tokens[1])
        assert count <= 7 and int(found.tokens[1, count - 1]) == end
        assert found.stats.tokens == found.num_tokens.sum()
        kept = {**settings, "min_new_tokens": count + 3}
        found = pydistill.generate(
            target, target, ids, attention_mask=mask, num_draft_tokens=drafted, **kept
        )
        assert torch.equal(found.tokens, plain(target, ids, mask, **kept))


@pytest.mark.parametrize("kind", ["truncated", "ngram"])
def test_requests_that_end_at_once(target: Any, draft: Any, kind: str) -> None:
    """With their first token, also all of them; a prompt that ends with an end token goes on."""
    ids, mask = prompts()
    source = draft if kind == "truncated" else "ngram"
    first = plain(target, ids, mask, max_new_tokens=1, do_sample=False)[:, 0].tolist()
    assert first[0] != first[1] == first[2]
    for ends in (first[:1], first[1:2], first[:2], [int(ids[2, -1])]):
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends}
        want = plain(target, ids, mask, **settings)
        for drafted in (0, 3):
            found = pydistill.generate(
                target, source, ids, attention_mask=mask, num_draft_tokens=drafted, **settings
            )
            assert torch.equal(found.tokens, want)
            assert [n == 1 for n in found.num_tokens.tolist()] == [x in ends for x in first]


def test_processors_see_every_row(target: Any, draft: Any) -> None:
    """Those of the configuration and one of the caller's, which wants its request's true text."""
    ids, mask = prompts()
    seen = []

    def no_neighbours(tokens: Tensor, scores: Tensor) -> Tensor:
        assert tokens.shape[0] == 1 and scores.shape == (1, 61) and int(tokens[0, 0]) != 0
        seen.append(tokens.shape[1])
        return scores.index_fill(1, (tokens[0, -1:] + 1) % 61, -math.inf)

    ours = {"max_new_tokens": 16, "do_sample": False}
    ours |= {
        "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[5], [7, 9]],
        "suppress_tokens": [2, 3],
    }  # fmt: skip
    for row in range(3):
        prompt = ids[row : row + 1, 9 - int(mask[row].sum()) :]
        want = plain(target, prompt, logits_processor=[no_neighbours], **ours)
        for source in (draft, "ngram"):
            found = pydistill.generate(
                target, source, prompt, num_draft_tokens=3, logits_processor=[no_neighbours], **ours
            )
            assert torch.equal(found.tokens, want)
    many = pydistill.generate(
        target, draft, ids, attention_mask=mask, num_draft_tokens=3,
        logits_processor=[no_neighbours], **ours,
    )  # fmt: skip
    assert torch.equal(many.tokens[2:], want)
    assert {5, 6, 7, 8, 9} <= set(seen)


def test_stop_strings_criteria_and_streams(tiny: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    free = plain(model, ids, max_new_tokens=24, do_sample=False)
    stop = tokenizer.decode(free[0, 9:11])
    assert stop
    settings = {
        "max_new_tokens": 24, "do_sample": False, "tokenizer": tokenizer, "stop_strings": [stop]
    }  # fmt: skip
    want = plain(model, ids, **settings)

    class Stream(TextStreamer):
        text, ended = "", False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text, self.ended = self.text + text, stream_end

    for drafted in (0, 4):
        stream = Stream(tokenizer, skip_prompt=True)
        found = pydistill.generate(
            model, model, ids, num_draft_tokens=drafted, streamer=stream, **settings
        )
        assert torch.equal(found.tokens, want)
        assert stream.ended and stream.text == tokenizer.decode(want[0])
    settings = {"max_new_tokens": 24, "do_sample": False}
    found = pydistill.generate(
        model, model, ids, num_draft_tokens=4, **settings,
        stopping_criteria=[lambda tokens, scores: tokens.shape[1] >= ids.shape[1] + 6],
    )  # fmt: skip
    assert torch.equal(found.tokens, free[:, :6])


def test_max_length_counts_the_prompt(target: Any, draft: Any) -> None:
    ids, mask = prompts()
    found = pydistill.generate(target, draft, ids, attention_mask=mask, max_length=14)
    assert found.sequences.shape == (3, 14)
    assert pydistill.generate(target, "ngram", ids, attention_mask=mask).tokens.shape == (3, 20)


def test_a_draft_may_have_a_shorter_context(target: Any) -> None:
    """It is asked as long as the text fits, request by request; so it is with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    made = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    draft = GPT2LMHeadModel(GPT2Config(**made, n_positions=16)).eval()
    ids, mask = prompts()
    settings = {"max_new_tokens": 20, "do_sample": False, "num_draft_tokens": 4}
    found = pydistill.generate(target, draft, ids, attention_mask=mask, **settings)
    want = plain(target, ids, mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(found.tokens, want) and found.stats.drafted > 0
    long = GPT2LMHeadModel(GPT2Config(**made, n_positions=29, eos_token_id=None)).eval()
    settings["pad_token_id"] = 0
    found = pydistill.generate(long, draft, ids, attention_mask=mask, **settings)
    want = plain(long, ids, mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found.tokens, want)


def test_prompts_beyond_the_draft_s_context_are_not_drafted(target: Any) -> None:
    """Some of a batch, or all; the text is the target's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    made = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    ids, mask = prompts()  # of 5, 7 and 9 tokens
    want = plain(target, ids, mask, max_new_tokens=6, do_sample=False)
    for context, drafts in ((8, True), (5, False), (3, False)):
        draft = GPT2LMHeadModel(GPT2Config(**made, n_positions=context)).eval()
        found = pydistill.generate(
            target, draft, ids, attention_mask=mask, max_new_tokens=6, do_sample=False,
            num_draft_tokens=2,
        )  # fmt: skip
        assert torch.equal(found.tokens, want)
        assert (found.stats.drafted > 0) == drafts


def test_vocabularies_padded_differently(target: Any) -> None:
    class Tokenizer:
        def __init__(self, words: int = 50) -> None:
            self.words = {str(i): i for i in range(words)}

        def get_vocab(self) -> dict[str, int]:
            return self.words

    ids, mask = prompts(50)
    settings = {"max_new_tokens": 12, "attention_mask": mask, "num_draft_tokens": 3}
    for size in (55, 70):
        other = llama(1, vocabulary=size)
        with pytest.raises(ValueError, match=rf"vocabulary of {size} tokens, the target of 61"):
            pydistill.generate(target, other, ids, **settings)
        both = {"tokenizer": Tokenizer(), "draft_tokenizer": Tokenizer()}
        found = pydistill.generate(target, other, ids, **settings, **both, do_sample=False)
        want = plain(target, ids, mask, max_new_tokens=12, do_sample=False)
        assert torch.equal(found.tokens, want)
        pydistill.generate(target, other, ids, **settings, **both, do_sample=True)
    with pytest.raises(ValueError, match="tokenizer is not the target's"):
        pydistill.generate(
            target, target, ids, tokenizer=Tokenizer(), draft_tokenizer=Tokenizer(49), **settings
        )


def test_half_precision_draft_of_a_full_precision_target(target: Any, draft: Any) -> None:
    ids, mask = prompts()
    half = truncated(target, 2).to(torch.bfloat16)
    for do_sample in (False, True):
        settings = {"attention_mask": mask, "do_sample": do_sample, "num_draft_tokens": 3}
        found = pydistill.generate(target, half, ids, max_new_tokens=8, **settings)
        assert found.tokens.shape == (3, 8) and found.stats.accepted > 0


def broken(model: Any) -> Any:
    model.lm_head.weight.data[3] = math.nan
    return model


def test_nan_weights_are_named_or_go_unused(target: Any) -> None:
    ids, mask = prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "num_draft_tokens": 2}
    for do_sample in (False, True):
        with pytest.raises(RuntimeError, match="logits of request 0 have no softmax"):
            pydistill.generate(broken(llama()), target, ids, do_sample=do_sample, **settings)
    for do_sample in (False, True):
        with pytest.warns(UserWarning, match="draft's logits have no softmax"):
            found = pydistill.generate(
                target, broken(llama(1)), ids, do_sample=do_sample, seed=1, **settings
            )
        assert found.stats.accepted == 0 and found.num_tokens.tolist() == [8, 8, 8]
        if not do_sample:
            want = plain(target, ids, mask, max_new_tokens=8, do_sample=False)
            assert torch.equal(found.tokens, want)


def test_nan_of_one_request(target: Any, draft: Any) -> None:
    """Weights that it alone reads: the target's are named by request and place, the draft's cost
    that request its drafts."""
    ids, mask = prompts()
    token = next(x for x in ids[1, 2:].tolist() if x not in ids[[0, 2]])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = plain(target, ids, **{"mask": mask, "max_new_tokens": 6, "do_sample": False})
    assert token not in want

    def poisoned(model: Any) -> Any:
        model.model.embed_tokens.weight.data[token] = math.nan
        return model

    message = r"logits of request 1 have no softmax \(NaN or infinity\) at token 7"
    for source in (draft, "ngram", None):
        with pytest.raises(RuntimeError, match=message):
            pydistill.generate(poisoned(llama()), source, ids, num_draft_tokens=2, **settings)
    with pytest.warns(UserWarning, match="draft's logits have no softmax"):
        found = pydistill.generate(target, poisoned(llama()), ids, num_draft_tokens=2, **settings)
    assert torch.equal(found.tokens, want)
    assert found.stats.accepted == 2 * (6 - 2)  # the draft is the target: two blocks each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which speculative decoding does not serve"),
        ({"num_return_sequences": 2}, "repeat the rows of input_ids"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"output_scores": True}, "output_scores=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"stop_strings": "x"}, "pass tokenizer="),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"max_length": 9}, "0 new tokens are asked for after a prompt of 9"),
        ({"max_new_tokens": 120}, "pass max_new_tokens of at most 119"),
        ({"num_draft_tokens": -1}, r"num_draft_tokens=-1 is outside 0\.\.128"),
        ({"num_draft_tokens": "many"}, "num_draft_tokens='many'"),
        ({"method": "tree"}, "method='tree'"),
        ({"seed": [1, 2]}, "does not fit 3 requests"),
        ({"temprature": 1.0}, "temprature=1.0 is neither"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is \(2, 9\)"),
        ({"attention_mask": torch.tensor([[1] * 9, [0] * 9, [1] * 9])}, "prompt 1 .* is empty"),
        ({"input_ids": torch.tensor([1, 2])}, r"ids\[None\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "prompt 0 of input_ids is empty"),
        ({"input_ids": torch.tensor([[61]])}, "holds 61, outside the target's 61"),
        ({"input_ids": torch.ones(1, 9)}, r"input_ids is torch\.float32"),
        ({"input_ids": torch.ones(1, 200, dtype=torch.int64)}, "200 tokens .* shorten the prompt"),
        ({"draft": "lookup"}, "draft='lookup'"),
        ({"draft": torch.nn.Linear(1, 1)}, "draft is a Linear"),
        ({"streamer": object()}, "stream one request at a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_named(target: Any, changes: dict[str, Any], message: str) -> None:
    given = {"input_ids": prompts()[0], "draft": "ngram", **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        pydistill.generate(target, given.pop("draft"), given.pop("input_ids"), **given)


def test_models_that_cannot_be_rolled_back_are_refused(target: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    ids = prompts()[0]
    made = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)
    mamba = MambaForCausalLM(made).eval()
    for pair in ((mamba, "ngram"), (target, mamba)):
        with pytest.raises(ValueError, match=r"MambaForCausalLM has recurrent state"):
            pydistill.generate(*pair, ids)
    made = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="has an encoder"):
        pydistill.generate(T5ForConditionalGeneration(made).eval(), None, ids)
    with pytest.raises(ValueError, match=r"call target\.eval\(\)"):
        pydistill.generate(llama().train(), None, ids)


def test_truncated_takes_the_layers_it_is_told(target: Any) -> None:
    student = truncated(target, [0, 2])
    mine, its = student.model.layers[1].state_dict(), target.model.layers[2].state_dict()
    assert all(torch.equal(value, its[key]) for key, value in mine.items())
    assert student.dtype == target.dtype and not student.training
    for wrong in (0, 4, [], [1, 0], [0, 3]):
        with pytest.raises(ValueError, match=r"layers="):
            truncated(target, wrong)


def test_prompt_lookup_copies_what_followed() -> None:
    def follow(text: list[int], most: int, kind: Ngram | None = None) -> list[int]:
        held: Any = NgramDraft(kind or Ngram(), 1)
        for end in (len(text) // 2, len(text)):  # places are kept up as the text grows
            found = held.propose([Request(0, text[:end], 1, 0, [])], [most], None)
        ids = found.ids[0].tolist()
        assert found.counts == [len(ids)]
        return ids

    assert follow([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == [4, 5, 9]
    assert follow([7, 3, 8, 1, 2, 3, 4, 6, 2, 3], 1) == [4]  # the longer suffix decides
    assert follow([3, 4, 3, 5, 3], 1) == [5]  # of the same length, the later place
    assert follow([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # over its own end
    assert follow([1, 2, 3], 4) == []
    assert follow([1, 2, 3, 1], 4, Ngram(2, 2)) == []
    with pytest.raises(ValueError, match="matches nothing"):
        Ngram(1, 2)


def test_settings_are_the_model_s_unless_the_caller_s() -> None:
    from transformers import GenerationConfig

    model = llama()
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.8, eos_token_id=[4, 5], max_new_tokens=33
    )

    def found(config: Any = None, **changes: Any) -> Settings:
        return read(model, 10, config, changes, None, None, None)

    assert found().warpers == {"temperature": 0.6, "top_k": 50, "top_p": 0.8, "min_p": 0.0}
    assert found().ends == {4, 5} and found().max_new_tokens == 33
    assert found(top_k=0, temperature=0.9).warpers["top_k"] == 0
    assert found(do_sample=False).warpers == {"temperature": 0.0}
    assert found(max_length=30).max_new_tokens == 20
    own = GenerationConfig(top_p=0.5, do_sample=True, max_new_tokens=7)
    assert found(own).warpers["top_p"] == 0.5 and found(own).max_new_tokens == 7
    assert found(own, max_new_tokens=8).max_new_tokens == 8
