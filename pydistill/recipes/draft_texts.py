"""What a draft learns from: texts, one after the other, with the target's states on them.

The target writes its answers once, in large batches with a key-value cache, and what it computed on
the way is all that training asks of it: its last hidden state at every token, and the
log-normaliser of the row that each answer's token was drawn from. With the head these give the
rows, over all tokens or over a sub-vocabulary, at a fraction of a run of the target; so no step of
training runs it again. Answers are kept on disk by all that they depend on, and serve every draft
that is trained on the same.

A batch is packed: texts lie behind each other in rows of equal width, each sees itself alone, and
little is computed on padding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.verify import verify
from pydistill.recipes import UsageError
from pydistill.recipes.build_cache import head_of
from pydistill.speculative.cached_model import CachedModel, attention_mask, vocabulary_of_head

_COMPACT = 0.75  # of the rows of a cache, below which the ended ones are taken out
_VERSION = 1  # of the files
OWN_LENGTH = 48  # tokens of a prompt that the target writes, at most


@dataclass(frozen=True)
class Texts:
    """D documents of M tokens in all. Row i is about what follows token i; the last token of a
    document has none."""

    tokens: Tensor  # int32 [M]
    begins: Tensor  # int64 [D + 1]
    taught: Tensor  # bool [M]: the rows that count
    states: Tensor | None = None  # [M, H], the target's last hidden states
    lse: Tensor | None = None  # fp32 [M], log sum exp(logits / T), where taught
    rows: Tensor | None = None  # int64 [M], of a teacher cache

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, documents: Tensor) -> Texts:
        ends = self.begins[documents + 1].tolist()
        spans = zip(self.begins[documents].tolist(), ends, strict=True)
        index = torch.cat([torch.arange(begin, end) for begin, end in spans])
        lengths = self.begins[documents + 1] - self.begins[documents]
        begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return Texts(
            self.tokens[index], begins, self.taught[index],
            *(None if x is None else x[index] for x in (self.states, self.lse, self.rows)),
        )  # fmt: skip

    def lists(self) -> list[list[int]]:
        tokens, begins = self.tokens.tolist(), self.begins.tolist()
        return [tokens[a:b] for a, b in itertools.pairwise(begins)]


def texts_of(documents: Sequence[Sequence[int]], prompts: Sequence[int]) -> Texts:
    """Documents whose first `prompts[i]` tokens, at least one, are not taught."""
    lengths = torch.tensor([len(x) for x in documents])
    begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.tensor([t for x in documents for t in x], dtype=torch.int32)
    place = torch.arange(len(tokens)) - begins[:-1].repeat_interleave(lengths)
    first = torch.tensor(list(prompts)).repeat_interleave(lengths) - 1
    taught = (place >= first) & (place < lengths.repeat_interleave(lengths) - 1)
    return Texts(tokens, begins, taught)


@dataclass(frozen=True)
class Packed:
    """Texts in rows `[R, W]`."""

    ids: Tensor  # int64, 0 where there is no text
    positions: Tensor  # int64, of a token in its text
    index: Tensor  # int64, of a token in the texts; -1 where there is none
    seen: Tensor  # bool [R, W, W]: the earlier tokens of the same text, and itself

    def places(self, taught: Tensor) -> Tensor:
        """int64 `[N]`, into the flattened rows, of the taught tokens in the texts' order."""
        flat = self.index.flatten()
        where = torch.empty(len(taught), dtype=torch.int64)
        where[flat[flat >= 0]] = torch.arange(flat.numel())[flat >= 0]
        return where[taught]

    def spread(self, values: Tensor) -> Tensor:
        """Values of the texts' tokens `[M, ...]` as `[R, W, ...]`, 0 where there is no text."""
        found = values[self.index.clamp(min=0)]
        found[self.index < 0] = 0
        return found


def pack(texts: Texts, width: int) -> Packed:
    """Each text goes into the first row with room, the longest first; rows are at least as wide as
    the longest text."""
    lengths = (texts.begins[1:] - texts.begins[:-1]).tolist()
    width, rows, room = max(width, *lengths), list[list[int]](), list[int]()
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= lengths[text]
    width -= min(room)  # no row needs more
    index = torch.full((len(rows), width), -1)
    number = torch.full((len(rows), width), -1)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, members in enumerate(rows):
        at = 0
        for text in members:
            span = slice(at, at + lengths[text])
            positions[row, span] = torch.arange(lengths[text])
            index[row, span] = int(texts.begins[text]) + positions[row, span]
            number[row, span] = text
            at = span.stop
    seen = (number[:, :, None] == number[:, None, :]).tril()
    ids = torch.where(index < 0, 0, texts.tokens.long()[index.clamp(min=0)])
    return Packed(ids, positions, index, seen)


