"""DistillSpec: trains a draft for a target, on text like that on which it will be asked to draft.

Each step takes a batch of answers, y: with probability `on_policy` sampled from the draft as it is,
else the target's samples or fixed text; and descends, over the answers' positions t,

    mean_t D(p(. | x, y_<t) || q(. | x, y_<t))

p and q being target and draft at the serving temperature. Gradients flow through q alone, not
through the sampling. What counts is acceptance, A = sum min(p, q), the share of drafted tokens that
the target keeps, and block efficiency, the tokens a request gains from one run of the target; both
are measured on held-out prompts, before and after. A itself is a loss, too: -log A (`acceptance`
below, `docs/draft.md` has its gradient).

The target's answers, with its hidden states on them, are made once and kept (`draft_texts`); what a
step does is in `draft_training`.

A step's coins and its place in the data depend on the seed and the step's number alone, so a
checkpoint is the weights, the optimizer's state and that number: a run killed at any moment goes on
to the same losses, bit for bit.

Source: DistillSpec, Zhou et al. 2023, arXiv 2310.08461.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pydistill
from pydistill.cache import CacheError, TeacherCache
from pydistill.recipes import UsageError, build_cache, draft_files, draft_texts, models, prompts
from pydistill.recipes import bar as progress_bar
from pydistill.recipes.draft_texts import Reader, Texts, mixed, pack
from pydistill.recipes.draft_training import (
    DIVERGENCES,
    SCHEDULES,
    UNFILTERED,
    Drafter,
    Team,
    Training,
    as_served,
    filtered,
    fit_input,
    on_tokens,
)
from pydistill.speculative import FeatureDraft, frequent_tokens
from pydistill.speculative.cached_model import check_model, context_of, vocabulary_of
from pydistill.speculative.draft_models import end_tokens

SOURCES = ("target", "text")
SIGNALS = ("teacher", "verify")


@dataclass(frozen=True)
class Options:
    output: Path
    model: str = models.DEFAULT
    draft: str = "layers:6"  # what `models.draft_of` takes
    width: int | None = None  # of a feature draft's layers
    draft_vocab: str | None = None  # a number, the most frequent tokens; or a JSON file of ids
    divergence: str = "forward_kl"
    unroll: int = 1  # steps of a feature draft on its own states
    source: str = "target"  # of the answers that are not the draft's own
    on_policy: float = 0.0  # the chance of a step to learn from those
    signal: str = "teacher"  # or "verify": at the rows that verification tries
    teacher_cache: Path | None = None  # of texts and rows
    text: Path | None = None  # of source "text"; None: the shipped prompts
    prompts: Path | None = None  # one a line; None: the shipped prompts
    own_prompts: int = 0  # more of them, which the target writes itself
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    steps: int = 200
    batch: int = 16
    answers: int = 4  # of the target, a prompt
    length: int = 64  # tokens of an answer, or of a piece of text
    row: int = 256  # tokens of the rows that texts are packed into
    sample_batch: int = 64  # answers that the target writes at once
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    train_embeddings: bool = False
    data: Path | None = None  # where the target's answers are kept; None: the cache folder
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
    by_position: list[float]  # accepted of the evaluated tokens, in `generate`


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
    distinct: int  # taught tokens of the target's answers or the texts
    seconds: float  # of this run

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"options": draft_files.named(self.options)}


@dataclass
class Untrained:
    """What a draft is before any step, for runs that begin with the same one; the first of them
    finds it."""

    input: Tensor | None = None  # W of a feature draft, as `fit_input` sets it
    quality: Quality | None = None


@dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by."""

    seen: Texts | None  # the target's samples or fixed text
    prompts: list[list[int]]  # of on-policy samples
    held_out: Texts
    held_out_prompts: list[list[int]]


def run(options: Options, progress: bool = True) -> Result:
    """Trains, or goes on with a run that was ended; UsageError for what cannot be met."""
    check(options)
    models.check_output(options.output)
    target, tokenizer = models.load(options.model, models.compute_dtype(), progress)
    return train(options, target, tokenizer, progress)


