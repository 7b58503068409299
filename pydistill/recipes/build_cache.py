"""Runs a teacher over texts once and keeps its top-k log-probabilities in a teacher cache.

Texts become documents of at most `length` tokens, in their order; each position's distribution of
the next token is a row. Any end of the process leaves a cache that the same call resumes: rows are
counted in tokens, so a document may be half done, and the tokens already there are compared with
the texts'.

Rows come from the teacher's last hidden states and its head, without logits in memory, where those
make its logits; a model that scales or caps what its head gives is asked for the logits themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill import topk_logprobs
from pydistill.cache import CacheError, CacheWriter, Manifest, TeacherCache, tokenizer_hash
from pydistill.recipes import UsageError, models
from pydistill.recipes import bar as progress_bar
from pydistill.recipes.prompts import shipped

_LOGITS_AT_ONCE = 2**28  # elements of the model's output: 512 MB in bf16
# What models do to their head's output, by the name in the configuration: Cohere, Granite, Gemma,
# Falcon-H1.
_AFTER_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")


@dataclass(frozen=True)
class Options:
    output: Path
    model: str = models.DEFAULT
    text: Path | None = None  # None: the demo's prompts
    k: int = 64
    temperature: float = 1.0
    codes: str = "uint8"
    length: int = 1024


@dataclass(frozen=True)
class Result:
    folder: str
    tokens: int
    documents: int
    resumed_at: int  # tokens that were there already
    bytes_a_token: float
    stored_kl: tuple[float, float]  # mean and maximum
    seconds: float


def run(options: Options, progress: bool = True) -> Result:
    """Builds or resumes the cache in `options.output`; UsageError for what cannot be met."""
    start = time.perf_counter()
    texts = read_texts(options.text)
    teacher, tokenizer = models.load(options.model, models.compute_dtype(), progress)
    try:
        manifest = Manifest(
            model=options.model,
            tokenizer=tokenizer_hash(tokenizer),
            vocab_size=teacher.get_output_embeddings().weight.shape[0],
            k=options.k,
            temperature=options.temperature,
            codes=options.codes,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        with CacheWriter(options.output, manifest) as writer:
            resumed_at = writer.written
            with progress_bar(progress, len(texts), "teacher explains") as bar:
                documents = tokenized(tokenizer, texts, options.length, bar)
                fill(writer, teacher, documents, options)
        cache = TeacherCache.open(options.output, tokenizer=None)
    except (CacheError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise UsageError(said or str(error)) from error
    return Result(
        folder=str(options.output),
        tokens=len(cache),
        documents=len(cache.documents) - 1,
        resumed_at=resumed_at,
        bytes_a_token=cache.disk_bytes() / max(1, len(cache)),
        stored_kl=cache.stored_kl(),
        seconds=time.perf_counter() - start,
    )


def read_texts(path: Path | None) -> list[str | list[dict[str, str]]]:
    """A text, or the messages of a chat, each.

    A file gives one a line: JSON with `text` or `messages` in a file whose name ends in .jsonl,
    plain text in any other; empty lines are left out. None gives the demo's prompts.
    """
    if path is None:
        return [[{"role": "user", "content": prompt}] for part in shipped() for prompt in part]
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {path} cannot be read ({error}); name a UTF-8 file.") from error
    if path.suffix == ".jsonl":
        texts = [_parsed(line, path, i + 1) for i, line in enumerate(lines) if line.strip()]
    else:
        texts = [line for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"the text {path} is empty; name a file with one document a line.")
    return texts


def _parsed(line: str, path: Path, number: int) -> str | list[dict[str, str]]:
    try:
        data = json.loads(line)
        found: Any = data.get("text", data.get("messages"))
    except (json.JSONDecodeError, AttributeError):
        found = None
    if not isinstance(found, str | list):
        raise UsageError(
            f'line {number} of {path} is not {{"text": "..."}} or {{"messages": [...]}}; mend it.'
        )
    return found


def tokenized(
    tokenizer: Any, texts: list[str | list[dict[str, str]]], length: int, bar: Any
) -> Iterator[list[int]]:
    """The documents: each text's tokens, in pieces of at most `length`."""
    for text in texts:
        if isinstance(text, str):
            ids = tokenizer(text)["input_ids"]
        elif tokenizer.chat_template is None:
            ids = tokenizer("\n".join(m["content"] for m in text))["input_ids"]
        else:
            last = text[-1]["role"] == "user"
            chat = tokenizer.apply_chat_template(text, add_generation_prompt=last, tokenize=False)
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), length):
            yield ids[begin : begin + length]
        bar.update()


