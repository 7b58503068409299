"""`pydistill.certify`: is a target, with a draft and settings, sampled without loss?

Given rows of logits over a small vocabulary, the question has an exact answer (`exact_law`). Given
models, or tokens that any engine sampled, it has a statistical one (`sample_tests`): many
continuations of one prompt, against the target's own distributions, which a run of the target over
each context gives. The samples are the end result, so whatever goes wrong before (coins used twice,
a cache that kept a rejected token, a draft that reports another q than it sampled) is in them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydistill.ops import _verify_call
from pydistill.reference import verify as reference
from pydistill.speculative import drafts, exact_law, sample_tests
from pydistill.speculative.cached_model import CachedModel, check_model
from pydistill.speculative.decoding import generate
from pydistill.speculative.exact_law import Source
from pydistill.speculative.sample_tests import Context, PositionTest
from pydistill.speculative.settings import read

_OF_VERIFY = {
    *exact_law.WARPERS, *("draft_" + name for name in exact_law.WARPERS), "logit_bias",
    "lenience", "tv_budget", "typical",
}  # fmt: skip
_OF_TARGET = {*exact_law.WARPERS, "logit_bias"}


@dataclass(frozen=True)
class Certificate:
    """What `certify` found; `verdict` says it in a sentence.

    Exact: `error` is the largest difference between the probabilities of a block of tokens,
    `distance` the total variation between the laws. Of samples: `distance` bounds, with
    `confidence`, the total variation at every tested position between the laws of the token's bin
    (the 31 likeliest tokens, and the rest); `p_value` is the smallest by chi-square.
    """

    exact: bool
    lossless: bool  # False: disproved. True: proved if exact, else not disproved
    num_tokens: int  # of the block, or of each sample
    distance: float
    error: float = math.nan
    p_value: float = math.nan
    samples: int = 0
    false_alarm: float = 0.0
    confidence: float = 1.0
    positions: tuple[PositionTest, ...] = ()

    @property
    def verdict(self) -> str:
        if self.exact:
            count = f"the next {self.num_tokens} tokens" if self.num_tokens > 1 else "a token"
            if self.lossless:
                return (
                    f"Lossless: the distribution of {count} is the target's, by enumeration of all"
                    f" that the draft can propose (largest difference {self.error:.1e})."
                )
            return (
                f"Not lossless: the distribution of {count} is {self.distance:.3g} in total"
                " variation away from the target's, by enumeration of all that the draft can"
                " propose."
            )
        rate = f"once in {1 / self.false_alarm:,.0f} runs at most"
        failed = [x for x in self.positions if x.disproved]
        if not failed:
            return (
                f"No loss found: {self.samples:,} samples follow the target's distribution"
                f" (position by position, the first {len(self.positions)}; a lossless pair fails"
                f" {rate}). With {100 * self.confidence:.4g} % confidence the distribution of the"
                f" {sample_tests.BINS - 1} likeliest tokens and of the rest together is within"
                f" {self.distance:.3f} of the target's in total variation."
            )
        first = failed[0]
        where = f"Not lossless: at position {first.position + 1} behind the prompt the samples"
        if first.impossible is not None:
            return f"{where} hold token {first.impossible}, which the target never emits there."
        return (
            f"{where} do not follow the target's distribution (chi-square {first.statistic:.0f}"
            f" where about {first.freedom} is expected; a lossless pair fails {rate})."
        )


def certify(
    target: Any,
    draft: Any = None,
    input_ids: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    sampled: Source | None = None,
    num_draft_tokens: int | str | None = None,
    method: str = "token",
    samples: int = 4096,
    new_tokens: int | None = None,
    batch_size: int = 64,
    false_alarm: float = 1e-4,
    confidence: float = 0.99,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Certificate:
    """Proves or disproves that a draft and settings leave the target's law as it is.

    Three forms. `certify(target, draft)` of logits over a small vocabulary V enumerates a block of
    K drafted tokens exactly, in fp64. `certify(target, draft, input_ids)` of transformers' causal
    models samples by `generate` and tests the samples. `certify(target, input_ids=..., tokens=...)`
    tests samples of any other engine.

    Args:
        target: logits `[V]`, the same after every prefix, or a function from the tuple of tokens so
            far to `[V]`; or a model.
        draft: the same; a function that returns an int is a draft that does not sample; None, with
            `sampled`, one that samples and does not say so. For models as in `generate`.
        input_ids: the prompt of models, int64 `[1, P]`, without padding.
        tokens: int64 or int32 `[N, T]`, independent samples of another engine behind the prompt, -1
            behind a sample's end. The settings are then the target's.
        sampled: probabilities `[V]`, or a function to them: what the draft really draws from. None:
            what its logits say, as `verify` warps them.
        num_draft_tokens: K; None is 2 of logits, 3 of models. "auto" is for models.
        method: of `verify`, for chains; of models "token" or "block".
        samples: how many continuations are sampled.
        new_tokens: tokens of each; None is K + 2, so that a second block begins.
        batch_size: continuations that are sampled at once.
        false_alarm: the chance that a lossless pair is disproved is at most this, of all tests
            together; 1e-6 to 0.5.
        confidence: with which all bounds of the total variation hold, 0 to 1.
        seed: sample i has seed + i.
        progress: called with the number of samples that are done.
        settings: of logits the arguments of `verify`: temperature, top_k, top_p, min_p, those of
            the draft, logit_bias, lenience, tv_budget, typical. Of models those of `generate`;
            do_sample is True unless it is set, and top_k is 50 unless it is set.

    Returns:
        Certificate: `lossless`, `distance`, `verdict` and what they rest on.

    Raises:
        ValueError, TypeError: for arguments that cannot be right; the message names the value and
            the fix.
    """
    is_model = hasattr(target, "config")
    if tokens is None and not is_model:
        if input_ids is not None:
            raise TypeError(
                f"input_ids is given, and target is a {type(target).__name__}; pass a causal model"
                " of transformers, or logits without input_ids."
            )
        slots = 2 if num_draft_tokens is None else num_draft_tokens
        return _exact(target, draft, sampled, slots, method, settings)
    if sampled is not None:
        raise ValueError("sampled is given, and only the exact form asks for it; leave it out.")
    _check_share("false_alarm", false_alarm, 1e-6, 0.5)
    _check_share("confidence", confidence, 0.0, 1.0)
    prompt = None
    if is_model:
        check_model("target", target)
        prompt = _prompt(input_ids)
        settings = {"do_sample": True, **settings}
    if tokens is None:
        assert prompt is not None
        drafted = 3 if num_draft_tokens is None else num_draft_tokens
        if new_tokens is None:
            new_tokens = 5 if isinstance(drafted, str) else drafted + 2
        _check_count("samples", samples, 100)
        _check_count("new_tokens", new_tokens, 1)
        _check_count("batch_size", batch_size, 1)
        tokens = _sample(
            target, draft, prompt, samples, batch_size, progress, seed,
            {
                **settings, "num_draft_tokens": drafted, "method": method,
                "max_new_tokens": new_tokens,
            },
        )  # fmt: skip
    else:
        if draft is not None:
            raise ValueError(
                "tokens and draft are given; samples that exist need no draft, and a draft samples"
                " its own. Pass one of them."
            )
        tokens = _samples(tokens)
    if is_model:
        assert prompt is not None
        law = _model_law(target, prompt, tokens.shape[1], settings)
    else:
        _check_names(settings, _OF_TARGET, "target's settings")
        law = functools.partial(exact_law.target_rows, target, settings)
    found = sample_tests.examine(tokens, law, false_alarm, confidence, seed)
    return Certificate(
        exact=False,
        lossless=not any(x.disproved for x in found),
        num_tokens=tokens.shape[1],
        distance=max(x.distance_bound for x in found),
        p_value=min(x.p_value for x in found),
        samples=len(tokens),
        false_alarm=false_alarm,
        confidence=confidence,
        positions=tuple(found),
    )


def _exact(
    target: Source,
    draft: Source | None,
    sampled: Source | None,
    slots: Any,
    method: str,
    settings: dict[str, Any],
) -> Certificate:
    for name, value in (("target", target), ("draft", draft), ("sampled", sampled)):
        if (
            not isinstance(value, Tensor)
            and not callable(value)
            and (name == "target" or value is not None)
        ):
            raise TypeError(
                f"{name} is {value!r}; pass logits [V], or a function from a tuple of tokens to"
                " them, or a causal model as target."
            )
    _check_count("num_draft_tokens", slots, 0)
    _check_names(settings, _OF_VERIFY, "verify's settings for chains")
    if method not in reference.CHAINS:
        raise ValueError(
            f"method={method!r} is not enumerated; use one of {', '.join(reference.CHAINS)}."
        )
    rule = _verify_call.rule_of(
        method, None, *(settings.get(x) for x in ("lenience", "tv_budget", "typical"))
    )
    law = exact_law.block_law(target, draft, sampled, slots, rule, settings)
    gaps = (law.emitted - law.target).abs()
    error = float(gaps.max())
    return Certificate(True, error <= law.rounding, slots + 1, float(gaps.sum()) / 2, error)


def _sample(
    target: Any,
    draft: Any,
    prompt: Tensor,
    count: int,
    batch_size: int,
    progress: Callable[[int], None] | None,
    seed: int,
    settings: dict[str, Any],
) -> Tensor:
    """int64 `[N, T]`, -1 behind a sample's end."""
    tokens = torch.full((count, settings["max_new_tokens"]), -1)
    for start in range(0, count, batch_size):
        batch = prompt.expand(min(batch_size, count - start), -1)
        found = generate(
            target, draft, batch, attention_mask=torch.ones_like(batch), seed=seed + start,
            **settings,
        )  # fmt: skip
        width = found.tokens.shape[1]
        inside = torch.arange(width) < found.num_tokens.cpu()[:, None]
        tokens[start : start + len(batch), :width] = found.tokens.cpu().where(inside, -1)
        if progress is not None:
            progress(start + len(batch))
    return tokens


