"""`pydistill.generate`: speculative decoding of Hugging Face causal models, batch by batch.

A block drafts up to K tokens for each request, runs the target once over the tokens it has not seen
and the drafted ones, verifies them by `pydistill.verify`, commits what was accepted and one token
more, and rolls both caches back to what is committed. The prompt is no special case: in the first
block the tokens not seen are the prompt.

Requests share the runs and nothing else. A coin depends on its request's seed and on how many
tokens that request had when the block began, so what a request samples, given its logits, does not
depend on its neighbours, its padding, or on when they end.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.verify import VerifyResult, verify
from pydistill.speculative import drafts, settings
from pydistill.speculative.cached_model import CachedModel, check_model, context_of, vocabulary_of
from pydistill.speculative.draft_length import DraftLength, costs_of
from pydistill.speculative.drafts import (
    Draft,
    FeatureModelDraft,
    ModelDraft,
    Ngram,
    NgramDraft,
    Request,
)
from pydistill.speculative.feature_draft import FeatureDraft
from pydistill.speculative.results import GenerateResult, GenerateStats
from pydistill.speculative.settings import Processor, Settings

_METHODS = ("token", "block")
_MOST = 8  # drafted tokens of a block that auto takes


def generate(
    target: Any,
    draft: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    num_draft_tokens: int | str = "auto",
    method: str = "token",
    seed: int | Sequence[int] | Tensor | None = None,
    generation_config: Any = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
    **changes: Any,
) -> GenerateResult:
    """Continues each prompt with tokens of the target's law, or greedily, by means of a draft.

    Args:
        target: a causal model of transformers, in eval mode, of full or sliding attention.
        draft: another one with the same vocabulary, such as `speculative.truncated(target, 4)`,
            its head reduced or not; a `speculative.feature(target)`; "ngram" or an `Ngram` for
            prompt lookup; or None.
        input_ids: int64 or int32 `[B, P]`, padded on any side.
        attention_mask: `[B, P]`, 0 at padding, as if it were not there; None: where
            pad_token_id stands, unless that is an end token, too.
        num_draft_tokens: drafted tokens of a block, 0 for none; "auto" follows measured costs and
            acceptance, and drafts nothing where that does not pay.
        method: of `verify`, "token" or "block"; both leave the target's law as it is.
        seed: of the coins: one int a request, or an int s for s, s + 1, ...; None: from torch's
            generator. With a fixed `num_draft_tokens` the same seeds and logits give the same
            tokens.
        generation_config: of transformers; None: the target's. Its fields may also be passed by
            name: max_new_tokens, do_sample, temperature, top_k, top_p, min_p, eos_token_id,
            stop_strings, ... Sampling has transformers' defaults, so top_k is 50 unless it is set.
        logits_processor: called as in transformers, with one request's tokens `[1, n]` without
            padding and its fp32 row `[1, V]`, for each row that is drafted from or verified. They
            have to be functions of these: rejected tokens are seen, too.
        stopping_criteria: called with one request's tokens `[1, n]` and None, after each token.
        streamer: of transformers, for a single request: gets the prompt, then each block.
        tokenizer: of the target; stop_strings need it.
        draft_tokenizer: of the draft, to be compared with the target's; where they are the same,
            the heads may be padded to different sizes.

    Returns:
        GenerateResult: sequences, new tokens, their log-probabilities, and statistics.

    Raises:
        ValueError, TypeError: for models, prompts and settings that cannot be served; the message
            names the value and the fix.
        RuntimeError: the target's logits have no softmax (NaN), and where.
    """
    check_model("target", target)
    _check_ids("input_ids", input_ids)
    wanted = _number(num_draft_tokens)
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is not served; use one of {', '.join(_METHODS)}.")
    chosen = settings.read(
        target, input_ids.shape[1], generation_config, changes, tokenizer,
        logits_processor, stopping_criteria,
    )  # fmt: skip
    prompts = _prompts(target, input_ids, attention_mask, chosen)
    _check_lengths(target, prompts, chosen.max_new_tokens)
    if streamer is not None and len(prompts) > 1:
        raise ValueError(
            f"streamer is given for a batch of {len(prompts)}; stream one request at a time."
        )
    with torch.inference_mode():
        source = _draft(draft, target, prompts, chosen, tokenizer, draft_tokenizer)
        key = draft if isinstance(source, ModelDraft) else type(source)
        costs = costs_of(target, key)
        if isinstance(source, ModelDraft) and not costs.guess:
            sizes = [sum(x.numel() for x in model.parameters()) for model in (draft, target)]
            costs.guess = sizes[0] / sizes[1]
        seeds = _seeds(seed, len(prompts))
        requests = [
            Request(i, prompt, len(prompt), seeds[i], chosen.processors(len(prompt)))
            for i, prompt in enumerate(prompts)
        ]
        length = DraftLength(costs, 0 if source is None else wanted, _MOST, chosen.max_new_tokens)
        decoder = Decoder(target, source, requests, chosen, method, length, streamer)
        decoder.run()
    return decoder.result()


class Decoder:
    """The loop. `active` are the requests that still write, in the order of the caches' rows."""

    def __init__(
        self,
        target: Any,
        draft: Draft | None,
        requests: list[Request],
        chosen: Settings,
        method: str,
        length: DraftLength,
        streamer: Any = None,
    ) -> None:
        states = isinstance(draft, FeatureModelDraft)
        self.target, self.draft = CachedModel(target, len(requests), states), draft
        self.requests, self.active = requests, list(requests)
        self.settings, self.method, self.length = chosen, method, length
        self.streamer, self.device = streamer, target.device
        self.stats = GenerateStats(fused_layers=self.target.fused)
        self._overlap = 0.0  # the sum
        self._prompt_seconds = 0.0  # of the target's first run
        self._steps: dict[int, float] = defaultdict(float)  # of plain decoding, by requests

    def run(self) -> None:
        self.length.costs.begin()
        if self.streamer is not None:
            self.streamer.put(torch.tensor([self.active[0].tokens]))
        while self.active:
            self._block()
        if self.streamer is not None:
            self.streamer.end()

    def _block(self) -> None:
        active, start = self.active, time.perf_counter()
        batch, first = len(active), self.target.lengths[0] == 0
        room = [self._room(x) for x in active]
        slots = self.length.choose(batch, max(room), self._reading())
        proposal = drafts.Proposal(torch.empty(batch, 0, dtype=torch.int64), None, [0] * batch)
        if slots and self.draft is not None:
            proposal = self.draft.propose(active, [min(slots, x) for x in room], self.target)
        slots, counts = proposal.ids.shape[1], proposal.counts
        drafted = self._now()
        result = self._verify(proposal)
        accepted = result.num_accepted.tolist()
        done = self._commit(result, accepted, counts)
        self._roll_back()
        ended = self._now()

        catching_up = isinstance(self.draft, ModelDraft) and self.draft.catching_up
        emitted = sum(len(x) for x in done) / batch
        usual = (not catching_up, not first)
        self.length.record(batch, slots, drafted - start, ended - drafted, emitted, usual)
        self.stats.seconds += ended - start
        self._steps[batch] += emitted - first
        if first:
            self._prompt_seconds = ended - drafted
        if self.length.wanted and self.active and math.isnan(self.length.costs.plain(batch)):
            self._time_plain_steps()

    def _reading(self) -> float:
        """A guess at the seconds that the draft needs for a text that it has not begun to read:
        as many times less than the target's as for one token."""
        if not isinstance(self.draft, ModelDraft) or self.draft.fed > 0:
            return 0.0
        batch, costs = len(self.active), self.length.costs
        longest = max(len(x.tokens) for x in self.active)
        return costs.draft(batch) / costs.plain(batch) * costs.run(batch, longest)

    def _room(self, request: Request) -> int:
        """Tokens worth drafting: the target adds one, and the draft has a context of its own."""
        written = len(request.tokens) - request.prompt
        room = self.settings.max_new_tokens - written - 1
        context = None if self.draft is None else self.draft.context
        return room if context is None else max(0, min(room, context - len(request.tokens)))

    def _verify(self, proposal: drafts.Proposal) -> VerifyResult:
        ids, q, counts, known = proposal
        active, slots, device = self.active, ids.shape[1], self.device
        pending = max(
            len(x.tokens) - have for x, have in zip(active, self.target.lengths, strict=True)
        )
        fresh, lengths = drafts.last_tokens(active, pending)
        shown = ids.clamp(min=0)  # slots without a token are not looked at
        logits = self.target.extend(
            torch.cat([fresh, shown], 1).to(device), [x + slots for x in lengths], slots + 1
        )
        texts = [x.tokens + new for x, new in zip(active, shown.tolist(), strict=True)]
        logits = drafts.processed(active, logits, texts)
        if q is not None:
            dtype = torch.promote_types(logits.dtype, q.dtype)  # widening loses nothing
            logits, q = logits.to(dtype), q.to(device, dtype)
        return verify(
            logits,
            q,
            ids.to(device),
            draft_topk_ids=None if known is None else known.to(device),
            method=self.method,
            num_drafted=torch.tensor(counts, device=device),
            seed=torch.tensor([x.seed for x in active], device=device),
            position=torch.tensor([len(x.tokens) for x in active], device=device),
            **self.settings.warpers,
        )

    def _commit(
        self, result: VerifyResult, accepted: list[int], counts: list[int]
    ) -> list[list[int]]:
        """Adds each request's tokens up to its end; what was added."""
        done = []
        logprobs = result.logprobs.tolist()
        for row, (request, tokens) in enumerate(
            zip(self.active, result.tokens.tolist(), strict=True)
        ):
            new: list[int] = []
            for token in tokens[: accepted[row] + 1]:
                if token < 0:
                    raise RuntimeError(
                        f"the target's logits of request {request.index} have no softmax (NaN or"
                        f" infinity) at token {len(request.tokens)}; look for NaN in its weights"
                        " or in a logits_processor."
                    )
                request.tokens.append(token)
                request.logprobs.append(logprobs[row][len(new)])
                new.append(token)
                request.ended = self._ends(request)
                if request.ended:
                    break
            done.append(new)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(new))
        self._count(result, counts, done)
        return done

    def _ends(self, request: Request) -> bool:
        if request.tokens[-1] in self.settings.ends:
            return True
        if len(request.tokens) - request.prompt >= self.settings.max_new_tokens:
            return True
        if not self.settings.criteria:
            return False
        text = torch.tensor([request.tokens], device=self.device)
        return any(bool(torch.as_tensor(c(text, None)).all()) for c in self.settings.criteria)

    def _count(self, result: VerifyResult, counts: list[int], done: list[list[int]]) -> None:
        stats, costs = self.stats, self.length.costs
        slots = result.overlap.shape[1]
        stats.blocks += 1
        stats.request_blocks += len(done)
        stats.tokens += sum(len(x) for x in done)
        stats.drafted += sum(counts)
        stats.num_draft_tokens.append(slots)
        while len(stats.evaluated_at) < slots:
            stats.evaluated_at.append(0)
            stats.accepted_at.append(0)
        overlaps = result.overlap.tolist()
        evaluated = total = 0.0
        for new, overlap, kept in zip(done, overlaps, result.num_accepted.tolist(), strict=True):
            for slot, chance in enumerate(overlap[: len(new)]):
                if chance == chance:  # put to the test, and not behind the end
                    stats.evaluated_at[slot] += 1
                    stats.accepted_at[slot] += slot < kept
                    evaluated, total = evaluated + 1, total + chance
        if evaluated:
            self._overlap += total
            costs.judge(evaluated, total)

    def _roll_back(self) -> None:
        """Leaves all committed tokens but the last in the target's cache, tells the draft how many
        of its own can be right, and lets go of the requests that have ended."""
        going = [row for row, x in enumerate(self.active) if not x.ended]
        kept = [len(x.tokens) - 1 for x in self.active]
        if going and len(going) < len(kept):
            kept = [kept[row] for row in going]
            self.target.select(going)
            if self.draft is not None:
                self.draft.select(going)
        self.target.rollback(kept)
        if self.draft is not None:
            self.draft.committed(kept)
        self.active = [self.active[row] for row in going]

    def _time_plain_steps(self) -> None:
        """Two runs over one token, undone: what speed-ups are measured against."""
        batch, lengths = len(self.active), list(self.target.lengths)
        ids = drafts.last_tokens(self.active, 1)[0].to(self.device)
        for _ in range(2):
            start = self._now()
            self.target.extend(ids, [1] * batch, 1)
            self.length.costs.runs[batch, 1].append(self._now() - start)
            self.target.rollback(lengths)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def result(self) -> GenerateResult:
        new = [x.tokens[x.prompt :] for x in self.requests]
        width, most = max(x.prompt for x in self.requests), max(map(len, new))
        tokens = torch.full((len(new), most), self.settings.pad)
        sequences = torch.full((len(new), width + most), self.settings.pad)
        logprobs = torch.full((len(new), most), math.nan)
        for row, request in enumerate(self.requests):
            tokens[row, : len(new[row])] = torch.tensor(new[row])
            logprobs[row, : len(new[row])] = torch.tensor(request.logprobs)
            sequences[row, width - request.prompt : width] = torch.tensor(
                request.tokens[: request.prompt]
            )
        sequences[:, width:] = tokens
        stats, costs = self.stats, self.length.costs
        if stats.evaluated:
            stats.overlap = self._overlap / stats.evaluated
            batch = len(self.requests)
            stats.predicted_speedup = costs.speedup(
                batch, stats.drafted / stats.request_blocks, min(stats.overlap, 0.999)
            )
        if stats.seconds:
            steps = sum(n * costs.plain(batch) for batch, n in self._steps.items() if n)
            stats.measured_speedup = (self._prompt_seconds + steps) / stats.seconds
        return GenerateResult(
            sequences.to(self.device),
            tokens.to(self.device),
            torch.tensor([len(x) for x in new], device=self.device),
            logprobs.to(self.device),
            stats,
        )


