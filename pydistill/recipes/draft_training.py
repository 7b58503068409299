"""The steps by which a draft learns, and the rows on both sides of its loss.

A step packs a batch of texts, runs the draft over them, and compares its rows at the taught tokens
with the target's, which come from recorded states, from a live run where there are none (the
draft's own samples), or from a teacher cache. A draft on S tokens is compared on these: by the KLs
as a distribution given that the token is one of them, by the others exactly, the rest of the
target's mass being one more token that the draft never proposes.

With several processes each takes every n-th text of the batch, and gradients are summed, so a step
is the same step up to the order of sums.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydistill
from pydistill.cache import TeacherCache
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.recipes import UsageError, draft_files, models
from pydistill.recipes import bar as progress_bar
from pydistill.recipes.draft_texts import (
    Packed,
    Reader,
    Texts,
    autocast,
    mixed,
    pack,
    tail,
    texts_of,
    write,
)
from pydistill.reference.verify import cuts
from pydistill.speculative import FeatureDraft
from pydistill.speculative.cached_model import attention_mask, vocabulary_of_head
from pydistill.speculative.draft_models import end_tokens, in_dtype

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "acceptance")
# Between distributions of which a filter made one or both partly zero, a KL is infinite.
UNFILTERED = ("forward_kl", "reverse_kl")
_LEAST = 1e-6  # acceptance below which a row's own gradient is lost in fp32
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
_LATER = 0.8  # the weight of an unrolled step, over that of the one before


class Rows(NamedTuple):
    """Both sides' logits at the same places; q alone is differentiable."""

    q: Tensor  # [N, V], or [N, S]
    p: Tensor | TopkTeacher  # [N, V], [N, S] and, where wanted, [N, S + 1]


def loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    divergence: str,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The mean over the rows, differentiable in `draft_logits [N, V]`; `divergence` is one of
    DIVERGENCES.

    The filters are of both sides, except with a KL, which takes none: it would be infinite. What
    they keep counts as constant in the gradient.
    """
    q, p = draft_logits, target_logits
    if divergence not in UNFILTERED:
        q, p = (filtered(x, temperature, top_k, top_p, min_p) for x in (q, p))
    return _mean(q, p, divergence, temperature)


def _mean(q: Tensor, p: Tensor | TopkTeacher, divergence: str, temperature: float) -> Tensor:
    kind = "tvd" if divergence == "acceptance" else divergence
    reduction = "none" if divergence == "acceptance" else "mean"
    if isinstance(p, TopkTeacher):
        found = pydistill.topk_divergence(
            q, p, kind=kind, temperature=temperature, reduction=reduction
        )
    else:
        found = pydistill.divergence(
            q, p, kind, temperature=temperature, vocab="min", reduction=reduction
        )
    # A row's gradient is bounded as A goes to 0 (docs/draft.md), but 1 - TVD rounds to 0 before.
    return -(1 - found).clamp(min=_LEAST).log().mean() if divergence == "acceptance" else found


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Rows `[R, V]` with -inf where `verify` would have probability 0: below the smallest logit
    that top-k, top-p and min-p keep; ties at the cut stay."""
    if not top_k and top_p == 1 and not min_p:
        return logits
    log_min_p = math.log(min_p) if min_p else -math.inf
    warpers = torch.tensor([[temperature, top_k, top_p, log_min_p]], dtype=torch.float64)
    with torch.no_grad():
        rows = logits.detach().double()
        cut = cuts(rows[None], warpers)[0]
    return logits.masked_fill(rows < cut, -math.inf)


def on_tokens(p: Tensor, tokens: Tensor, temperature: float, rest: bool) -> Tensor:
    """Rows `[N, V]` on the tokens `[S]` of a reduced head; with `rest`, and one more for all
    others together."""
    here = p[:, tokens]
    if not rest:
        return here
    lse = (p.float() / temperature).logsumexp(-1)
    return torch.cat([here.float(), tail(here.float(), lse, temperature)], -1)


