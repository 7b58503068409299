"""The main job in its first, thin form: a few layers of a language model learn to write like all.

The teacher answers the shipped prompts by sampling; the student, a copy of a few of its layers,
learns the teacher's next-token distribution at every position of those answers by
`pydistill.divergence`; both are compared on answers to prompts held out from training. Training on
the teacher's own text is what makes a good draft for speculative decoding, so the figure of merit
is acceptance, sum min(p, q): the share of the student's draft tokens that the teacher would keep.

The teacher's logits on the answers are computed once and kept in its dtype.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pydistill
from pydistill import _registry
from pydistill.recipes import bar as progress_bar
from pydistill.recipes import models, rate_at
from pydistill.recipes.answers import Answers, answer_logits, encode, prompts, sample
from pydistill.recipes.compare import Measurement, compare


@dataclass(frozen=True)
class Options:
    model: str = models.DEFAULT
    layers: int = 6
    kind: str = "forward_kl"
    steps: int = 60
    seed: int = 0
    output: Path | None = None
    batch: int = 8
    answers: int = 2  # per prompt
    new_tokens: int = 64  # per answer
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Quality:
    """Means over the held-out positions."""

    loss: float
    acceptance: float
    same_choice: float


@dataclass(frozen=True)
class Result:
    options: Options
    teacher_layers: int
    student_layers: list[int]
    parameters: tuple[int, int]  # teacher, student
    before: Quality
    after: Quality
    losses: list[float] = field(repr=False)  # of every training step
    sampling_tokens_per_second: float
    training_tokens_per_second: float
    rows: int
    vocabulary: int
    dtype: str
    backend: str
    compared: list[Measurement]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        output = self.options.output
        data["options"]["output"] = None if output is None else str(output)
        return data


def run(options: Options, progress: bool = True) -> Result:
    """Distils, measures, and saves the student if asked, with progress bars on stderr."""
    start = time.perf_counter()
    if options.output is not None:
        models.check_output(options.output)
    dtype = models.compute_dtype()
    teacher, tokenizer = models.load(options.model, dtype, progress)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        student, chosen = models.shallow_copy(teacher, options.layers)
        train, held_out = prompts()
        with progress_bar(progress, options.new_tokens, "teacher answers") as bar:
            began = time.perf_counter()
            everything = sample(
                teacher, *encode(tokenizer, train + held_out), answers=options.answers,
                new_tokens=options.new_tokens, pad=tokenizer.pad_token_id, dtype=dtype, bar=bar,
            )  # fmt: skip
            sampling = int(everything.counted.sum()) / (time.perf_counter() - began)
        with progress_bar(progress, len(everything.ids), "teacher explains") as bar:
            wanted = teacher_logits(teacher, everything, options, dtype, bar)
        split = len(train) * options.answers
        learn, judge = slice(None, split), slice(split, None)
        seen, unseen = everything[learn], everything[judge]

        before = evaluate(student, unseen, wanted[judge], options, dtype)
        with progress_bar(progress, options.steps, "student learns") as bar:
            began = time.perf_counter()
            losses, tokens = distil(student, seen, wanted[learn], options, dtype, bar)
            training = tokens / (time.perf_counter() - began)
        after = evaluate(student, unseen, wanted[judge], options, dtype)

    with torch.no_grad():
        few = slice(None, max(1, 1024 // options.new_tokens))
        pair = [
            logits.flatten(0, 1).clone()
            for logits in (answer_logits(student, unseen[few], dtype), wanted[judge][few])
        ]
    measured = compare(pair[0], pair[1])
    if options.output is not None:
        models.save_output(options.output, student, tokenizer)
    operator = _registry.OPERATORS["divergence"]
    return Result(
        options=options,
        teacher_layers=teacher.config.num_hidden_layers,
        student_layers=chosen,
        parameters=(teacher.num_parameters(), student.num_parameters()),
        before=before,
        after=after,
        losses=losses,
        sampling_tokens_per_second=sampling,
        training_tokens_per_second=training,
        rows=pair[0].shape[0],
        vocabulary=pair[0].shape[1],
        dtype=str(pair[0].dtype).removeprefix("torch."),
        backend=_registry.explain(operator, "cpu", pair[0].dtype).backend,
        compared=measured,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def teacher_logits(
    teacher: Any, texts: Answers, options: Options, dtype: torch.dtype, bar: Any
) -> Tensor:
    """The teacher's logits on all answers, in batches that bound the memory of its activations."""
    parts = []
    for rows in _in_order(texts, options):
        parts.append(answer_logits(teacher, texts[rows], dtype))
        bar.update(len(rows))
    return torch.cat(parts)