def _draft(
    draft: Any,
    target: Any,
    prompts: list[list[int]],
    chosen: Settings,
    tokenizer: Any,
    draft_tokenizer: Any,
) -> Draft | None:
    if draft is None:
        return None
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f'draft={draft!r} is not known; pass a model, "ngram", or None.')
        draft = Ngram()
    if isinstance(draft, Ngram):
        return NgramDraft(draft, len(prompts))
    check_model("draft", draft)
    ours, theirs = vocabulary_of(target), vocabulary_of(draft)
    known = tokenizer is not None and draft_tokenizer is not None
    if known and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise ValueError(
            "the draft's tokenizer is not the target's: their vocabularies differ; pass a draft"
            " that was trained with the target's tokenizer."
        )
    if ours != theirs and not known:
        raise ValueError(
            f"the draft has a vocabulary of {theirs} tokens, the target of {ours}; pass a draft"
            " with the target's tokenizer. If they share one and only pad their heads differently,"
            " pass tokenizer= and draft_tokenizer=, which are then compared."
        )
    if isinstance(draft, FeatureDraft):
        size = target.get_output_embeddings().in_features
        if draft.features != size:
            raise ValueError(
                f"the draft reads hidden states of {draft.features} numbers, the target has {size};"
                " pass the target that it was made for."
            )
        return FeatureModelDraft(draft, len(prompts), chosen.warpers, ours)
    return ModelDraft(draft, len(prompts), chosen.warpers, ours)


