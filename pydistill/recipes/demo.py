"""The main job in its short form: a draft is distilled from a real model and put to work.

The target writes answers to the shipped prompts; a draft on its hidden states learns from them
(`draft`), for a minute; then the target writes with and without drafts, on prompts that no draft
has seen and on some whose answers repeat them (`speed`). `docs/draft.md` has the long form.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydistill.recipes import bar as progress_bar
from pydistill.recipes import draft, models, prompts, speed

_PROMPTS = 4  # that are written from, of each kind


@dataclass(frozen=True)
class Options:
    model: str = models.DEFAULT
    draft: str = "feature:2+1"
    divergence: str = "tvd"
    steps: int = 60
    seed: int = 0
    output: Path | None = None
    draft_vocab: str | None = "16384"  # as of `draft`
    new_tokens: int = 64  # of an answer that is learnt from, or timed


@dataclass(frozen=True)
class Result:
    trained: draft.Result
    greedy: list[speed.Rate]  # on held-out prompts
    sampled: list[speed.Rate]
    copying: list[speed.Rate]  # greedy
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"trained": self.trained.to_json()}


def run(options: Options, progress: bool = True) -> Result:
    """Trains and measures, with progress bars on stderr; UsageError for what cannot be met."""
    start = time.perf_counter()
    if options.output is not None:
        models.check_output(options.output)
    with tempfile.TemporaryDirectory() as scratch:
        training = draft.Options(
            output=options.output or Path(scratch) / "draft", model=options.model,
            draft=options.draft, divergence=options.divergence, steps=options.steps,
            seed=options.seed, length=options.new_tokens, batch=8, row=512, sample_batch=160,
            draft_vocab=options.draft_vocab, data=Path(scratch),
        )  # fmt: skip
        draft.check(training)
        target, tokenizer = models.load(options.model, models.compute_dtype(), progress)
        trained = draft.train(training, target, tokenizer, progress)
        made, _ = models.draft_of(target, str(training.output), models.compute_dtype())
    held_out, copying = prompts.shipped()[1][:_PROMPTS], prompts.copying()[:_PROMPTS]
    contestants = speed.ways(target, {"the draft": made, "prompt lookup": "ngram"})
    with progress_bar(progress, 3 * len(contestants) * (_PROMPTS + 1), "texts written") as bar:

        def measured(texts: list[str], temperature: float) -> list[speed.Rate]:
            return speed.measure(
                tokenizer, texts, contestants, new_tokens=options.new_tokens,
                temperature=temperature, seed=options.seed, bar=bar,
            )  # fmt: skip

        greedy, sampled, copied = measured(held_out, 0), measured(held_out, 1), measured(copying, 0)
    return Result(trained, greedy, sampled, copied, time.perf_counter() - start)


def table(result: Result) -> str:
    """The result for a reader who knows none of the terms."""
    trained, options = result.trained, result.trained.options
    before, after = trained.before, trained.after
    target, small = (f"{count / 1e6:.0f}M" for count in trained.parameters)
    lines = [
        f"{options.model} ({target} parameters) has taught a draft of {small}, {options.draft}:"
        f" {options.steps} steps of {options.divergence} on {trained.distinct:,} tokens that it"
        " wrote.",
        "",
        "On prompts the draft never saw                          before     after",
        f"  acceptance: draft tokens the model would keep     {before.acceptance:10.1%}"
        f"{after.acceptance:10.1%}",
        f"  same most likely next token                       {before.same_choice:10.1%}"
        f"{after.same_choice:10.1%}",
        f"  tokens a run of the model, {options.num_draft_tokens} drafted              "
        f"{before.block_efficiency:10.2f}{after.block_efficiency:10.2f}",
        "",
        "Tokens a second, one text at a time (times those of transformers' generate)",
        "                            greedy       sampled at 1   greedy, copying prompts",
    ]
    for rates in zip(result.greedy, result.sampled, result.copying, strict=True):
        parts = [
            f"{x.tokens_per_second:9.1f} ({x.tokens_per_second / y.tokens_per_second:.2f})"
            for x, y in zip(rates, _plain(result), strict=True)
        ]
        lines.append(f"  {rates[0].way:24}" + "".join(parts))
    drafted = result.greedy[1:] + result.copying[1:]
    same, texts = sum(x.same for x in drafted), sum(x.texts for x in drafted)
    lines += ["", f"Of {texts} greedy texts with a draft {same} are those of the model alone."]
    if same < texts:
        lines.append(
            "In bf16 a run on several tokens rounds otherwise than one on a single token, which can"
        )
        lines.append(
            "decide a near-tie; `python -m benchmarks.greedy_identity` tells that from an error."
        )
    lines += ["", f"{result.seconds:.0f} s in all."]
    if Path(trained.folder).is_dir():
        lines.append(f"The draft is in {trained.folder}.")
    return "\n".join(lines)


def _plain(result: Result) -> list[speed.Rate]:
    return [rates[0] for rates in (result.greedy, result.sampled, result.copying)]