def train(
    options: Options,
    target: Any,
    tokenizer: Any,
    progress: bool = True,
    known: Untrained | None = None,
) -> Result:
    """`run` with a target that is loaded, and what is known of the draft, which grows."""
    start, team, known = time.perf_counter(), Team(), known or Untrained()
    progress = progress and team.first
    try:
        check_model("target", target)
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from error
    if not team.first:
        team.wait()  # the first makes what all read
        return _led(options, target, tokenizer, team, known)
    with draft_files.working_folder(options.output) as folder, torch.random.fork_rng():
        data = make_data(target, tokenizer, options, progress)
        draft = make_draft(target, tokenizer, data, options, progress, known)
        made = draft_files.load(folder / draft_files.BEGUN, options)
        if made is not None:
            before = Quality(**made["before"])
        else:
            before = known.quality or evaluate(target, draft, data, options, progress)
            draft_files.store(folder / draft_files.BEGUN, options, before=asdict(before))
        known.quality = before
        team.wait()
        training = Training(target, draft, data, options)
        resumed_at = training.resume(folder / "state.pt")
        team.wait()
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
        distinct=0 if data.seen is None else int(data.seen.taught.sum()),
        seconds=time.perf_counter() - start,
    )


def _led(options: Options, target: Any, tokenizer: Any, team: Team, known: Untrained) -> Result:
    """The part of every process but the first: the same steps; it judges and writes nothing."""
    folder = options.output.with_name(options.output.name + ".unfinished")
    with torch.random.fork_rng():
        data = make_data(target, tokenizer, options)
        draft = make_draft(target, tokenizer, data, options, known=known)
        training = Training(target, draft, data, options)
        resumed_at = training.resume(folder / "state.pt")
        team.wait()
        training.run(folder / "state.pt")
    nothing = Quality(math.nan, math.nan, math.nan, [])
    return Result(
        str(options.output), options, (target.num_parameters(), draft.num_parameters()), nothing,
        nothing, training.losses, resumed_at, training.tokens, 0, math.nan,
    )  # fmt: skip


def make_draft(
    target: Any,
    tokenizer: Any,
    data: Data,
    options: Options,
    progress: bool = False,
    known: Untrained | None = None,
) -> Any:
    """The draft in fp32, before any step."""
    tokens = None if options.draft_vocab is None else _tokens(target, data, options.draft_vocab)
    torch.manual_seed(mixed(options.seed, -3))  # of layers of another width
    draft, its_tokenizer = models.draft_of(
        target, options.draft, torch.float32, progress, tokens, options.width
    )
    if its_tokenizer is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"--draft {options.draft} has another vocabulary than {options.model}; name a draft"
            " that was trained with the target's tokenizer."
        )
    _check_pairs(options, isinstance(draft, FeatureDraft))
    if options.draft.startswith("feature:") and draft.out is None and data.seen is not None:
        known = known or Untrained()
        if known.input is None:
            fit_input(draft, target, data.seen, options.row)
            known.input = draft.fc.weight.detach().clone()
        else:
            draft.fc.weight.data.copy_(known.input)
    return draft


def _tokens(target: Any, data: Data, draft_vocab: str) -> Tensor:
    if draft_vocab.isascii() and draft_vocab.isdecimal():
        count, ends = int(draft_vocab), end_tokens(target)
        if not len(ends) < count <= vocabulary_of(target):
            raise UsageError(
                f"--draft-vocab {count} is outside {len(ends) + 1}..{vocabulary_of(target)}, the"
                " target's tokens."
            )
        return frequent_tokens(
            [] if data.seen is None else [data.seen.tokens[1:][data.seen.taught[:-1]]], count,
            always=ends,
        )  # fmt: skip
    try:
        return torch.tensor(json.loads(Path(draft_vocab).read_text("utf-8")), dtype=torch.int64)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"--draft-vocab {draft_vocab} is no number and no JSON list of ids ({error})."
        ) from error


@torch.no_grad()
def evaluate(
    target: Any, draft: Any, data: Data, options: Options, progress: bool = False
) -> Quality:
    """Acceptance on the target's own samples, and what `generate` makes of the draft, which serves
    in the target's dtype."""
    serving, dtype = as_served(draft, target), models.compute_dtype()
    drafter, reader = Drafter(serving, dtype), Reader(target, dtype)
    texts, totals, count = data.held_out, torch.zeros(2, dtype=torch.float64), 0
    warpers, tokens = options.warpers(), drafter.tokens
    with progress_bar(progress, len(texts), "draft is judged") as bar:
        for rows in torch.split(torch.arange(len(texts)), options.batch):
            part = texts[rows]
            packed = pack(part, options.row)
            places = packed.places(part.taught)
            states = reader.states(packed) if part.states is None else packed.spread(part.states)
            p = filtered(reader.logits(states.flatten(0, 1)[places]), **warpers)
            q = filtered(drafter.rows(packed, places, states)[0], **warpers)
            best = q.argmax(-1) if tokens is None else tokens[q.argmax(-1)]
            same = best == p.argmax(-1)
            if tokens is not None:
                p = on_tokens(p, tokens, options.temperature, rest=True)
                q = torch.nn.functional.pad(q, (0, 1), value=-math.inf)
            found = pydistill.divergence_with_stats(
                q, p, "tvd", temperature=options.temperature, vocab="min", reduction="none"
            )
            totals += torch.stack([x.double().sum() for x in (found.acceptance, same)])
            count += len(q)
            bar.update(len(rows))
    ids, attended = prompts.padded(data.held_out_prompts)
    no_pad: dict[str, Any] = {} if end_tokens(target) else {"pad_token_id": 0}
    stats = pydistill.generate(
        target, serving, ids, attention_mask=attended, do_sample=True, seed=options.seed,
        max_new_tokens=options.length, num_draft_tokens=options.num_draft_tokens,
        **no_pad, **warpers,
    ).stats  # fmt: skip
    acceptance, same_choice = (totals / count).tolist()
    positions = [x for x in stats.acceptance_per_position if x == x]  # the last may be untried
    return Quality(acceptance, same_choice, stats.block_efficiency, positions)