class Reader:
    """A causal model's rows of logits at chosen places: its states first, its head there alone."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.head = model, dtype, head_of(model)

    def states(self, packed: Packed) -> Tensor:
        """The last hidden states `[R, W, H]`; where the head is not all that follows them, what
        follows: the logits."""
        model = self.model if self.head is None else self.model.base_model
        mask = attention_mask(self.model, packed.seen[:, None])
        with autocast(self.dtype):
            found = model(
                input_ids=packed.ids, attention_mask=mask, position_ids=packed.positions,
                use_cache=False,
            )  # fmt: skip
        states: Tensor = found.logits if self.head is None else found.last_hidden_state
        return states

    def logits(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Of chosen states, over all that the head knows or over `tokens` of them."""
        if self.head is None:
            return states if tokens is None else states[..., tokens]
        weight, bias = self.head.weight, self.head.bias
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        with autocast(self.dtype):
            return torch.nn.functional.linear(states.to(weight.dtype), weight, bias)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@dataclass
class Written:
    """An answer: its tokens and, if they were wanted, the states of prompt and answer but for the
    last token, and the log-normalisers of the answer's rows."""

    tokens: list[int]
    lse: list[float]
    states: Tensor | None = None


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    new_tokens: int,
    warpers: dict[str, Any],
    *,
    ends: Sequence[int] = (),
    keep_states: bool = False,
    bar: Any = None,
) -> list[Written]:
    """An answer to each prompt, sampled together; `bar` advances by one a token of all.

    An answer depends on its prompt, its seed and, to rounding, on nothing else. Rows that have
    ended stay until they are a quarter: taking them out copies the cache.
    """
    cached, head = CachedModel(model, len(prompts), keep_states), vocabulary_of_head(model)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(x)) + list(x) for x in prompts])
    found = [Written([], []) for _ in prompts]
    rows, over, counts = list(range(len(prompts))), set[int](), [len(x) for x in prompts]
    coins = torch.tensor([_wrapped(x) for x in seeds])

    def leave(row: int, place: int, states: Tensor | None) -> None:
        if states is not None:
            kept = states[place, states.shape[1] - cached.lengths[place] :]
            count = len(prompts[row]) + len(found[row].tokens) - 1
            found[row].states = kept[:count].clone()

    for step in range(new_tokens):
        logits = cached.extend(ids, counts, 1)
        empty = torch.empty(len(rows), 0, dtype=torch.int64)
        drawn = verify(logits, None, empty, seed=coins[rows], position=step, **warpers)
        ids, counts = drawn.tokens, [1] * len(rows)
        if bool((ids < 0).any()):
            raise UsageError(
                "a model's logits have no softmax (NaN or infinity), so nothing can be sampled;"
                " mend its weights, or name another model."
            )
        if head is not None:
            ids = head[ids]
        for row, token, lse in zip(
            rows, ids[:, 0].tolist(), drawn.target_lse[:, 0].tolist(), strict=True
        ):
            if row not in over:
                found[row].tokens.append(token)
                found[row].lse.append(lse)
                if token in ends:
                    over.add(row)
        if bar is not None:
            bar.update()
        going = [place for place, row in enumerate(rows) if row not in over]
        if step == new_tokens - 1 or len(going) <= _COMPACT * len(rows):
            states = cached.states(max(cached.lengths)) if keep_states else None
            last = step == new_tokens - 1
            for place, row in enumerate(rows):
                if last or row in over:
                    leave(row, place, states)
            if last or not going:
                break
            cached.select(going)
            rows, ids, counts = [rows[x] for x in going], ids[going], counts[: len(going)]
    return found


def answers_of(
    target: Any,
    prompts: Sequence[Sequence[int]],
    *,
    answers: int,
    new_tokens: int,
    batch: int,
    seed: int,
    ends: Sequence[int],
    warpers: dict[str, Any],
    keep_states: bool,
    bar: Any = None,
) -> Texts:
    """`answers` of the target to each prompt, `batch` at a time, those of like length together."""
    asked = [i for i in range(len(prompts)) for _ in range(answers)]
    order = sorted(range(len(asked)), key=lambda i: (-len(prompts[asked[i]]), i))
    found: list[Written | None] = [None] * len(asked)
    for begin in range(0, len(order), batch):
        here = order[begin : begin + batch]
        done = write(
            target, [prompts[asked[i]] for i in here], [mixed(seed, i) for i in here], new_tokens,
            warpers, ends=ends, keep_states=keep_states, bar=bar,
        )  # fmt: skip
        for i, answer in zip(here, done, strict=True):
            found[i] = answer
    complete = [x for x in found if x is not None]
    texts = texts_of(
        [[*prompts[i], *x.tokens] for i, x in zip(asked, complete, strict=True)],
        [len(prompts[i]) for i in asked],
    )
    if not keep_states:
        return texts
    states = []
    for x in complete:
        assert x.states is not None
        states += [x.states, x.states.new_zeros(1, x.states.shape[1])]
    lse = torch.zeros(len(texts.tokens))
    lse[texts.taught] = torch.tensor([v for x in complete for v in x.lse])
    return Texts(texts.tokens, texts.begins, texts.taught, torch.cat(states), lse)


