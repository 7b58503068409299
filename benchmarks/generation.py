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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pydistill.recipes import UsageError, bar, models, prompts, speed
from pydistill.recipes.write import load_draft

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(options: argparse.Namespace) -> dict[str, list[speed.Rate]]:
    dtype = DTYPES[options.dtype]
    target, tokenizer = models.load(options.model, dtype)
    drafts: dict[str, Any] = {"none": None}
    for name in options.draft:
        drafts[name], _ = load_draft(target, name, dtype, progress=False)
    contestants = speed.ways(target, drafts, assisted=True)
    sets = {"held-out": prompts.shipped()[1], "copying": prompts.copying()}
    found = {}
    for kind, texts in sets.items():
        chosen = texts[: options.prompts]
        for temperature in options.temperature:
            label = f"{kind} prompts, temperature {temperature:g}"
            with bar(True, len(contestants) * (len(chosen) + 1), label) as shown:
                found[label] = speed.measure(
                    tokenizer, chosen, contestants, new_tokens=options.max_new_tokens,
                    temperature=temperature, seed=options.seed, bar=shown,
                )  # fmt: skip
    return found


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
        found = run(options)
    except UsageError as error:
        print(f"benchmarks.generation: {error}", file=sys.stderr)
        return 2
    for label, rates in found.items():
        print("\n".join([f"{label}, {options.dtype}", "", *speed.table(rates), ""]))
    if options.output is not None:
        text = json.dumps({k: [asdict(x) for x in v] for k, v in found.items()}, indent=2)
        options.output.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