def make_data(target: Any, tokenizer: Any, options: Options, progress: bool = False) -> Data:
    """Held-out answers, and what is to be learnt: they depend on the options and their seed. What
    the target wrote is kept, and read again by whoever asks for the same."""
    train, held_out = prompts.shipped()
    if options.prompts is not None:
        given = build_cache.read_texts(options.prompts)
        train = [text for text in given if isinstance(text, str)]
        if len(train) < len(given):
            raise UsageError(f"--prompts {options.prompts} has chats; pass one text a line.")
    reader, ends = Reader(target, models.compute_dtype()), end_tokens(target)
    teach = options.source == "target" and options.on_policy < 1 and options.teacher_cache is None
    folder = options.data or models.cache_folder() / "answers"
    shared = {
        "weights": draft_texts.fingerprint(target), "dtype": str(target.dtype),
        "length": options.length, "seed": options.seed, **options.warpers(), "ends": ends,
    }  # fmt: skip
    if options.own_prompts:
        train = train + _own_prompts(target, tokenizer, options, folder, shared, progress)
    learn, judge = prompts.encoded(tokenizer, train), prompts.encoded(tokenizer, held_out)
    for ids in (learn, judge):
        _check_lengths(target, ids, options)

    def answered(ids: list[list[int]], answers: int, label: str, seed: int) -> Texts:
        path = draft_texts.kept(folder, {**shared, "prompts": ids, "answers": answers, "of": seed})
        if (found := draft_texts.load(path)) is not None:
            return found[0]
        runs = -(-len(ids) * answers // options.sample_batch)
        with progress_bar(progress, runs * options.length, label) as bar:
            texts = draft_texts.answers_of(
                target, ids, answers=answers, new_tokens=options.length,
                batch=options.sample_batch, seed=mixed(options.seed, seed), ends=ends,
                warpers=options.warpers(), keep_states=reader.head is not None, bar=bar,
            )  # fmt: skip
        draft_texts.store(path, [texts])
        return texts

    unseen = answered(judge, 2, "answers to judge by", -2)
    seen = None
    if options.teacher_cache is not None:
        seen = _cached(target, tokenizer, options)
    elif teach:
        seen = answered(learn, options.answers, "target answers", -1)
    elif options.source == "text" and options.on_policy < 1:
        fixed = _fixed(tokenizer, train, options)
        path = draft_texts.kept(folder, {**shared, "text": fixed.lists()})
        kept = draft_texts.load(path)
        if kept is None:
            with progress_bar(progress, len(fixed), "target reads") as bar:
                fixed = draft_texts.with_states(
                    reader, fixed, options.row, options.temperature, bar
                )
            draft_texts.store(path, [fixed])
        seen = fixed if kept is None else kept[0]
    return Data(seen, learn, unseen, judge)


def _own_prompts(
    target: Any,
    tokenizer: Any,
    options: Options,
    folder: Path,
    shared: dict[str, Any],
    progress: bool,
) -> list[str]:
    path = draft_texts.kept(folder, {**shared, "own": options.own_prompts}).with_suffix(".json")
    if path.exists():
        found: list[str] = json.loads(path.read_text("utf-8"))
        return found
    runs = -(-options.own_prompts // options.sample_batch)
    with progress_bar(progress, runs * draft_texts.OWN_LENGTH, "target's prompts") as bar:
        found = draft_texts.own_prompts(
            target, tokenizer, options.own_prompts, options.sample_batch, options.seed,
            end_tokens(target), bar,
        )  # fmt: skip
    draft_files.write(path, json.dumps(found))
    return found


def _cached(target: Any, tokenizer: Any, options: Options) -> Texts:
    """The documents of a teacher cache: every row but that of a document's last token is taught."""
    assert options.teacher_cache is not None
    try:
        cache = TeacherCache.open(
            options.teacher_cache, tokenizer=tokenizer, vocab_size=vocabulary_of(target)
        )
    except CacheError as error:
        raise UsageError(str(error)) from error
    if cache.manifest.temperature != options.temperature:
        raise UsageError(
            f"--teacher-cache {options.teacher_cache} was recorded at temperature"
            f" {cache.manifest.temperature:g}, not {options.temperature:g}; pass that one."
        )
    documents = cache.documents
    lists = [
        cache.input_ids(a, b).tolist()
        for a, b in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True)
    ]
    if not any(len(x) > 1 for x in lists):
        raise UsageError(f"--teacher-cache {options.teacher_cache} has no two tokens in a row.")
    texts = draft_texts.texts_of(lists, [1] * len(lists))
    return Texts(texts.tokens, texts.begins, texts.taught, rows=torch.arange(len(cache)))


def _fixed(tokenizer: Any, train: list[str], options: Options) -> Texts:
    """The pieces of fixed text: the first token of a piece is its prompt, of one token."""
    texts: list[Any] = [[{"role": "user", "content": prompt}] for prompt in train]
    if options.text is not None:
        texts = build_cache.read_texts(options.text)
    with progress_bar(False, len(texts), "") as bar:
        found = build_cache.tokenized(tokenizer, texts, options.length + 1, bar)
        pieces = [piece for piece in found if len(piece) > 1]
    if not pieces:
        raise UsageError(f"the text {options.text} has no two tokens in a row; name a longer one.")
    return draft_texts.texts_of(pieces, [1] * len(pieces))


def check(options: Options) -> None:
    """UsageError for options that cannot be right, whatever the models are."""
    for name, among in (
        ("divergence", DIVERGENCES), ("source", SOURCES), ("signal", SIGNALS),
        ("schedule", SCHEDULES),
    ):  # fmt: skip
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
        "warmup": 0 <= options.warmup <= 1,
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
    if not 0 <= options.weight_decay < math.inf:
        raise UsageError(f"--weight-decay {options.weight_decay} is negative; 0 is off.")
    for name in ("top_k", "own_prompts"):
        if getattr(options, name) < 0:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is negative; 0 is off."
            )
    for name in (
        "steps", "batch", "answers", "length", "num_draft_tokens", "checkpoint_every", "unroll",
        "row", "sample_batch",
    ):  # fmt: skip
        if getattr(options, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1; pass a"
                " positive number."
            )
    _check_pairs(options, options.draft.startswith("feature:"))


