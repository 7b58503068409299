"""Several trainings of drafts for one target, and one table of what each gained.

The first draft, divergence and source are the base; each further one replaces its own in it, and
nothing else. With `short_steps` all are trained for so many steps, and the base again for its own
number, last, so that one command compares and then makes the draft that is wanted. All learn from
the same answers of the target, which are written once, and are judged on the same held-out prompts;
a draft with which several rows begin is fitted and judged once. A comparison that was ended goes on
with the row that it was at.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydistill.recipes import UsageError, draft_files, models
from pydistill.recipes.draft import Options, Quality, Untrained, check, train
from pydistill.recipes.draft_training import Team

# The share of steps on the draft's own samples, and the source of the others.
SOURCES = {"target": ("target", 0.0), "text": ("text", 0.0), "draft": ("target", 1.0),
           "mixed": ("target", 0.5)}  # fmt: skip


@dataclass(frozen=True)
class Row:
    draft: str
    divergence: str
    source: str
    steps: int
    parameters: int  # of the draft's own
    before: Quality
    after: Quality
    tokens: int  # that taught
    distinct: int
    folder: str


@dataclass(frozen=True)
class Result:
    folder: str
    model: str
    options: dict[str, Any]  # of the base
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    base: Options,
    drafts: Sequence[str],
    divergences: Sequence[str],
    sources: Sequence[str],
    progress: bool = True,
    short_steps: int | None = None,
) -> Result:
    """Trains one draft a row into folders of `base.output`, and writes `table.json` and `table.md`
    there; UsageError for what cannot be met."""
    chosen = variants(base, drafts, divergences, sources, short_steps)
    for _, options in chosen:
        check(options)
    team = Team()
    if team.first:
        _begin(base, [(name, options.steps) for name, options in chosen])
    team.wait()
    target, tokenizer = models.load(base.model, models.compute_dtype(), progress and team.first)
    rows: list[Row] = []
    known: defaultdict[Any, Untrained] = defaultdict(Untrained)
    for name, options in chosen:
        path = base.output / f"{name}.json"
        done = path.exists()
        team.wait()
        if done:
            rows.append(_row(json.loads(path.read_text("utf-8"))))
            known[_beginning(options)].quality = rows[-1].before
            continue
        found = train(options, target, tokenizer, progress, known[_beginning(options)])
        rows.append(
            Row(
                options.draft, options.divergence, source_of(options), options.steps,
                found.parameters[1], found.before, found.after, found.tokens, found.distinct,
                found.folder,
            )
        )  # fmt: skip
        if team.first:
            draft_files.write(path, json.dumps(asdict(rows[-1]), indent=2))
        team.wait()
    result = Result(str(base.output), base.model, draft_files.named(base), rows)
    if team.first:
        draft_files.write(base.output / "table.json", json.dumps(result.to_json(), indent=2) + "\n")
        draft_files.write(base.output / "table.md", table(result) + "\n")
    return result


def variants(
    base: Options,
    drafts: Sequence[str],
    divergences: Sequence[str],
    sources: Sequence[str],
    short_steps: int | None = None,
) -> list[tuple[str, Options]]:
    """The base, and what differs from it in one thing, each with a folder of its own."""
    for source in sources:
        if source not in SOURCES:
            raise UsageError(f"--source {source} is not known; use one of {', '.join(SOURCES)}.")
    first = _of(base, drafts[0], divergences[0], sources[0])
    found = [first]
    found += [_of(base, x, divergences[0], sources[0]) for x in drafts[1:]]
    found += [_of(base, drafts[0], x, sources[0]) for x in divergences[1:]]
    found += [_of(base, drafts[0], divergences[0], x) for x in sources[1:]]
    if short_steps is not None:
        found = [replace(x, steps=short_steps) for x in found] + [first]
    named = []
    for number, options in enumerate(found):
        words = f"{options.draft} {options.divergence} {source_of(options)}"
        name = f"{number}-" + re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
        named.append((name, replace(options, output=base.output / name)))
    return named


def _of(base: Options, kind: str, divergence: str, source: str) -> Options:
    written, share = SOURCES[source]
    feature = kind.startswith("feature:")
    return replace(
        base, draft=kind, divergence=divergence, source=written, on_policy=share,
        width=base.width if feature else None, unroll=base.unroll if feature else 1,
        text=base.text if written == "text" else None,
    )  # fmt: skip


def _beginning(options: Options) -> tuple[Any, ...]:
    """The same for rows whose drafts are the same before any step: a feature draft's W and the most
    frequent tokens come from what is learnt, too."""
    if options.draft.startswith("feature:") or options.draft_vocab is not None:
        return options.draft, options.source, options.on_policy < 1
    return (options.draft,)


def source_of(options: Options) -> str:
    pair = (options.source, options.on_policy)
    return next(name for name, known in SOURCES.items() if known == pair)


def _begin(base: Options, rows: list[tuple[str, int]]) -> None:
    """The folder, which is this comparison's: begun now, or before with the same options."""
    path = base.output / "comparison.json"
    wanted = json.loads(json.dumps({"options": draft_files.named(base), "rows": rows}))
    if path.exists():
        if json.loads(path.read_text("utf-8")) != wanted:
            raise UsageError(
                f"{base.output} was begun with other options; go on with the same, name a new"
                " --output, or delete it."
            )
        return
    models.check_output(base.output)
    base.output.mkdir(exist_ok=True)
    draft_files.write(path, json.dumps(wanted))


def _row(found: dict[str, Any]) -> Row:
    quality: dict[str, Any] = {x: Quality(**found.pop(x)) for x in ("before", "after")}
    return Row(**found, **quality)


def table(result: Result) -> str:
    """In Markdown."""
    drafted = result.options["num_draft_tokens"]
    lines = [
        f"Drafts for {result.model}, temperature {result.options['temperature']:g}, on held-out"
        f" prompts, before -> after training; tokens a run of the target with {drafted} drafted.",
        "",
        "| draft | divergence | source | steps | parameters | distinct tokens | acceptance |"
        " same choice | tokens a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in result.rows:
        a, b = x.before, x.after
        lines.append(
            f"| {x.draft} | {x.divergence} | {x.source} | {x.steps} | {x.parameters / 1e6:.1f}M |"
            f" {x.distinct or '-'} | {a.acceptance:.1%} -> {b.acceptance:.1%} |"
            f" {a.same_choice:.1%} -> {b.same_choice:.1%} |"
            f" {a.block_efficiency:.2f} -> {b.block_efficiency:.2f} |"
        )
    return "\n".join(lines)