class Drafter:
    """A draft's rows at the taught tokens of packed texts; of a feature draft, a list of steps."""

    def __init__(self, draft: Any, dtype: torch.dtype, unroll: int = 1) -> None:
        self.draft, self.dtype, self.steps = draft, dtype, unroll
        self.tokens = vocabulary_of_head(draft)
        self.reader = None if isinstance(draft, FeatureDraft) else Reader(draft, dtype)

    def rows(self, packed: Packed, places: Tensor, states: Tensor | None) -> list[Tensor]:
        """`states [R, W, H]` are the target's, which a feature draft reads."""
        if self.reader is not None:
            found = self.reader.states(packed).flatten(0, 1)[places]
            return [self.reader.logits(found)]
        assert states is not None
        features = states.roll(1, 1).masked_fill((packed.positions == 0)[..., None], 0)
        with autocast(self.dtype):
            steps = self.draft.unroll(
                packed.ids, features, packed.seen, packed.positions, self.steps
            )
            return [self.draft.logits(x.flatten(0, 1)[places]) for x in steps]


@torch.no_grad()
def fit_input(draft: FeatureDraft, target: Any, texts: Texts, row: int) -> None:
    """Sets W of a feature draft, whose layers are the target's last, by least squares: to give
    these, of a state and what the stem makes of a token, what enters them in the target.

    Of about 32,768 tokens, with a ridge of 1e-3 of each number's mean square.
    """
    size = draft.features
    square = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    product = torch.zeros(2 * size, size, dtype=torch.float64)
    chosen = int((texts.begins <= 32768).sum()) - 1
    for documents in torch.split(torch.arange(max(1, chosen)), 16):
        packed = pack(texts[documents], row)
        with autocast(models.compute_dtype()):
            found = target.base_model(
                input_ids=packed.ids, position_ids=packed.positions, use_cache=False,
                attention_mask=attention_mask(target, packed.seen[:, None]),
                output_hidden_states=True,
            )  # fmt: skip
        states = found.last_hidden_state.roll(1, 1)
        states = states.masked_fill((packed.positions == 0)[..., None], 0)
        given = torch.cat([states, found.hidden_states[draft.stem]], -1)
        here = packed.index >= 0
        x, y = given[here].float(), found.hidden_states[-1 - draft.layers][here].float()
        square += (x.T @ x).double()
        product += (x.T @ y).double()
    size_of = square.diagonal().clone()
    square.diagonal().add_(1e-3 * size_of + 1e-9 * size_of.mean())
    draft.fc.weight.copy_(torch.linalg.solve(square, product).T)


