"""Tokens a second of a model with drafts, against transformers' own generate.

Every way writes on from the same prompts, one prompt at a time and the ways in turn, so that a
disturbance meets all of them; the first prompt is written once before, which warms them up. Greedy
text is the same for all, and compared; sampled texts may differ in length, and a rate counts what
was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydistill
from pydistill.recipes.write import plain, prompt_ids

PLAIN = "transformers' generate"


@dataclass(frozen=True)
class Rate:
    """One way, all prompts together."""

    way: str
    temperature: float
    tokens: int
    seconds: float
    per_run: float | None  # tokens of a run of the target; None where it is not known
    same: int  # texts that are transformers'; counted where they are greedy
    texts: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Written(NamedTuple):
    tokens: Tensor  # [T]
    runs: int | None


Way = Callable[[Tensor, dict[str, Any], int], Written]


def ways(target: Any, drafts: Mapping[str, Any], assisted: bool = False) -> dict[str, Way]:
    """transformers' generate, and `pydistill.generate` with each of `drafts`; with `assisted`, also
    transformers' assisted generation with those that it takes."""
    found: dict[str, Way] = {PLAIN: _theirs(target)}
    for name, draft in drafts.items():
        found[name] = _ours(target, draft)
        if assisted and draft == "ngram":
            found[f"{name}, transformers"] = _theirs(target, prompt_lookup_num_tokens=10)
        elif assisted and hasattr(draft, "generate"):
            found[f"{name}, transformers"] = _theirs(target, assistant_model=draft)
    return found


def _ours(target: Any, draft: Any) -> Way:
    def run(ids: Tensor, settings: dict[str, Any], seed: int) -> Written:
        found = pydistill.generate(target, draft, ids, seed=seed, **settings)
        return Written(found.tokens[0], found.stats.blocks)

    return run


def _theirs(target: Any, **more: Any) -> Way:
    def run(ids: Tensor, settings: dict[str, Any], seed: int) -> Written:
        torch.manual_seed(seed)
        written = plain(target, ids, settings | more)[0]
        return Written(written, None if more else len(written))

    return run


def measure(
    tokenizer: Any,
    prompts: Sequence[str],
    contestants: Mapping[str, Way],
    *,
    new_tokens: int,
    temperature: float,
    seed: int = 0,
    bar: Any = None,
) -> list[Rate]:
    """A rate for each of `ways`, in their order; `bar` advances by one a text."""
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    settings["pad_token_id"] = tokenizer.pad_token_id
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0}
    asked = [prompt_ids(tokenizer, text) for text in prompts]
    seconds = dict.fromkeys(contestants, 0.0)
    texts: dict[str, list[Written]] = {name: [] for name in contestants}
    with torch.random.fork_rng(devices=()):
        for number, ids in enumerate([asked[0], *asked]):
            for name, way in contestants.items():
                start = time.perf_counter()
                written = way(ids, settings, seed + number)
                if number:  # the first is the warm-up
                    seconds[name] += time.perf_counter() - start
                    texts[name].append(written)
                if bar is not None:
                    bar.update()
    first = next(iter(texts.values()))
    return [_rate(name, temperature, texts[name], first, seconds[name]) for name in texts]


def _rate(
    way: str, temperature: float, texts: list[Written], first: list[Written], seconds: float
) -> Rate:
    tokens, runs = sum(len(x.tokens) for x in texts), [x.runs for x in texts]
    per_run = None if None in runs else tokens / sum(x for x in runs if x is not None)
    same = sum(torch.equal(x.tokens, y.tokens) for x, y in zip(texts, first, strict=True))
    return Rate(way, temperature, tokens, seconds, per_run, same, len(texts))


def table(rates: Sequence[Rate]) -> list[str]:
    """Markdown; ratios are to the first of them."""
    lines = [
        "| way | tokens a second | times plain | tokens a run | same text |",
        "|---|---|---|---|---|",
    ]
    for x in rates:
        per_run = "-" if x.per_run is None else f"{x.per_run:.2f}"
        same = "-" if x.temperature else f"{x.same} of {x.texts}"
        ratio = x.tokens_per_second / rates[0].tokens_per_second
        lines.append(f"| {x.way} | {x.tokens_per_second:.1f} | {ratio:.2f} | {per_run} | {same} |")
    return lines
