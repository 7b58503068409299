"""The exact law of the tokens that a verified block emits, for vocabularies small enough to list.

Every sequence that the draft could propose is enumerated, and each coin integrated out by the odds
and the residuals that `pydistill.reference.verify` decides by:

    law(t_1 .. t_{K+1}) = sum over drafted x and accepted n of
        s(x) P(n | x) [t_1 .. t_n = x_1 .. x_n] y_n(t_{n+1}) p(t_{n+2} | ..) .. p(t_{K+1} | ..)

s is what the draft really samples from, y_n what the verifier draws the token after n accepted ones
from, and tokens behind the block are the target's. A lossless pair has the law p(t_1) p(t_2 | t_1)
... Cost: V^(K+1) numbers for each n. Rows are fp64, so no rounding of a kernel is in the result:
what is examined are the rule, the settings, and the draft.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydistill.ops import _verify_call
from pydistill.reference import verify as reference

Prefix = tuple[int, ...]
Source = Tensor | Callable[[Prefix], Any]
WARPERS = _verify_call.NAMES
_MOST = 1 << 20  # outcomes that are enumerated


class ExactLaw(NamedTuple):
    """Of the first K + 1 tokens: fp64 `[V, ..., V]`, K + 1 times."""

    emitted: Tensor
    target: Tensor
    rounding: float  # what a probability may be off, where the laws are the same


def block_law(
    target: Source,
    draft: Source | None,
    sampled: Source | None,
    slots: int,
    rule: reference.Rule,
    settings: dict[str, Any],
) -> ExactLaw:
    """`settings` are `verify`'s warpers, the draft's, and logit_bias."""
    if draft is None and sampled is None:
        raise ValueError(
            "draft is None, so nothing is known of how the drafted tokens came about; pass its"
            " logits, or sampled= for a draft that reports none."
        )
    bias = settings.get("logit_bias")
    levels = _levels("target", target, slots)
    vocab = levels[0].shape[-1]
    if bias is not None:
        bias = _row("logit_bias", bias, ())
        if len(bias) != vocab:
            raise ValueError(f"logit_bias has {len(bias)} tokens, the target {vocab}; pass [V].")
        settings = {**settings, "logit_bias": bias}
    logits, points = (None, None) if draft is None else _draft_rows(draft, slots, vocab)
    prefixes = list(itertools.product(range(vocab), repeat=slots))
    index = torch.tensor(prefixes, dtype=torch.int64).reshape(-1 if slots else 1, slots)
    place = torch.arange(vocab**slots)
    at = [place // vocab ** (slots - i) for i in range(slots + 1)]  # of a sequence's prefixes

    warpers = warper_rows(settings, "cpu")
    p = [_warped("target", x, warpers[:, :4], bias) for x in levels]
    rounding = 1e-12
    if sampled is not None:
        # The same q in fp32 is another distribution, by its rounding.
        first = sampled if isinstance(sampled, Tensor) else sampled(())
        if isinstance(first, Tensor) and first.dtype != torch.float64:
            rounding = 4 * slots * torch.finfo(first.dtype).eps
        s = [_probabilities(x) for x in _levels("sampled", sampled, slots - 1, vocab)]
    elif points is not None:
        s = [torch.nn.functional.one_hot(x, vocab).double() for x in points]
    else:
        assert logits is not None
        s = [_warped("draft", x, warpers[:, 4:], None) for x in logits]
    odds = torch.ones(len(place), dtype=torch.float64)
    for i in range(slots):
        odds = odds * s[i][at[i], index[:, i]]
    kept = odds > 0
    index, odds, at = index[kept], odds[kept], [x[kept] for x in at]

    inputs = _verify_call.prepare(
        "verify",
        torch.stack([x[a] for x, a in zip(levels, at, strict=True)], 1),
        None if not logits else torch.stack(
            [x[a] for x, a in zip(logits, at[:-1], strict=True)], 1
        ),
        index, rule, "reference", draft_topk_ids=None, tree=None, num_drafted=None,
        warpers=tuple(settings.get(n) for n in WARPERS),
        drafts=tuple(settings.get("draft_" + n) for n in WARPERS),
        logit_bias=settings.get("logit_bias"), seed=0, position=0,
    ).inputs  # fmt: skip
    d = reference.distributions(inputs)
    length, _ = reference.usable(inputs, d)
    tests = reference.slot_tests(d, inputs.ids, length, rule)
    passes = torch.where(
        torch.arange(slots) < length[:, None], (tests.num / tests.den).clamp(0, 1), 0
    )
    fails = 1 - passes
    emitted = torch.zeros(vocab ** (slots + 1), dtype=torch.float64)
    for n in range(slots + 1):
        if reference.METHODS[rule.method] == "block":  # the last slot that passes
            chance = fails[:, n:].prod(-1) * (passes[:, n - 1] if n else 1)
        else:  # up to the first that fails
            chance = passes[:, :n].prod(-1) * (fails[:, n] if n < slots else 1)
        weights = reference.final_weights(d, tests, torch.full_like(length, n), length, rule)
        mass = (odds * chance)[:, None] * weights / weights.sum(-1, keepdim=True)
        table = torch.zeros(vocab**n, vocab, dtype=torch.float64).index_add_(0, at[n], mass)
        emitted += _continued(table.flatten(), p[n + 1 :])
    truth = _continued(torch.ones(1, dtype=torch.float64), p)
    shape = [vocab] * (slots + 1)
    return ExactLaw(emitted.reshape(shape), truth.reshape(shape), rounding)


def _continued(law: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The law `[V^n]` of n tokens, continued by rows `[V^i, V]` for i = n, n + 1, ..."""
    for row in rows:
        law = (law[:, None] * row).flatten()
    return law


