"""Tokens a second of a real model with trained drafts: `pydistill.generate` against transformers'.

    pydistill draft --output draft --draft feature:2+1 --divergence tvd
    python -m benchmarks.generation --draft ./draft layers:6 ngram

Held-out prompts and prompts whose answers repeat them, greedy and sampled at temperature 1, one at
a time, all ways in turn (`pydistill.recipes.speed`). Drafts that transformers takes, too, models
with a whole head and prompt lookup, are also given to its assisted generation. The loop without a
draft, "none", is always among the ways.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pydistill.recipes import UsageError, bar, models, prompts, speed
from pydistill.recipes.write import load_draft
from pydistill.speculative.cached_model import context_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(
    options: argparse.Namespace, show: Callable[[str, list[speed.Rate]], None] = lambda *_: None
) -> dict[str, list[speed.Rate]]:
    """Rates for each kind of prompt and temperature, each shown as it is there; UsageError for what
    cannot be met."""
    check(options)
    dtype = DTYPES[options.dtype]
    target, tokenizer = models.load(options.model, dtype)
    drafts: dict[str, Any] = {"none": None}
    for name in options.draft:
        drafts[name], _ = load_draft(target, name, dtype, progress=False)
    contestants = speed.ways(target, drafts, assisted=True)
    sets = {"held-out": prompts.shipped()[1], "copying": prompts.copying()}
    sets = {kind: texts[: options.prompts] for kind, texts in sets.items()}
    asked = prompts.encoded(tokenizer, [text for texts in sets.values() for text in texts])
    _check_lengths(target, asked, options.max_new_tokens)
    found = {}
    for kind, chosen in sets.items():
        for temperature in options.temperature:
            label = f"{kind} prompts, temperature {temperature:g}"
            with bar(True, len(contestants) * (len(chosen) + 1), label) as shown:
                try:
                    found[label] = speed.measure(
                        tokenizer, chosen, contestants, new_tokens=options.max_new_tokens,
                        temperature=temperature, seed=options.seed, bar=shown,
                    )  # fmt: skip
                except ValueError as error:  # a draft of another model
                    raise UsageError(str(error)) from error
            show(label, found[label])
    return found


def check(options: argparse.Namespace) -> None:
    """UsageError for what would measure nothing, or something else than its label says."""
    for name in ("max_new_tokens", "prompts"):
        if (count := getattr(options, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {count} is no positive number; pass 1.")
    for temperature in options.temperature:
        if not 0 <= temperature < math.inf:
            raise UsageError(
                f"--temperature {temperature:g} is outside 0 to infinity; pass 0 for greedy texts,"
                " or 1 for the model's own law."
            )
    if options.output is not None and (
        options.output.is_dir() or not options.output.absolute().parent.is_dir()
    ):
        raise UsageError(f"--output {options.output} is no file in a folder that is there.")


def _check_lengths(target: Any, asked: list[list[int]], new_tokens: int) -> None:
    """Before the work: transformers writes past the context without a word."""
    longest, context = max(map(len, asked)), context_of(target)
    if context and longest + new_tokens > context:
        raise UsageError(
            f"a prompt of {longest} tokens and --max-new-tokens {new_tokens} do not fit into the"
            f" model's context of {context}; pass {max(1, context - longest)} at most."
        )


def _print(dtype: str, label: str, rates: list[speed.Rate]) -> None:
    print("\n".join([f"{label}, {dtype}", "", *speed.table(rates), ""]), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--draft", nargs="+", default=["ngram"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8, help="of each kind (8)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    try:
        found = run(options, partial(_print, options.dtype))
    except UsageError as error:
        print(f"benchmarks.generation: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        text = json.dumps({k: [asdict(x) for x in v] for k, v in found.items()}, indent=2)
        options.output.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