def _check_pairs(options: Options, feature: bool) -> None:
    """What does not go together."""
    if options.width is not None and not feature:
        raise UsageError(f"--width {options.width} is of a feature draft; add --draft feature:1.")
    if options.unroll > 1 and not feature:
        raise UsageError(f"--unroll {options.unroll} is of a feature draft; add --draft feature:1.")
    if feature and options.on_policy:
        raise UsageError(
            f"--on-policy {options.on_policy} has no samples of a feature draft, which writes no"
            " text alone; use --unroll 3, which teaches it on its own states."
        )
    if options.signal == "verify":
        filters = options.top_k or options.top_p < 1 or options.min_p
        for wrong, what in (
            (feature, f"--draft {options.draft}"),
            (options.draft_vocab is not None, f"--draft-vocab {options.draft_vocab}"),
            (options.teacher_cache is not None, "--teacher-cache"),
            (filters and options.divergence in UNFILTERED, "filters and a KL, which is infinite"),
        ):
            if wrong:
                raise UsageError(f"--signal verify does not go with {what}; drop one of them.")
    if options.teacher_cache is not None:
        filters = options.top_k or options.top_p < 1 or options.min_p
        for wrong, what in (
            (feature, f"--draft {options.draft}, which reads hidden states"),
            (options.draft_vocab is not None, f"--draft-vocab {options.draft_vocab}"),
            (bool(filters), "filters"),
            (options.source == "text", "--source text"),
        ):
            if wrong:
                raise UsageError(f"--teacher-cache does not go with {what}; drop one of them.")


def _check_lengths(target: Any, prompts: list[list[int]], options: Options) -> None:
    longest, context = max(map(len, prompts), default=0), context_of(target)
    if not all(prompts) or not longest:
        raise UsageError("the prompts have no tokens; name a file with a prompt a line.")
    if context and longest + options.length > context:
        raise UsageError(
            f"a prompt of {longest} tokens and --length {options.length} do not fit into the"
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