def warper_rows(settings: dict[str, Any], device: Any) -> Tensor:
    """fp64 `[1, 8]`: the warpers of the target and of the draft, as the reference wants them."""
    sides = [tuple(settings.get(prefix + n) for n in WARPERS) for prefix in ("", "draft_")]
    return _verify_call.warper_rows(sides[0], sides[1], 1, torch.device(device), True)


def target_rows(target: Source, settings: dict[str, Any], prefixes: Sequence[Prefix]) -> Tensor:
    """The target's warped distributions after these prefixes, fp64 `[N, V]`."""
    rows = torch.stack([_row("target", target, x) for x in prefixes])
    warpers = warper_rows(settings, "cpu")[:, :4]
    bias = settings.get("logit_bias")
    return _warped("target", rows, warpers, None if bias is None else _row("logit_bias", bias, ()))


def _warped(name: str, logits: Tensor, warpers: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        logits = logits + bias
    p, _, sound = reference.warped(logits[None], warpers)
    if not bool(sound.all()):
        row = logits[int((~sound[0]).nonzero()[0])]
        raise ValueError(
            f"{name} has a row of logits without a softmax, {_shown(row)}; NaN, +inf and rows that"
            " are -inf throughout are none."
        )
    return p[0]


def _probabilities(rows: Tensor) -> Tensor:
    wrong = ~((rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() < 1e-6))
    if bool(wrong.any()):
        row = rows[int(wrong.nonzero()[0])]
        raise ValueError(
            f"sampled has a row {_shown(row)}, which is no distribution: its sum is"
            f" {float(row.sum()):.6g}; pass probabilities, such as (logits / T).softmax(-1)."
        )
    return rows / rows.sum(-1, keepdim=True)


def _shown(row: Tensor) -> list[float]:
    return [float(f"{x:.4g}") for x in row[:8].tolist()]


def _levels(name: str, source: Source, last: int, vocab: int | None = None) -> list[Tensor]:
    """Rows `[V^i, V]` after every prefix of i = 0 .. last tokens."""
    if last < 0:
        return []
    first = _row(name, source, ())
    if vocab is None:
        vocab = len(first)
        if vocab ** (last + 1) > _MOST:
            most = next((k for k in range(last) if vocab ** (k + 2) > _MOST), 0)
            fix = f"num_draft_tokens of at most {most}" if most else "a smaller vocabulary"
            raise ValueError(
                f"{vocab} tokens in {last + 1} places have more outcomes than the {_MOST} that are"
                f" enumerated; use {fix}, or certify samples of models, or tokens=."
            )
    found = []
    for i in range(last + 1):
        rows = [_row(name, source, x) for x in itertools.product(range(vocab), repeat=i)]
        for row in rows:
            if len(row) != vocab:
                raise ValueError(
                    f"{name} has rows of {len(row)} tokens where {vocab} are expected; every row"
                    " has to be of the target's vocabulary."
                )
        found.append(torch.stack(rows))
    return found


def _row(name: str, source: Source, prefix: Prefix) -> Tensor:
    row = source(prefix) if callable(source) else source
    row = torch.as_tensor(row, dtype=torch.float64).detach().cpu()
    if row.ndim != 1 or not len(row):
        raise ValueError(
            f"{name} gives shape {tuple(row.shape)} after {prefix}; one row [V] is needed: a tensor"
            " [V], or a function from a tuple of tokens to one."
        )
    return row


def _draft_rows(
    draft: Source, slots: int, vocab: int
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Logits by level, or the tokens of a draft that does not sample."""
    if isinstance(draft, Tensor) or not isinstance(draft(()), int):
        return _levels("draft", draft, slots - 1, vocab), None
    points = []
    for i in range(slots):
        tokens = [draft(x) for x in itertools.product(range(vocab), repeat=i)]
        wrong = [x for x in tokens if not isinstance(x, int) or not 0 <= x < vocab]
        if wrong:
            raise ValueError(
                f"draft gives {wrong[0]!r} in place of a token; a draft that does not sample gives"
                f" an int of 0 to {vocab - 1} after every prefix."
            )
        points.append(torch.tensor(tokens))
    return None, points
