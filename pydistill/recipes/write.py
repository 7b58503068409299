"""Writes on from one prompt by speculative decoding, and says what the draft did for it.

With `compare` the same text is written by transformers' own `generate`, without a draft: once
before, which warms both up, and once after, which is timed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pydistill
from pydistill.recipes import UsageError, models
from pydistill.recipes.prompts import encoded


@dataclass(frozen=True)
class Options:
    prompt: str
    model: str = models.DEFAULT
    draft: str = "ngram"  # "none", "ngram", or what `models.draft_of` takes
    new_tokens: int = 128
    num_draft_tokens: int | str = "auto"
    method: str = "token"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    compare: bool = False


@dataclass(frozen=True)
class Result:
    text: str
    tokens: int
    blocks: int
    block_efficiency: float
    acceptance: float
    acceptance_per_position: list[float]
    overlap: float
    num_draft_tokens: list[int]
    predicted_speedup: float
    measured_speedup: float
    tokens_per_second: float
    plain_tokens_per_second: float | None  # of transformers' generate
    same_text: bool | None  # as transformers', when greedy

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(options: Options, progress: bool = True) -> Result:
    """UsageError for what cannot be met."""
    target, tokenizer = models.load(options.model, models.compute_dtype(), progress)
    ids = prompt_ids(tokenizer, options.prompt)
    try:
        draft, draft_tokenizer = load_draft(target, options.draft, models.compute_dtype(), progress)
        settings: dict[str, Any] = {
            "max_new_tokens": options.new_tokens, "pad_token_id": tokenizer.pad_token_id,
            **sampling(options),
        }  # fmt: skip
        if options.compare:
            plain(target, ids, settings)
        start = time.perf_counter()
        found = pydistill.generate(
            target, draft, ids, num_draft_tokens=options.num_draft_tokens, method=options.method,
            seed=options.seed, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, **settings,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    except ValueError as error:
        raise UsageError(str(error)) from error
    plain_rate, same = None, None
    if options.compare:
        start = time.perf_counter()
        theirs = plain(target, ids, settings)
        plain_rate = theirs.shape[1] / (time.perf_counter() - start)
        same = torch.equal(theirs, found.tokens) if options.temperature == 0 else None
    stats = found.stats
    return Result(
        text=tokenizer.decode(found.tokens[0], skip_special_tokens=True),
        tokens=stats.tokens,
        blocks=stats.blocks,
        block_efficiency=stats.block_efficiency,
        acceptance=stats.acceptance,
        acceptance_per_position=stats.acceptance_per_position,
        overlap=stats.overlap,
        num_draft_tokens=stats.num_draft_tokens,
        predicted_speedup=stats.predicted_speedup,
        measured_speedup=stats.measured_speedup,
        tokens_per_second=stats.tokens / seconds,
        plain_tokens_per_second=plain_rate,
        same_text=same,
    )


def sampling(options: Any) -> dict[str, Any]:
    """The settings of `pydistill.generate` for the temperature and filters of `options`."""
    if options.temperature == 0:
        return {"do_sample": False}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {"do_sample": True} | {name: getattr(options, name) for name in names}


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 `[1, P]`: a user's message where there is a chat template, else a text's beginning."""
    return torch.tensor(encoded(tokenizer, [text])).long()  # an empty text has none


def load_draft(target: Any, name: str, dtype: torch.dtype, progress: bool) -> tuple[Any, Any]:
    """What `pydistill.generate` takes as draft, and the draft's tokenizer if it has its own."""
    if name in ("none", "ngram"):
        return (None if name == "none" else "ngram"), None
    return models.draft_of(target, name, dtype, progress)


@torch.inference_mode()
def plain(target: Any, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """What transformers' own generate writes, `[1, T]`."""
    found: torch.Tensor = target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **settings
    )
    return found[:, ids.shape[1] :]


def table(result: Result, options: Options) -> str:
    lines = [
        result.text,
        "",
        f"{result.tokens} tokens in {result.blocks} runs of the target: "
        f"{result.block_efficiency:.2f} a run, {result.tokens_per_second:.1f} a second",
    ]
    if any(result.num_draft_tokens):
        places = ", ".join(f"{x:.0%}" for x in result.acceptance_per_position)
        lines += [
            f"accepted of the drafted tokens that were tested: {result.acceptance:.0%}"
            f" (by position {places}); expected {result.overlap:.0%}",
            f"speed-up over the same loop without a draft: {result.measured_speedup:.2f} measured,"
            f" {result.predicted_speedup:.2f} predicted",
        ]
    elif options.draft != "none":
        lines.append("nothing was drafted: it would not have paid")
    if result.plain_tokens_per_second is not None:
        rate = result.plain_tokens_per_second
        same = {True: "; the same text", False: "; another text", None: ""}[result.same_text]
        lines.append(
            f"transformers' own generate: {rate:.1f} a second, so this is"
            f" {result.tokens_per_second / rate:.2f} times as fast{same}"
        )
    return "\n".join(lines)
