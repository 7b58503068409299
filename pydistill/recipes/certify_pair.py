"""Samples many short continuations of one prompt by speculative decoding, and tests whether they
have the target's distribution: `pydistill.certify` for models by name.

The models run in fp32: in half precision the target's own distribution moves with the size of the
batch by more than the tests can see.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pydistill
from pydistill.recipes import UsageError, models, write
from pydistill.recipes import bar as progress_bar


@dataclass(frozen=True)
class Options:
    prompt: str
    model: str = models.DEFAULT
    draft: str = "ngram"  # "none", "ngram", "layers:N", or a model
    num_draft_tokens: int | str = 3
    new_tokens: int | None = None
    samples: int = 2048
    method: str = "token"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    false_alarm: float = 1e-4
    confidence: float = 0.99
    seed: int = 0


def run(options: Options, progress: bool = True) -> pydistill.Certificate:
    """UsageError for what cannot be met."""
    target, tokenizer = models.load(options.model, torch.float32, progress)
    ids = write.prompt_ids(tokenizer, options.prompt)
    try:
        draft, draft_tokenizer = write.load_draft(target, options.draft, torch.float32, progress)
        with progress_bar(progress, options.samples, "samples") as bar:
            return pydistill.certify(
                target, draft, ids, num_draft_tokens=options.num_draft_tokens,
                new_tokens=options.new_tokens, samples=options.samples, method=options.method,
                false_alarm=options.false_alarm, confidence=options.confidence, seed=options.seed,
                progress=lambda done: bar.update(done - bar.n), tokenizer=tokenizer,
                draft_tokenizer=draft_tokenizer, **write.sampling(options),
            )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def to_json(found: pydistill.Certificate) -> dict[str, Any]:
    data = asdict(found)
    data["positions"] = [x._asdict() for x in found.positions]
    return {"verdict": found.verdict, **data}


def table(found: pydistill.Certificate) -> str:
    lines = [
        found.verdict,
        "",
        "position  samples  contexts  chi-square  freedom  p        TV within",
    ]
    for x in found.positions:
        p = "0" if x.p_value == 0 else f"{x.p_value:.2g}"
        statistic = "-" if math.isnan(x.statistic) else f"{x.statistic:.1f}"
        lines.append(
            f"{x.position + 1:8}  {x.samples:7}  {x.contexts:8}  {statistic:>10}  {x.freedom:7}"
            f"  {p:7}  {x.distance_bound:.3f}"
        )
    return "\n".join(lines)