def _model_law(
    target: Any, prompt: Tensor, width: int, settings: dict[str, Any]
) -> Callable[[Sequence[Context]], Tensor]:
    """The warped distributions of a model after contexts of equal length: a run over each, without
    a draft or a cache, and the reference's warpers in fp64."""
    changes = {**settings, "max_new_tokens": width}
    given = {
        name: changes.pop(name, None)
        for name in ("generation_config", "tokenizer", "logits_processor", "stopping_criteria")
    }
    changes.pop("draft_tokenizer", None)
    chosen = read(
        target, prompt.shape[1], given["generation_config"], changes, given["tokenizer"],
        given["logits_processor"], given["stopping_criteria"],
    )  # fmt: skip
    start = prompt[0].tolist()

    @torch.inference_mode()
    def law(contexts: Sequence[Context]) -> Tensor:
        texts = [[*start, *x] for x in contexts]
        ids = torch.tensor(texts, device=target.device)
        logits = CachedModel(target, len(texts)).extend(ids, [ids.shape[1]] * len(texts), 1)
        requests = [
            drafts.Request(i, x, len(start), 0, chosen.processors(len(start)))
            for i, x in enumerate(texts)
        ]
        logits = drafts.processed(requests, logits, texts).cpu()
        warpers = exact_law.warper_rows(chosen.warpers, "cpu")[:, : reference.WARPERS]
        p, _, sound = reference.warped(logits, warpers.expand(len(texts), -1))
        if not bool(sound.all()):
            raise RuntimeError(
                "the target's logits have no softmax (NaN or infinity) behind the prompt; look for"
                " NaN in its weights or in a logits_processor."
            )
        return p[:, 0]

    return law


def _prompt(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"input_ids is {got}; pass the prompt as int64 token ids [1, P].")
    if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}; pass one prompt without padding, [1, P]."
        )
    return ids


def _samples(tokens: Any) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens is {got}; pass sampled token ids, int64 [N, T].")
    if tokens.ndim != 2 or tokens.shape[0] < 100 or not tokens.shape[1]:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; pass at least 100 samples of at least one"
            " token, [N, T]."
        )
    if bool((tokens[:, 0] < 0).any()):
        raise ValueError("tokens has samples without a token; -1 marks what is behind the end.")
    return torch.where((tokens < 0).cummax(1).values, -1, tokens).cpu()


def _check_share(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number.")
    if not (low <= value <= high and 0 < value < 1):
        raise ValueError(f"{name}={value} is outside {low:g} to {high:g}; 1e-4 and 0.99 are usual.")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is no whole number; pass an int of at least {least}.")
    if value < least:
        raise ValueError(f"{name}={value} is too few; pass at least {least}.")


def _check_names(settings: dict[str, Any], known: set[str], what: str) -> None:
    others = sorted(set(settings) - known)
    if others:
        raise TypeError(f"{others[0]} is not one of {what}; use {', '.join(sorted(known))}.")