@torch.no_grad()
def with_states(target: Reader, texts: Texts, width: int, temperature: float, bar: Any) -> Texts:
    """The texts with the target's states, of one run over each."""
    if target.head is None:
        return texts
    states = torch.zeros(len(texts.tokens), target.head.in_features, dtype=target.model.dtype)
    lse = torch.zeros(len(texts.tokens))
    for documents in torch.split(torch.arange(len(texts)), 16):
        part = texts[documents]
        packed = pack(part, width)
        found = target.states(packed)
        index = packed.index + texts.begins[documents[0]]
        here = packed.index >= 0
        states[index[here]] = found[here].to(states.dtype)
        taught = torch.arange(len(part.tokens))[part.taught] + texts.begins[documents[0]]
        for rows in torch.split(taught, 1024):
            lse[rows] = (target.logits(states[rows]).float() / temperature).logsumexp(-1)
        bar.update(len(documents))
    return Texts(texts.tokens, texts.begins, texts.taught, states, lse)


def own_prompts(
    target: Any, tokenizer: Any, count: int, batch: int, seed: int, ends: Sequence[int], bar: Any
) -> list[str]:
    """Users' messages that the target itself writes, being shown the template up to where one
    stands (Magpie, Xu et al. 2024, arXiv 2406.08464); each once, without the empty ones. `bar`
    advances by one a token of all."""
    if tokenizer.chat_template is None:
        raise UsageError("--own-prompts needs a tokenizer with a chat template; name --prompts.")
    mark = "MESSAGE"
    shown = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    prefix = tokenizer(shown[: shown.index(mark)], add_special_tokens=False)["input_ids"]
    found: dict[str, None] = {}
    for begin in range(0, count, batch):
        seeds = [mixed(seed, i) for i in range(begin, min(count, begin + batch))]
        prefixes, plain = [prefix] * len(seeds), {"temperature": 1.0}
        for x in write(target, prefixes, seeds, OWN_LENGTH, plain, ends=ends, bar=bar):
            text = tokenizer.decode(x.tokens, skip_special_tokens=True).strip()
            if text:
                found[text] = None
    return list(found)


def fingerprint(model: Any) -> str:
    """Of the weights: a few numbers of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in model.named_parameters():
        step = max(1, value.numel() // 16)
        digest.update(f"{name} {value.detach().flatten()[::step].tolist()}".encode())
    return digest.hexdigest()


def kept(folder: Path, key: dict[str, Any]) -> Path:
    """The file for texts that depend on `key`."""
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"


def load(path: Path) -> list[Texts] | None:
    """None where nothing, or nothing whole, was kept."""
    try:
        return [Texts(*x) for x in torch.load(path, weights_only=True, mmap=True)]
    except FileNotFoundError:
        return None
    except Exception:  # torch names no class for a damaged file
        return None


def store(path: Path, texts: Sequence[Texts]) -> None:
    """Writes the file at once; UsageError where it cannot be."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([list(vars(x).values()) for x in texts], part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the second is torch's for a full disk
        part.unlink(missing_ok=True)
        raise UsageError(
            f"the target's answers cannot be written to {path.parent} ({error}); free some space"
            " there, or name another folder by --data."
        ) from error


def mixed(seed: int, number: int) -> int:
    """A seed of its own for each number, of each seed (splitmix64's first multiplication)."""
    return (seed * 0xBF58476D1CE4E5B9 + number * 0x9E3779B97F4A7C15) % 2**63


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def tail(rows: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """The logit of all other tokens together, `[N, 1]`: of rows over some of the tokens, and
    the log-normaliser over all, at the temperature."""
    inside = (rows.double() / temperature).logsumexp(-1)
    outside = torch.log(-torch.expm1((inside - lse.double()).clamp(max=-math.ulp(1.0))))
    return ((lse.double() + outside) * temperature).float()[:, None]