def _check_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} is {got}; pass int64 or int32 token ids [B, P].")
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}; pass [B, P], one row a prompt (ids[None] for"
            " one)."
        )


def _prompts(target: Any, ids: Tensor, mask: Tensor | None, chosen: Settings) -> list[list[int]]:
    """The tokens of each prompt, without padding."""
    if mask is None:
        mask = ids != chosen.pad if chosen.pad_is_padding else torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {got}; pass a tensor of input_ids' shape, {tuple(ids.shape)}."
        )
    vocabulary = vocabulary_of(target)
    prompts = []
    for row, (tokens, shown) in enumerate(zip(ids.tolist(), mask.bool().tolist(), strict=True)):
        prompt = [token for token, seen in zip(tokens, shown, strict=True) if seen]
        if not prompt:
            raise ValueError(
                f"prompt {row} of input_ids is empty; give it a token, such as bos_token_id."
            )
        wrong = [token for token in prompt if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(
                f"prompt {row} of input_ids holds {wrong[0]}, outside the target's {vocabulary}"
                " tokens; use its tokenizer."
            )
        prompts.append(prompt)
    return prompts


def _check_lengths(target: Any, prompts: list[list[int]], new: int) -> None:
    context, longest = context_of(target), max(map(len, prompts))
    if context is not None and longest + new > context:
        fix = (
            f"pass max_new_tokens of at most {context - longest}"
            if longest < context
            else "shorten the prompt"
        )
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the target's context of"
            f" {context}; {fix}."
        )


def _number(wanted: int | str) -> int | None:
    """Drafted tokens of a block; None for auto."""
    if wanted == "auto":
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f'num_draft_tokens={wanted!r} is no number; pass an int, or "auto".')
    if not 0 <= wanted <= 128:
        raise ValueError(f"num_draft_tokens={wanted} is outside 0..128; a few are usual.")
    return wanted


def _seeds(seed: int | Sequence[int] | Tensor | None, count: int) -> list[int]:
    """One a request, as int64."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Tensor):
        seed = seed.tolist() if seed.ndim else int(seed)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count or not all(isinstance(x, int) for x in seeds):
        raise ValueError(f"seed={seed!r} does not fit {count} requests; pass an int, or one each.")
    return [drafts.wrapped(x) for x in seeds]
