"""Whether speculative text is the target's own, token by token, on a real model.

    python -m benchmarks.greedy_identity                    # fp32: greedy text is transformers'
    python -m benchmarks.greedy_identity --dtype bf16       # where it is not, and by what margin
    python -m benchmarks.greedy_identity --dtype fp64       # the control

Greedy text of every draft, one prompt at a time, is compared with that of transformers' `generate`;
then greedy and sampled text of a batch of all prompts with those one prompt at a time, seed for
seed. Nothing is timed.

A text may differ without an error of the decoding: a model's products round differently by how many
tokens and requests a run has, and where two tokens are as likely as rounding can tell, or a coin
falls where it moves the law, another token is right, too. So the first difference of each prompt is
put before a referee, the same weights in fp64. The margin is its logit of the expected token minus
that of the token found, the rounding the largest error of the dtype's logits in that row, both from
a fresh run over the common text. Two runs that each err by at most the rounding can disagree where
the margin is at most twice that: a near-tie. Anything else is wrong, and so is any difference of
greedy text in fp32. Sampled text is not judged, since any coin may fall between two laws; the total
variation between them says how often one does.

The control judges it, exactly: logits of the model in fp64, rounded to fp32, hardly ever differ, so
that a batch and its requests see identical logits, and nothing at all may differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pydistill
from pydistill.recipes import UsageError, bar, models
from pydistill.recipes.prompts import encoded, padded, shipped
from pydistill.recipes.write import load_draft

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
DRAFTS = ("layers:27", "ngram")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
PLAIN, ALONE = "transformers", "one by one"


@dataclass(frozen=True)
class Divergence:
    """The first difference of one text."""

    prompt: int
    token: int  # its place behind the prompt
    expected: int | None  # None: the text has ended
    found: int | None
    margin: float  # of the expected token's logit, fp64
    rounding: float  # the largest error of the row's logits
    total_variation: float  # between the row's softmax in the dtype and in fp64

    @property
    def near_tie(self) -> bool:
        return abs(self.margin) <= 2 * self.rounding


@dataclass
class Comparison:
    """One way to decode, against what it should write."""

    draft: str
    sampled: bool
    batched: bool
    against: str
    block_efficiency: float
    tokens: int
    texts: int
    divergences: list[Divergence] = field(default_factory=list)

    def wrong(self, dtype: str) -> list[Divergence]:
        """What rounding does not explain, or what has no excuse."""
        if dtype == "fp64" or (dtype == "fp32" and not self.sampled and not self.batched):
            return self.divergences
        return [] if self.sampled else [x for x in self.divergences if not x.near_tie]


class Referee:
    """Judges differences by the weights in fp64 (the model's norms stay in fp32)."""

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.exact = target, models.load(name, torch.float64)[0]

    @torch.inference_mode()
    def judge(
        self, index: int, prompt: list[int], expected: list[int], found: list[int]
    ) -> Divergence | None:
        if expected == found:
            return None
        most = max(len(expected), len(found))
        here = next(i for i in range(most) if expected[i : i + 1] != found[i : i + 1])
        text = torch.tensor([prompt + expected[:here]])
        row, exact = (m(text).logits[0, -1].double() for m in (self.target, self.exact))
        pair = [x[here] if here < len(x) else None for x in (expected, found)]
        logits = [float("nan") if x is None else float(exact[x]) for x in pair]
        return Divergence(
            index, here, *pair,
            margin=logits[0] - logits[1],
            rounding=float((row - exact).abs().max()),
            total_variation=float((row.softmax(-1) - exact.softmax(-1)).abs().sum() / 2),
        )  # fmt: skip


@dataclass(frozen=True)
class Options:
    model: str = models.DEFAULT
    dtype: str = "fp32"
    drafts: Sequence[str] = DRAFTS
    prompts: int = 20
    new_tokens: int = 200
    num_draft_tokens: int = 4


def run(options: Options, progress: bool = True) -> list[Comparison]:
    """Every comparison; UsageError for what cannot be met."""
    dtype = DTYPES[options.dtype]
    target, tokenizer = _load(options.model, dtype)
    referee = Referee(target, options.model)
    train, held_out = shipped()
    texts = (held_out + train)[: options.prompts]
    ids, mask = padded(encoded(tokenizer, texts))
    single = [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]
    common: dict[str, Any] = {
        "max_new_tokens": options.new_tokens, "pad_token_id": tokenizer.pad_token_id
    }  # fmt: skip
    with bar(progress, len(texts), "transformers") as shown, torch.inference_mode():
        plain = []
        for prompt in single:
            found = target.generate(
                input_ids=prompt[None], attention_mask=_seen(prompt), do_sample=False, **common
            )  # fmt: skip
            plain.append(found[0, len(prompt) :].tolist())
            shown.update()

    comparisons = []
    drafts = {name: load_draft(target, name, dtype, False)[0] for name in options.drafts}
    for draft in drafts.values():
        if dtype == torch.float64 and not isinstance(draft, str):
            _round_logits(draft)
    for sampled in (False, True):
        for name, draft in drafts.items():
            settings = {
                **common, **(SAMPLING if sampled else {"do_sample": False}),
                "num_draft_tokens": options.num_draft_tokens,
            }  # fmt: skip
            alone, blocks = [], 0
            label = f"{name}, {'sampled' if sampled else 'greedy'}"
            with bar(progress, len(texts), label) as shown:
                for seed, prompt in enumerate(single):
                    one = pydistill.generate(
                        target, draft, prompt[None], attention_mask=_seen(prompt), seed=seed,
                        **settings,
                    )  # fmt: skip
                    alone.append(_written(one)[0])
                    blocks += one.stats.request_blocks
                    shown.update()
            batch = pydistill.generate(target, draft, ids, attention_mask=mask, seed=0, **settings)
            count = sum(map(len, alone))
            pairs = [] if sampled else [(PLAIN, False, plain, alone, count / blocks)]
            pairs.append((ALONE, True, alone, _written(batch), batch.stats.block_efficiency))
            for against, batched, expected, found, efficiency in pairs:
                judged = [
                    referee.judge(i, prompt.tolist(), *pair)
                    for i, (prompt, *pair) in enumerate(zip(single, expected, found, strict=True))
                ]
                comparisons.append(
                    Comparison(
                        name, sampled, batched, against, efficiency, sum(map(len, found)),
                        len(texts), [x for x in judged if x is not None],
                    )
                )  # fmt: skip
                if progress:
                    print(table(comparisons[-1:], options.dtype), file=sys.stderr)
    return comparisons


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    model, tokenizer = models.load(name, dtype)
    model.generation_config.eos_token_id = None  # every text is written to its full length
    if dtype == torch.float64:
        _round_logits(model)
    return model, tokenizer


def _round_logits(model: Any) -> None:
    """Lets `model` return its logits in fp32."""

    def rounded(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits.float()
        return output

    model.register_forward_hook(rounded)


def _seen(prompt: Tensor) -> Tensor:
    """All of it: end tokens of earlier turns, which pad here, too, are text."""
    return torch.ones(1, len(prompt), dtype=torch.int64)


def _written(found: Any) -> list[list[int]]:
    tokens: Tensor = found.tokens
    rows = zip(tokens.tolist(), found.num_tokens.tolist(), strict=True)
    return [row[:count] for row, count in rows]


def table(comparisons: list[Comparison], dtype: str) -> str:
    lines = []
    for x in comparisons:
        kind = f"{x.draft}, {'sampled' if x.sampled else 'greedy'}, "
        kind += f"{'in a batch' if x.batched else ALONE} against {x.against}"
        lines.append(
            f"{kind}: {x.texts - len(x.divergences)} of {x.texts} texts the same"
            f" ({x.tokens} tokens, {x.block_efficiency:.2f} a run of the target)"
        )
        wrong = x.wrong(dtype)
        for d in x.divergences:
            verdict = "WRONG" if d in wrong else "not judged" if x.sampled else "a near-tie"
            lines.append(
                f"  prompt {d.prompt}, token {d.token}: {d.found} for {d.expected},"
                f" margin {d.margin:.3g}, rounding {d.rounding:.2g}, total variation"
                f" {d.total_variation:.2g}: {verdict}"
            )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """0 if nothing is wrong, 1 if something is, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.greedy_identity")
    parser.add_argument("--model", default=models.DEFAULT, help="a Hugging Face id or a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--draft", action="append", help=f"may be repeated ({', '.join(DRAFTS)})")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    options = Options(
        given.model, given.dtype, given.draft or DRAFTS, given.prompts, given.new_tokens,
        given.num_draft_tokens,
    )  # fmt: skip
    try:
        comparisons = run(options)
    except UsageError as error:
        print(f"greedy_identity: {error}", file=sys.stderr)
        return 2
    print(table(comparisons, options.dtype))
    if given.json:
        given.json.write_text(json.dumps([asdict(x) for x in comparisons], indent=1))
    return int(any(x.wrong(options.dtype) for x in comparisons))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