class Training:
    """AdamW on the draft's fp32 weights, and all that it takes to stop and go on.

    The draft is in eval mode: what it drafts with is what it learns with, so there is no dropout.
    Embeddings that are not the head, too, stay as they are unless `train_embeddings`.
    """

    def __init__(self, target: Any, draft: Any, data: Any, options: Any) -> None:
        self.target, self.draft, self.data, self.options = target, draft.eval(), data, options
        self.dtype = models.compute_dtype()
        self.team = Team()
        self.drafter = Drafter(draft, self.dtype, options.unroll)
        self.reader = Reader(target, self.dtype)
        self.cache = None
        if options.teacher_cache is not None:
            self.cache = TeacherCache.open(options.teacher_cache, tokenizer=None)
        if not isinstance(draft, FeatureDraft) and not options.train_embeddings:
            embeddings, head = draft.get_input_embeddings(), draft.get_output_embeddings()
            if embeddings.weight is not head.weight:
                embeddings.weight.requires_grad_(False)
        self.weights = [x for x in draft.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.losses: list[float] = []
        self.tokens = 0

    def run(self, checkpoint: Path, progress: bool = False) -> None:
        keep_memory()
        steps, done = self.options.steps, len(self.losses)
        with progress_bar(progress, steps, "draft learns", done) as bar:
            while done < steps:
                self.losses.append(self.step(done))
                done += 1
                if done % self.options.checkpoint_every == 0 or done == steps:
                    self.keep(checkpoint)
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()

    def step(self, number: int) -> float:
        options = self.options
        torch.manual_seed(mixed(options.seed, number))
        if options.signal == "verify":
            total, rows = self._verified(number)
        else:
            total, rows = self._taught(number)
        total, count = self.team.sum([total, float(rows)])
        value = total / max(1.0, count)
        if not math.isfinite(value):
            raise UsageError(
                f"the loss of step {number} is {value}: the target or the draft has weights that"
                " are not finite, or --learning-rate is too large; mend the one or the other."
            )
        self.team.sum_gradients(self.weights, count)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(
                number, options.steps, options.schedule, options.warmup
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += int(count)
        return value

    def _taught(self, number: int) -> tuple[float, int]:
        """Backward of the sum over this process's rows; the sum, and how many."""
        texts = self.texts(number)
        count = int(texts.taught.sum())
        if not count:
            return 0.0, 0
        packed = pack(texts, self.options.row)
        places = packed.places(texts.taught)
        states = self._states(texts, packed)
        wanted = None
        if isinstance(self.draft, FeatureDraft):
            wanted = states if texts.states is None else packed.spread(texts.states)
        steps = self.drafter.rows(packed, places, wanted)
        weights = [_LATER**i for i in range(len(steps))]
        value = torch.zeros(())
        for weight, q in zip(weights, steps, strict=True):
            q, p = self._sides(q, texts, places, states)
            value = value + weight / sum(weights) * _mean(
                q, p, self.options.divergence, self.options.temperature
            )
        value = value * count
        value.backward()
        return value.item(), count

    @torch.no_grad()
    def _states(self, texts: Texts, packed: Packed) -> Tensor | None:
        """The target's live, `[R, W, ...]`, where none were recorded and its rows are wanted."""
        if texts.states is not None or texts.rows is not None:
            return None
        return self.reader.states(packed)

    @torch.no_grad()
    def _teacher(self, texts: Texts, places: Tensor, live: Tensor | None) -> Tensor:
        """The target's states at the taught tokens."""
        if live is None:
            assert texts.states is not None
            return texts.states[texts.taught]
        return live.flatten(0, 1)[places]

    def _sides(self, q: Tensor, texts: Texts, places: Tensor, live: Tensor | None) -> Rows:
        """What `_mean` compares."""
        options, tokens = self.options, self.drafter.tokens
        if self.cache is not None and texts.rows is not None:
            return Rows(q, self.cache.rows(texts.rows[texts.taught]))
        states = self._teacher(texts, places, live)
        rest = options.divergence not in UNFILTERED
        filters = (options.top_k, options.top_p, options.min_p) if rest else (0, 1.0, 0.0)
        with torch.no_grad():
            plain = filters == (0, 1.0, 0.0)
            if tokens is None:
                p = filtered(self.reader.logits(states), options.temperature, *filters)
            elif plain and (not rest or texts.lse is not None):
                p = self.reader.logits(states, tokens)
                if rest and texts.lse is not None:
                    p = p.float()
                    lse = texts.lse[texts.taught]
                    p = torch.cat([p, tail(p, lse, options.temperature)], -1)
            else:
                whole = filtered(self.reader.logits(states), options.temperature, *filters)
                p = on_tokens(whole, tokens, options.temperature, rest)
        q = filtered(q, options.temperature, *filters)
        if tokens is not None and rest:
            q = torch.nn.functional.pad(q, (0, 1), value=-math.inf)
        return Rows(q, p)

    def _verified(self, number: int) -> tuple[float, int]:
        """The signal of serving: blocks drafted behind cuts of the texts are verified, and the
        rows that were put to the test, and no others, give their gradient."""
        options = self.options
        texts = self.texts(number)
        documents, begins = texts.lists(), texts.begins.tolist()
        cuts_at, prefixes = [], []
        for i, document in enumerate(documents):
            taught = texts.taught[begins[i] : begins[i + 1]].nonzero()[:, 0]
            if not len(taught):
                continue
            coins = torch.Generator().manual_seed(mixed(options.seed, number * 100_003 + i))
            at = int(taught[torch.randint(len(taught), (), generator=coins)]) + 1
            cuts_at.append(at)
            prefixes.append(document[:at])
        if not prefixes:
            return 0.0, 0
        slots, batch = options.num_draft_tokens, len(prefixes)
        seeds = [mixed(options.seed, mixed(number, i)) for i in range(batch)]
        drawn = write(
            as_served(self.draft, self.target), prefixes, seeds, slots, options.warpers()
        )  # fmt: skip
        blocks = texts_of(
            [[*x, *y.tokens, 0] for x, y in zip(prefixes, drawn, strict=True)], cuts_at
        )
        packed = pack(blocks, options.row)
        places = packed.places(blocks.taught).view(batch, slots + 1)
        with torch.no_grad():
            found = self.reader.states(packed).flatten(0, 1)[places.flatten()]
            p = self.reader.logits(found).view(batch, slots + 1, -1)
        (q,) = self.drafter.rows(packed, places[:, :slots].flatten(), None)
        q = q.view(batch, slots, -1)
        kind = "tvd" if options.divergence == "acceptance" else options.divergence
        dtype = torch.promote_types(p.dtype, q.dtype)
        verified = pydistill.verify_with_gradient(
            p.to(dtype), q.detach().to(dtype), torch.tensor([x.tokens for x in drawn]), kind,
            seed=torch.tensor([mixed(options.seed + 1, x) for x in seeds]),
            position=torch.tensor(cuts_at), **options.warpers(),
        )  # fmt: skip
        gap = verified.divergence
        here = ~gap.isnan()
        gradient = verified.gradient
        if options.divergence == "acceptance":
            kept = (1 - gap).clamp(min=_LEAST)
            gradient = gradient / torch.where(here & (kept > _LEAST), kept, torch.inf)[..., None]
            gap = -kept.log()
        q.backward(gradient.to(q.dtype))
        return float(gap[here].double().sum()), int(here.sum())

    def texts(self, number: int) -> Texts:
        """This process's part of a step's texts: a function of the draft's weights, the seed and
        the number."""
        options = self.options
        own = self.data.seen is None or torch.rand(()).item() < options.on_policy
        count = len(self.data.prompts) if own else len(self.data.seen)
        rows = self.team.share(batch_rows(count, options.batch, number, options.seed))
        if not own:
            texts: Texts = self.data.seen[rows]
            return texts
        prompts = [self.data.prompts[i] for i in rows.tolist()]
        seeds = [mixed(options.seed, mixed(number, i)) for i in rows.tolist()]
        answers = write(
            as_served(self.draft, self.target), prompts, seeds, options.length, options.warpers(),
            ends=end_tokens(self.target),
        )  # fmt: skip
        return texts_of(
            [[*x, *y.tokens] for x, y in zip(prompts, answers, strict=True)],
            [len(x) for x in prompts],
        )

    def keep(self, path: Path) -> None:
        if self.team.first:
            draft_files.store(
                path, self.options, losses=self.losses, draft=self.draft.state_dict(),
                optimizer=self.optimizer.state_dict(),
            )  # fmt: skip

    def resume(self, path: Path) -> int:
        """The number of steps that the checkpoint holds; 0 without one."""
        kept = draft_files.load(path, self.options)
        if kept is not None:
            self.draft.load_state_dict(kept["draft"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.losses = kept["losses"]
        return len(self.losses)


class Team:
    """The processes that `accelerate launch` started, or this one alone."""

    def __init__(self) -> None:
        self.size, self.rank = 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=True)
            self.size, self.rank = state.num_processes, state.process_index

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.size]

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        together = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            torch.distributed.all_reduce(together)
        return together.tolist()

    def sum_gradients(self, weights: Sequence[Tensor], count: float) -> None:
        """Of all processes, over `count`, into each weight's own."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        if self.size > 1:
            flat = torch.cat([x.flatten() for x in gradients])
            torch.distributed.all_reduce(flat)
            parts = flat.split([x.numel() for x in gradients])
            gradients = [x.view_as(w) for x, w in zip(parts, weights, strict=True)]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.div_(max(1.0, count))


def keep_memory() -> None:
    """Has glibc's malloc keep what a step frees for the next one, for the rest of the process.

    It gives large blocks back to the system otherwise, and each page costs a fault when it is used
    again: of SmolLM2-135M's drafts 300,000 a step, a sixth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def as_served(draft: Any, target: Any) -> Any:
    """A copy of the draft in the target's dtype; of a feature draft, without what it shares."""
    shared = (target.get_input_embeddings(), target.get_output_embeddings())
    return in_dtype(copy.deepcopy(draft, {id(x): x for x in shared}), target.dtype).eval()


def batch_rows(count: int, size: int, number: int, seed: int) -> Tensor:
    """Which of `count` rows batch `number` has: `size` of the rows' orders, epoch after epoch, each
    order being drawn from the seed and the epoch."""
    places = torch.arange(number * size, (number + 1) * size)
    rows = []
    for epoch in (places // count).unique().tolist():
        coins = torch.Generator().manual_seed(mixed(seed, -2 - epoch))
        rows.append(
            torch.randperm(count, generator=coins)[places[places // count == epoch] % count]
        )
    return torch.cat(rows)


SCHEDULES = ("linear", "cosine", "constant")


def rate(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Of the largest learning rate: it rises over the share `warmup` of the steps; `linear` and
    `cosine` fall to a tenth."""
    rise = (step + 1) / max(1, round(warmup * steps))
    done = step / steps
    if schedule == "linear":
        return min(rise, max(0.1, 1 - done))
    if schedule == "cosine":
        return min(rise, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    return min(rise, 1.0)