def fill(
    writer: CacheWriter, teacher: Any, documents: Iterator[list[int]], options: Options
) -> None:
    """Appends every document's rows that `writer` does not have yet."""
    have = _Have(options.output, writer.written)
    head = head_of(teacher)
    at_once = max(options.length, _LOGITS_AT_ONCE // writer.manifest.vocab_size)
    batch: list[tuple[list[int], int]] = []  # a document, and how much of it is written
    for document in documents:
        done = have.skip(document)
        if done == len(document):
            continue
        if batch and (len(batch) + 1) * max(len(d) for d, _ in [*batch, (document, 0)]) > at_once:
            _append(writer, teacher, head, batch, options)
            batch = []
        batch.append((document, done))
    if have.left:
        raise UsageError(
            f"the cache {options.output} has {have.left} tokens more than the text; it was begun"
            " with another text. Resume it with that, or name a new folder."
        )
    if batch:
        _append(writer, teacher, head, batch, options)


class _Have:
    """The tokens that an unfinished cache holds already."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.at, self.left = folder, 0, count
        cache = TeacherCache.open(folder, tokenizer=None, partial=True)
        self.tokens = cache.input_ids(0, count).tolist()

    def skip(self, document: list[int]) -> int:
        """How many of the next document's tokens are there; UsageError if they are others."""
        here = min(len(document), self.left)
        if self.tokens[self.at : self.at + here] != document[:here]:
            raise UsageError(
                f"the cache {self.folder} was begun with another text: they differ within tokens"
                f" {self.at} to {self.at + here - 1}. Resume it with that, or name a new folder."
            )
        self.at, self.left = self.at + here, self.left - here
        return here


@torch.no_grad()
def head_of(teacher: Any) -> Any:
    """The head, if the teacher's logits are its product with the last hidden states and no more;
    else None.

    Its configuration may name what comes after; what the code of a family does without a name
    shows on a few tokens.
    """
    base, head = teacher.base_model, teacher.get_output_embeddings()
    text = teacher.config.get_text_config()
    if base is teacher or type(head) is not torch.nn.Linear:
        return None
    if any(getattr(text, name, None) not in (None, 1) for name in _AFTER_HEAD):
        return None
    ids = torch.arange(min(8, len(head.weight)))[None]
    found = _outputs(base, ids, torch.ones_like(ids))
    states = getattr(found, "last_hidden_state", None)
    if states is None or states.shape[-1] != head.in_features:
        return None
    logits = _outputs(teacher, ids, torch.ones_like(ids)).logits.float()
    bias = None if head.bias is None else head.bias.float()
    ours = torch.nn.functional.linear(states.float(), head.weight.float(), bias)
    rounding = 2 * torch.finfo(models.compute_dtype()).eps
    return head if (logits - ours).norm() <= rounding * logits.norm() else None


def _outputs(model: Any, ids: Tensor, attended: Tensor) -> Any:
    dtype = models.compute_dtype()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids, attention_mask=attended, use_cache=False)


@torch.no_grad()
def _append(
    writer: CacheWriter,
    teacher: Any,
    head: Any,
    batch: list[tuple[list[int], int]],
    options: Options,
) -> None:
    longest = max(len(document) for document, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    for row, (document, _) in enumerate(batch):
        ids[row, : len(document)] = torch.tensor(document)
        attended[row, : len(document)] = 1
    if head is None:
        found, last = _outputs(teacher, ids, attended).logits, {}
    else:
        found = _outputs(teacher.base_model, ids, attended).last_hidden_state
        last = {"weight": head.weight, "bias": head.bias}
    for row, (document, done) in enumerate(batch):
        rows = found[row, done : len(document)]
        top = topk_logprobs(rows, options.k, temperature=options.temperature, **last)
        writer.append(ids[row, done : len(document)], *top[:3], continues=done > 0)


def table(result: Result) -> str:
    mean, most = result.stored_kl
    resumed = f", {result.resumed_at} of them before this run" if result.resumed_at else ""
    return (
        f"{result.tokens} tokens in {result.documents} documents{resumed},"
        f" {result.bytes_a_token:.1f} bytes a token\n"
        f"KL(stored || teacher): mean {mean:.2g}, largest {most:.2g} nats\n"
        f"{result.seconds:.0f} s; the cache is in {result.folder}."
    )
