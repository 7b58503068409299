"""The main job in its first, thin form: a few layers of a language model learn to write like all.

The teacher answers the shipped prompts by sampling; the student, a copy of a few of its layers,
learns the teacher's next-token distribution at every position of those answers by
`pydistill.divergence`; both are compared on answers to prompts held out from training. Training on
the teacher's own text is what makes a good draft for speculative decoding, so the figure of merit
is acceptance, sum min(p, q): the share of the student's draft tokens that the teacher would keep.

Prompts are padded on the left, so the answers of a batch fill the same columns, and the head runs
on those columns only. The teacher's logits on them are computed once and kept in its dtype.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pydistill
from pydistill import _registry
from pydistill.recipes import UsageError, models
from pydistill.recipes.compare import Measurement, compare

HELD_OUT = "# held out"


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


@dataclass(frozen=True)
class Answers:
    """Prompts and sampled answers; an answer is not counted after its end token."""

    ids: Tensor  # [N, P + T]
    attended: Tensor  # [N, P + T]
    counted: Tensor  # [N, T]

    def __getitem__(self, rows: Tensor | slice) -> Answers:
        return Answers(self.ids[rows], self.attended[rows], self.counted[rows])


def prompts() -> tuple[list[str], list[str]]:
    """The shipped prompts: those to train on, and those held out."""
    text = resources.files("pydistill.recipes").joinpath("data/prompts.txt").read_text("utf-8")
    parts = text.split(HELD_OUT)
    train, held_out = (
        [line for line in part.splitlines() if line and not line.startswith("#")] for part in parts
    )
    return train, held_out


def run(options: Options, progress: bool = True) -> Result:
    """Distils, measures, and saves the student if asked, with progress bars on stderr."""
    start = time.perf_counter()
    if options.output is not None:
        _check_output(options.output)
    dtype = compute_dtype()
    teacher, tokenizer = models.load(options.model, dtype, progress)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        student, chosen = models.shallow_copy(teacher, options.layers)
        train, held_out = prompts()
        with _bar(progress, options.new_tokens, "teacher answers") as bar:
            began = time.perf_counter()
            everything = sample(teacher, tokenizer, train + held_out, options, bar)
            sampling = int(everything.counted.sum()) / (time.perf_counter() - began)
        with _bar(progress, len(everything.ids), "teacher explains") as bar:
            wanted = teacher_logits(teacher, everything, options, dtype, bar)
        split = len(train) * options.answers
        learn, judge = slice(None, split), slice(split, None)
        seen, unseen = everything[learn], everything[judge]

        before = evaluate(student, unseen, wanted[judge], options, dtype)
        with _bar(progress, options.steps, "student learns") as bar:
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
        _save(options.output, student, tokenizer)
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


def compute_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it natively, else fp32, which is then faster."""
    native: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def sample(model: Any, tokenizer: Any, texts: list[str], options: Options, bar: Any) -> Answers:
    """`options.answers` sampled answers to each text, in the texts' order, all in one batch."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Tick(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            bar.update()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    chat = tokenizer.chat_template is not None
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
    )
    ids, attended = batch["input_ids"], batch["attention_mask"]
    out = model.generate(
        input_ids=ids,
        attention_mask=attended,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=options.answers,
        max_new_tokens=options.new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([Tick()]),
    )
    answer = out[:, ids.shape[1] :]
    attended = attended.repeat_interleave(options.answers, 0)
    attended = torch.cat([attended, torch.ones_like(answer)], -1)
    return Answers(out, attended, counted(answer, model.generation_config.eos_token_id))


def counted(answer: Tensor, end: int | list[int] | None) -> Tensor:
    """Which tokens of `answer [N, T]` were written: all up to an end token, and that one."""
    ended = torch.isin(answer, torch.tensor([] if end is None else end, dtype=answer.dtype))
    return ended.cumsum(-1) - ended.long() == 0


def answer_logits(model: Any, texts: Answers, dtype: torch.dtype) -> Tensor:
    """The logits `[N, T, V]` from which each token of the answers was or would be drawn."""
    attended = texts.attended[:, :-1]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(
            input_ids=texts.ids[:, :-1],
            attention_mask=attended,
            position_ids=(attended.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=texts.counted.shape[1],
        ).logits
    return logits


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
    warm = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.1, 1 - i / options.steps))
    )
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


def _bar(shown: bool, total: int, label: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, file=sys.stderr, disable=not shown, dynamic_ncols=True)


def _check_output(folder: Path) -> None:
    """Refuses before the work what could not be written after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output {folder} exists already; name a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {folder} cannot be made ({error.strerror}); name a folder that can."
        ) from error


def _save(folder: Path, student: Any, tokenizer: Any) -> None:
    try:
        models.write_folder(folder, lambda part: models.save(part, student, tokenizer))
    except OSError as error:
        raise UsageError(
            f"the student cannot be written to {folder} ({error.strerror or error}); free some"
            " space there or name another --output."
        ) from error


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