@torch.no_grad()
def evaluate(
    student: Any, texts: Answers, wanted: Tensor, options: Options, dtype: torch.dtype
) -> Quality:
    """How near the student is to the teacher's logits `wanted` on the answers' positions."""
    student.eval()
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for rows in _in_order(texts, options):
        here = texts.counted[rows]
        found = pydistill.divergence_with_stats(
            answer_logits(student, texts[rows], dtype),
            wanted[rows],
            options.kind,
            mask=here,
            reduction="none",
        )
        seen = [x[here] for x in (found.loss, found.acceptance, found.argmax_agreement)]
        totals += torch.stack([x.double().sum() for x in seen])
        count += seen[0].numel()
    return Quality(*(totals / count).tolist())


def distil(
    student: Any, texts: Answers, wanted: Tensor, options: Options, dtype: torch.dtype, bar: Any
) -> tuple[list[float], int]:
    """`options.steps` steps of AdamW on fp32 weights: the losses, and how many tokens taught."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i, options.steps))
    losses, tokens = [], 0
    for rows in itertools.islice(_batches(len(texts.ids), options.batch), options.steps):
        here = texts.counted[rows]
        loss = pydistill.divergence(
            answer_logits(student, texts[rows], dtype), wanted[rows], options.kind, mask=here
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tokens += int(here.sum())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
    return losses, tokens


def _in_order(texts: Answers, options: Options) -> Iterator[Tensor]:
    yield from torch.split(torch.arange(len(texts.ids)), options.batch)


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """Row numbers, epoch after epoch in a new order; the last batch of an epoch may be short."""
    while True:
        yield from torch.split(torch.randperm(count), size)


def table(result: Result) -> str:
    """The result for a reader who knows none of the terms."""
    options, before, after = result.options, result.before, result.after
    teacher, student = (f"{count / 1e6:.0f}M" for count in result.parameters)
    lines = [
        f"{options.model}: {result.teacher_layers} layers ({teacher} parameters) taught"
        f" {len(result.student_layers)} of them ({student}) in {options.steps} steps of"
        f" {options.kind}, seed {options.seed}.",
        "",
        "On prompts the student never saw                        before     after",
        f"  divergence from the teacher, nats a token         {before.loss:10.3f}"
        f"{after.loss:10.3f}",
        f"  acceptance: draft tokens the teacher would keep   {before.acceptance:10.1%}"
        f"{after.acceptance:10.1%}",
        f"  same most likely next token                       {before.same_choice:10.1%}"
        f"{after.same_choice:10.1%}",
        "",
        "Tokens a second",
        f"  teacher answering                                 "
        f"{result.sampling_tokens_per_second:10.0f}",
        f"  student learning                                  "
        f"{result.training_tokens_per_second:10.0f}",
        "",
        f"Forward KL and its gradient on these models' logits, {result.rows:,} x"
        f" {result.vocabulary:,} {result.dtype}, {result.backend} backend",
        "                                        best ms   median ms   peak MB",
    ]
    for m in result.compared:
        peak = "not seen" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:.0f}"
        lines.append(f"  {m.way:34}{m.minimum * 1e3:11.0f}{m.median * 1e3:12.0f}{peak:>10}")
    eager, ours = result.compared[:2]
    if abs(ours.loss - eager.loss) > 0.1 * abs(eager.loss):
        lines.append(f"  no ratio: the losses differ, {eager.loss:.4f} and {ours.loss:.4f}")
    else:
        lines.append(
            f"  pydistill is {eager.minimum / ours.minimum:.1f} times as fast as eager (best),"
            f" {eager.median / ours.median:.1f} times (median)"
        )
    lines += ["", f"{result.seconds:.0f} s in all."]
    if options.output is not None:
        lines.append(f"The student is in {options.output}.")
    return "\n".join(lines)
