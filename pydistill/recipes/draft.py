"""DistillSpec: trains a draft for a target, on text like that on which it will be asked to draft.

Each step takes a batch of answers, y: with probability `on_policy` sampled from the draft as it is,
else the target's samples or fixed text; and descends, over the answers' positions t,

    mean_t D(p(. | x, y_<t) || q(. | x, y_<t))

p and q being target and draft at the serving temperature. Gradients flow through q alone, not
through the sampling. What counts is acceptance, A = sum min(p, q), the share of drafted tokens that
the target keeps, and block efficiency, the tokens a request gains from one run of the target; both
are measured on held-out prompts, before and after. A itself is a loss, too: -log A (`acceptance`
below, `docs/draft.md` has its gradient).

A step's coins and its place in the data depend on the seed and the step's number alone, so a
checkpoint is the weights, the optimizer's state and that number: a run killed at any moment goes on
to the same losses, bit for bit.

Source: DistillSpec, Zhou et al. 2023, arXiv 2310.08461.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pydistill
from pydistill.recipes import UsageError, build_cache, models, rate_at
from pydistill.recipes import bar as progress_bar
from pydistill.recipes.answers import Answers, answer_logits, encode, prompts, sample
from pydistill.reference.verify import cuts
from pydistill.speculative.draft_models import in_dtype

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "acceptance")
SOURCES = ("target", "text")
# Between distributions of which a filter made one or both partly zero, a KL is infinite.
_UNFILTERED = ("forward_kl", "reverse_kl")
_LEAST = 1e-6  # acceptance below which a row's own gradient is lost in fp32


@dataclass(frozen=True)
class Options:
    output: Path
    model: str = models.DEFAULT
    draft: str = "layers:6"  # what `models.draft_of` takes
    divergence: str = "forward_kl"
    source: str = "target"  # of the answers that are not the draft's own
    on_policy: float = 0.0  # the chance of a step to learn from those
    text: Path | None = None  # of source "text"; None: the shipped prompts
    prompts: Path | None = None  # one a line; None: the shipped prompts
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    steps: int = 200
    batch: int = 8
    answers: int = 2  # of the target, a prompt
    length: int = 64  # tokens of an answer, or of a piece of text
    learning_rate: float = 1e-3
    num_draft_tokens: int = 4
    checkpoint_every: int = 50
    seed: int = 0

    def warpers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}


@dataclass(frozen=True)
class Quality:
    """On held-out prompts, at the serving temperature and filters."""

    acceptance: float  # mean of sum min(p, q) over the target's own samples
    same_choice: float  # the acceptance of greedy decoding
    block_efficiency: float  # of `generate`


@dataclass(frozen=True)
class Result:
    folder: str
    options: Options
    parameters: tuple[int, int]  # target, draft
    before: Quality
    after: Quality
    losses: list[float] = field(repr=False)  # of every step
    resumed_at: int  # steps that were done already
    tokens: int  # that taught, in this run
    seconds: float  # of this run

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": _named(self.options)}


@dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by, made once at its beginning."""

    seen: Answers | None  # the target's samples or fixed text
    prompts: tuple[Tensor, Tensor]  # of on-policy samples
    held_out: Answers
    held_out_prompts: tuple[Tensor, Tensor]


def run(options: Options, progress: bool = True) -> Result:
    """Trains, or goes on with a run that was ended; UsageError for what cannot be met."""
    start = time.perf_counter()
    _check(options)
    models.check_output(options.output)
    dtype = models.compute_dtype()
    target, tokenizer = models.load(options.model, dtype, progress)
    draft, its_tokenizer = models.draft_of(target, options.draft, torch.float32, progress)
    if its_tokenizer is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"--draft {options.draft} has another vocabulary than {options.model}; name a draft"
            " that was trained with the target's tokenizer."
        )
    for model in (target, draft):  # a batch's rows end at different lengths
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    with _working_folder(options.output) as folder, torch.random.fork_rng():
        made = _load(folder / "data.pt", options)
        if made is None:
            data = make_data(target, tokenizer, options, progress)
            before = evaluate(target, draft, data, options, progress)
            _store(folder / "data.pt", options, data=_tensors(data), before=asdict(before))
        else:
            data, before = _data(made["data"]), Quality(**made["before"])
        training = Training(target, draft, data, options)
        resumed_at = training.resume(folder / "state.pt")
        training.run(folder / "state.pt", progress)
        after = evaluate(target, draft, data, options, progress)
        models.save_output(options.output, draft, tokenizer)
    return Result(
        folder=str(options.output),
        options=options,
        parameters=(target.num_parameters(), draft.num_parameters()),
        before=before,
        after=after,
        losses=training.losses,
        resumed_at=resumed_at,
        tokens=training.tokens,
        seconds=time.perf_counter() - start,
    )


class Training:
    """AdamW on the draft's fp32 weights, and all that it takes to stop and go on.

    The draft is in eval mode: what it drafts with is what it learns with, so there is no dropout.
    """

    def __init__(self, target: Any, draft: Any, data: Data, options: Options) -> None:
        self.target, self.draft, self.data, self.options = target, draft.eval(), data, options
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=options.learning_rate, fused=True)
        self.losses: list[float] = []
        self.tokens = 0

    def run(self, checkpoint: Path, progress: bool = False) -> None:
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
        options, dtype = self.options, models.compute_dtype()
        texts = self.texts(number)
        with torch.no_grad():
            p = answer_logits(self.target, texts, dtype)
        q = answer_logits(self.draft, texts, dtype)
        value = loss(q, p, options.divergence, mask=texts.counted, **options.warpers())
        if not math.isfinite(value.item()):
            raise UsageError(
                f"the loss of step {number} is {value.item()}: the target or the draft has weights"
                " that are not finite, or --learning-rate is too large; mend the one or the other."
            )
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_at(number, options.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += int(texts.counted.sum())
        return value.item()

    def texts(self, number: int) -> Answers:
        """The answers of a step: a function of the draft's weights, the seed and the number."""
        options = self.options
        torch.manual_seed(_mixed(options.seed, number))
        if self.data.seen is not None and torch.rand(()).item() >= options.on_policy:
            rows = batch_rows(len(self.data.seen.ids), options.batch, number, options.seed)
            return self.data.seen[rows]
        ids, attended = self.data.prompts
        rows = batch_rows(len(ids), options.batch, number, options.seed)
        return sample(
            as_served(self.draft, self.target), ids[rows], attended[rows],
            new_tokens=options.length, pad=self.draft.generation_config.pad_token_id or 0,
            dtype=models.compute_dtype(), **options.warpers(),
        )  # fmt: skip

    def keep(self, path: Path) -> None:
        _store(
            path, self.options, losses=self.losses, draft=self.draft.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )  # fmt: skip

    def resume(self, path: Path) -> int:
        """The number of steps that the checkpoint holds; 0 without one."""
        kept = _load(path, self.options)
        if kept is not None:
            self.draft.load_state_dict(kept["draft"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.losses = kept["losses"]
        return len(self.losses)


def loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    divergence: str,
    *,
    mask: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The mean over the rows where `mask [N, T]` is True, differentiable in `draft_logits
    [N, T, V]`; `divergence` is one of DIVERGENCES.

    The filters are of both sides, except with a KL, which takes none: it would be infinite. What
    they keep counts as constant in the gradient.
    """
    filters = (top_k, top_p, min_p)
    q, p = draft_logits[mask], target_logits[mask]
    if divergence not in _UNFILTERED:
        q, p = (filtered(x, temperature, *filters) for x in (q, p))
    if divergence != "acceptance":
        return pydistill.divergence(q, p, divergence, temperature=temperature, vocab="min")
    # A row's gradient is bounded as A goes to 0 (docs/draft.md), but 1 - TVD rounds to 0 before.
    gap = pydistill.divergence(q, p, "tvd", temperature=temperature, vocab="min", reduction="none")
    return -(1 - gap).clamp(min=_LEAST).log().mean()


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


def as_served(draft: Any, target: Any) -> Any:
    """A copy of the draft in the target's dtype."""
    return in_dtype(copy.deepcopy(draft), target.dtype).eval()


@torch.no_grad()
def evaluate(
    target: Any, draft: Any, data: Data, options: Options, progress: bool = False
) -> Quality:
    """Acceptance on the target's own samples, and what `generate` makes of the draft, which serves
    in the target's dtype."""
    serving = as_served(draft, target)
    totals, count, dtype = torch.zeros(2, dtype=torch.float64), 0, models.compute_dtype()
    with progress_bar(progress, len(data.held_out.ids), "draft is judged") as bar:
        for rows in torch.split(torch.arange(len(data.held_out.ids)), options.batch):
            texts = data.held_out[rows]
            q, p = (
                filtered(answer_logits(model, texts, dtype)[texts.counted], **options.warpers())
                for model in (serving, target)
            )
            found = pydistill.divergence_with_stats(
                q, p, "tvd", temperature=options.temperature, vocab="min", reduction="none"
            )
            parts = (found.acceptance, found.argmax_agreement)
            totals += torch.stack([x.double().sum() for x in parts])
            count += len(q)
            bar.update(len(rows))
    ids, attended = data.held_out_prompts
    stats = pydistill.generate(
        target, serving, ids, attention_mask=attended, do_sample=True, seed=options.seed,
        max_new_tokens=options.length, num_draft_tokens=options.num_draft_tokens,
        **options.warpers(),
    ).stats  # fmt: skip
    acceptance, same_choice = (totals / count).tolist()
    return Quality(acceptance, same_choice, stats.block_efficiency)


def make_data(target: Any, tokenizer: Any, options: Options, progress: bool = False) -> Data:
    """Held-out answers, and what is to be learnt: they depend on the options and their seed."""
    train, held_out = prompts()
    if options.prompts is not None:
        given = build_cache.read_texts(options.prompts)
        train = [text for text in given if isinstance(text, str)]
        if len(train) < len(given):
            raise UsageError(f"--prompts {options.prompts} has chats; pass one text a line.")
    torch.manual_seed(_mixed(options.seed, -1))
    learn, judge = encode(tokenizer, train), encode(tokenizer, held_out)
    for ids, _ in (learn, judge):
        _check_lengths(target, ids, options)
    teach = options.source == "target" and options.on_policy < 1
    with progress_bar(progress, (1 + teach) * options.length, "target answers") as bar:

        def answered(ids: Tensor, attended: Tensor) -> Answers:
            return sample(
                target, ids, attended, answers=options.answers, new_tokens=options.length,
                pad=tokenizer.pad_token_id, dtype=models.compute_dtype(), bar=bar,
                **options.warpers(),
            )  # fmt: skip

        seen = answered(*learn) if teach else None
        unseen = answered(*judge)
    if options.source == "text" and options.on_policy < 1:
        seen = _fixed(tokenizer, train, options)
    return Data(seen, learn, unseen, judge)


def _fixed(tokenizer: Any, train: list[str], options: Options) -> Answers:
    """The pieces of fixed text: the first token of a piece is its prompt, of one token."""
    texts: list[Any] = [[{"role": "user", "content": prompt}] for prompt in train]
    if options.text is not None:
        texts = build_cache.read_texts(options.text)
    with progress_bar(False, len(texts), "") as bar:
        found = build_cache.tokenized(tokenizer, texts, options.length + 1, bar)
        pieces = [piece for piece in found if len(piece) > 1]
    if not pieces:
        raise UsageError(f"the text {options.text} has no two tokens in a row; name a longer one.")
    width = max(map(len, pieces))
    ids = torch.full((len(pieces), width), tokenizer.pad_token_id)
    attended = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        attended[row, : len(piece)] = 1
    return Answers(ids, attended, attended[:, 1:].bool())


def batch_rows(count: int, size: int, number: int, seed: int) -> Tensor:
    """Which of `count` rows batch `number` has: `size` of the rows' orders, epoch after epoch, each
    order being drawn from the seed and the epoch."""
    places = torch.arange(number * size, (number + 1) * size)
    rows = []
    for epoch in (places // count).unique().tolist():
        coins = torch.Generator().manual_seed(_mixed(seed, -2 - epoch))
        rows.append(
            torch.randperm(count, generator=coins)[places[places // count == epoch] % count]
        )
    return torch.cat(rows)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each number, of each seed (splitmix64's first multiplication)."""
    return (seed * 0xBF58476D1CE4E5B9 + number * 0x9E3779B97F4A7C15) % 2**63


@contextlib.contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """`OUTPUT.unfinished`, for one run at a time; deleted when the output is there."""
    folder = output.with_name(output.name + ".unfinished")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run writes to --output {output}; wait for it, or name a new folder."
            ) from error
        try:
            yield folder
        except BaseException:
            if not (folder / "data.pt").exists():  # nothing to go on from
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _store(path: Path, options: Options, **values: Any) -> None:
    """Replaces the file at once: a kill leaves the old one or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save({"options": _named(options), **values}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the second is torch's for a full disk
        raise UsageError(
            f"the checkpoint {path} cannot be written ({error}); free some space there and give"
            " the same command again."
        ) from error


def _load(path: Path, options: Options) -> dict[str, Any] | None:
    """What `_store` kept, None if it never did."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch names no class for a damaged file
        raise UsageError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); delete"
            f" {path.parent} to begin anew."
        ) from error
    ours, theirs = _named(options), found.pop("options")
    if changed := [name for name in ours if ours[name] != theirs.get(name)]:
        kept = ", ".join(f"{name}={theirs.get(name)!r}" for name in changed)
        raise UsageError(
            f"{path.parent} was begun with {kept}; go on with the same options, name a new"
            " --output, or delete it."
        )
    return found


def _named(options: Options) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}


def _tensors(data: Data) -> dict[str, Any]:
    """As torch loads it without code."""
    return {
        name: list(vars(value).values()) if isinstance(value, Answers) else value
        for name, value in vars(data).items()
    }


def _data(tensors: dict[str, Any]) -> Data:
    seen = tensors["seen"]
    return Data(
        None if seen is None else Answers(*seen), tensors["prompts"],
        Answers(*tensors["held_out"]), tensors["held_out_prompts"],
    )  # fmt: skip


def _check(options: Options) -> None:
    for name, among in (("divergence", DIVERGENCES), ("source", SOURCES)):
        if getattr(options, name) not in among:
            raise UsageError(
                f"--{name} {getattr(options, name)} is not known; use one of {', '.join(among)}."
            )
    if options.text is not None and options.source != "text":
        raise UsageError(f"--text {options.text} is not read; add --source text.")
    inside = {
        "on-policy": 0 <= options.on_policy <= 1,
        "top-p": 0 < options.top_p <= 1,
        "min-p": 0 <= options.min_p <= 1,
    }
    for name, right in inside.items():
        if not right:
            value = getattr(options, name.replace("-", "_"))
            raise UsageError(f"--{name} {value} is outside 0 to 1; pass a share.")
    if not 0 < options.temperature < math.inf:
        raise UsageError(
            f"--temperature {options.temperature} has no gradient; train at a positive one, such as"
            " 1, also for a draft that will serve greedy decoding."
        )
    if not 0 < options.learning_rate < math.inf:
        raise UsageError(f"--learning-rate {options.learning_rate} is not positive; try 1e-3.")
    if options.top_k < 0:
        raise UsageError(f"--top-k {options.top_k} is negative; 0 is off.")
    for name in ("steps", "batch", "answers", "length", "num_draft_tokens", "checkpoint_every"):
        if getattr(options, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1; pass a"
                " positive number."
            )


def _check_lengths(target: Any, ids: Tensor, options: Options) -> None:
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise UsageError("the prompts have no tokens; name a file with a prompt a line.")
    if context and ids.shape[1] + options.length > context:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens and --length {options.length} do not fit into the"
            f" target's context of {context}; shorten one of them."
        )


def table(result: Result) -> str:
    options, before, after = result.options, result.before, result.after
    target, draft = (f"{count / 1e6:.1f}M" for count in result.parameters)
    source = {"target": "the target's samples", "text": "fixed text"}[options.source]
    resumed = f", {result.resumed_at} of them before this run" if result.resumed_at else ""
    return "\n".join(
        [
            f"{options.model} ({target} parameters), draft {options.draft} ({draft}):"
            f" {options.steps} steps of {options.divergence}{resumed}, {options.on_policy:.0%} on"
            f" the draft's own samples, the others on {source}.",
            "",
            f"On held-out prompts, temperature {options.temperature:g}                      "
            "before     after",
            f"  acceptance, sum min(p, q)                       {before.acceptance:10.1%}"
            f"{after.acceptance:10.1%}",
            f"  same most likely next token                     {before.same_choice:10.1%}"
            f"{after.same_choice:10.1%}",
            f"  tokens a run of the target, {options.num_draft_tokens} drafted         "
            f"{before.block_efficiency:12.2f}{after.block_efficiency:10.2f}",
            "",
            f"{result.seconds:.0f} s in all; the draft is in {result.folder}.",
        ]
    )
