"""Losses of rows of logits: `divergence`, `topk_divergence`, `token_logprob`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydistill
from vocab_parallel.ranks import (
    ROWS,
    VOCAB,
    Ranks,
    check,
    compare,
    logits,
    supports,
    token_ids,
)


@check(*pydistill.KINDS)
def divergence(ranks: Ranks, kind: str) -> None:
    student, teacher = logits()
    if kind == "tvd":  # the sign of what is within rounding of 0 is nobody's
        teacher[:3] = student[:3] + torch.randn(3, VOCAB)
    ids = token_ids(ranks)
    with_ignored = ids.clone()
    with_ignored[-1] = -100
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": torch.rand(ROWS) + 0.5, "scale_t2": True},
        {"labels": with_ignored, "label_weight": 0.3, "z_loss": 1e-3, "temperature": 2.0},
        {"labels": ids, "label_weight": 1.0},
        {"mask": torch.arange(ROWS) % 3 != 0, "weight": torch.rand(ROWS)},
    ]
    for i, variant in enumerate(variants):

        def call(s: Tensor, columns: slice, variant: Any = variant, **given: Any) -> Tensor:
            return pydistill.divergence(
                s, teacher[:, columns], kind, reduction="none", **variant, **given
            )

        compare(ranks, call, student, ("auto", "reference") if i in (0, 2) else ("auto",))


@check()
def alpha_beta_of_every_form(ranks: Ranks) -> None:
    student, teacher = logits()
    pairs = [(0.2, 0.7), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, -0.5), (1.5, -0.2)]
    alpha = torch.tensor([a for a, _ in pairs]).repeat(3)[:ROWS]
    beta = torch.tensor([b for _, b in pairs]).repeat(3)[:ROWS]

    def call(s: Tensor, columns: slice, **given: Any) -> Tensor:
        t = teacher[:, columns]
        return pydistill.divergence(
            s, t, "alpha_beta", alpha=alpha, beta=beta, reduction="none", **given
        )

    compare(ranks, call, student, truth=True)  # one process is off by 1.4e-5 in row 1


@check()
def near_agreement_is_as_exact_as_one_process(ranks: Ranks) -> None:
    student = torch.randn(ROWS, VOCAB) * 3
    teacher = student + 1e-4 * torch.randn(ROWS, VOCAB)
    for kind in pydistill.KINDS:
        if kind == "tvd":
            continue
        truth = pydistill.divergence(
            student.double(), teacher.double(), kind, reduction="none", impl="reference"
        )
        found = pydistill.divergence(
            student[:, ranks.columns], teacher[:, ranks.columns], kind, reduction="none",
            group=ranks.group,
        )  # fmt: skip
        torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)


@check()
def the_head_of_adaptive_kl_ends_among_ties(ranks: Ranks) -> None:
    """50 equal tokens of 1/100 each, half of them in the head, in token order over the shards."""
    cut = ranks.cuts[-2]
    student, teacher = torch.randn(ROWS, VOCAB), torch.full((ROWS, VOCAB), -torch.inf)
    teacher[:, cut - 25 : cut + 25] = 0.0
    teacher[:, :50] = torch.linspace(-1, 1, 50)
    student = torch.where(teacher == -torch.inf, -torch.inf, student)

    def call(s: Tensor, columns: slice, **given: Any) -> Tensor:
        return pydistill.divergence(
            s, teacher[:, columns], "adaptive_kl", reduction="none", **given
        )

    compare(ranks, call, student)


@check()
def the_maximum_may_be_on_any_rank(ranks: Ranks) -> None:
    """Far above what the other ranks hold, on either side of a pair."""
    student, teacher = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    for r in range(ROWS):
        student[r, ranks.cuts[r % ranks.world]] += 90
        teacher[r, ranks.cuts[(r + r // ranks.world) % ranks.world]] += 90
    ids = torch.arange(ROWS)
    calls: list[Callable[..., Tensor]] = [
        lambda s, c, **g: pydistill.divergence(s, teacher[:, c], "jsd", reduction="none", **g),
        lambda s, c, **g: pydistill.divergence(s, teacher[:, c], reduction="none", **g),
        lambda s, c, **g: pydistill.token_logprob(s, ids, **g).logprob,
    ]
    for call in calls:
        compare(ranks, call, student)


@check()
def infinities_and_nan_stay_in_their_rows(ranks: Ranks) -> None:
    student, teacher = logits()
    student[1, 300] = -torch.inf
    teacher[2, 5] = -torch.inf
    student[4, 7] = torch.nan
    teacher[5, 399] = torch.inf
    student[6] = -torch.inf
    teacher[7, ranks.cuts[1] :] = -torch.inf
    for kind in pydistill.KINDS:
        if kind != "tvd":

            def call(s: Tensor, columns: slice, kind: str = kind, **given: Any) -> Tensor:
                return pydistill.divergence(s, teacher[:, columns], kind, reduction="none", **given)

            compare(ranks, call, student)


@check()
def pairs_of_rows(ranks: Ranks) -> None:
    student, teacher = logits()
    rows_s, rows_t = torch.randint(0, ROWS - 1, (ROWS,)), torch.randint(0, ROWS, (ROWS,))

    def call(s: Tensor, columns: slice, **given: Any) -> Tensor:
        return pydistill.divergence(
            s, teacher[:, columns], "jsd", student_rows=rows_s, teacher_rows=rows_t,
            reduction="none", **given,
        )  # fmt: skip

    compare(ranks, call, student)


@check("distillm", "torchtune", "hinton")
def conventions(ranks: Ranks, convention: str) -> None:
    student, teacher = logits()
    mask = torch.arange(ROWS) != 1

    def call(s: Tensor, columns: slice, **given: Any) -> Tensor:
        return pydistill.divergence(
            s, teacher[:, columns], convention=convention, temperature=1.5, mask=mask,
            reduction="none", **given,
        )  # fmt: skip

    compare(ranks, call, student)


@check()
def half_logits_and_the_mean(ranks: Ranks) -> None:
    student, teacher = (x.bfloat16() for x in logits())
    whole = student.clone().requires_grad_()
    pydistill.divergence(whole, teacher).backward()
    part = student[:, ranks.columns].clone().requires_grad_()
    pydistill.divergence(part, teacher[:, ranks.columns], group=ranks.group).backward()
    assert whole.grad is not None and part.grad is not None and part.grad.dtype == torch.bfloat16
    # Both round to bf16, possibly to two neighbours.
    torch.testing.assert_close(part.grad, whole.grad[:, ranks.columns], rtol=2**-7, atol=1e-6)


TAILS = ("bucket", "renormalize", "truncate", "zero")
ON_A_SUPPORT = [
    pair
    for pair in itertools.product(("forward_kl", "reverse_kl", "jsd", "tvd"), TAILS)
    if pair != ("reverse_kl", "zero")
]


@check(*ON_A_SUPPORT)
def topk_divergence(ranks: Ranks, kind: str, tail: str) -> None:
    student, teacher = logits()
    teacher = teacher + torch.randn_like(teacher)
    log_p, ids = supports(ranks, teacher)
    variants: list[dict[str, Any]] = [{}, {"mask": torch.arange(ROWS) % 3 != 0}]
    if tail in ("renormalize", "zero"):
        variants.append({"temperature": torch.rand(ROWS) + 0.5, "scale_t2": True})
    if kind == "jsd":
        variants.append({"beta": torch.rand(ROWS) * 0.8 + 0.1})
        labels = token_ids(ranks)
        labels[-1] = -100
        variants.append({"labels": labels, "label_weight": 0.3, "z_loss": 1e-3})
    for variant in variants:

        def call(s: Tensor, _: slice, variant: Any = variant, **given: Any) -> Tensor:
            return pydistill.topk_divergence(
                s, log_p, ids, kind, tail=tail, reduction="none", **variant, **given
            )

        compare(ranks, call, student)


@check()
def a_support_of_everything_and_a_peaked_row(ranks: Ranks) -> None:
    student = torch.randn(ROWS, VOCAB)
    student[:, ranks.cuts[1]] += 24  # log q of the tail is about -17
    teacher = student + 0.3 * torch.randn(ROWS, VOCAB)
    ids = torch.stack([torch.randperm(VOCAB) for _ in range(ROWS)])
    for size in (VOCAB, 2):
        given = ids[:, :size].contiguous()
        if size == 2:
            given[:, 0] = ranks.cuts[1]
        scored = torch.log_softmax(teacher.double(), -1).gather(1, given)
        if size == 2:
            rest = teacher.double().scatter(1, given, -torch.inf)
            tail = torch.logsumexp(rest, 1) - torch.logsumexp(teacher.double(), 1)
        else:
            tail = torch.full((ROWS,), -torch.inf, dtype=torch.float64)

        def call(
            s: Tensor, _: slice, scored: Tensor = scored, ids: Tensor = given,
            tail: Tensor = tail, **given: Any,
        ) -> Tensor:  # fmt: skip
            return pydistill.topk_divergence(
                s, scored, ids, tail_logprob=tail, reduction="none", **given
            )

        compare(ranks, call, student)


@check()
def the_token_at_local_index_0(ranks: Ranks) -> None:
    """It is in the support or the label of each row, and every rank's first column has the
    gradient that it has in one process, which is far from 0."""
    student, teacher = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    first = list(ranks.cuts[:-1])
    ids = torch.tensor(first).expand(ROWS, -1).contiguous()
    log_p = torch.log_softmax(teacher, -1).gather(1, ids)
    labels = torch.tensor(first).repeat(ROWS)[:ROWS]
    calls: list[Callable[..., Tensor]] = [
        lambda s, c, **g: pydistill.topk_divergence(s, log_p, ids, reduction="none", **g),
        lambda s, c, **g: pydistill.token_logprob(s, labels, **g).logprob,
        lambda s, c, **g: pydistill.divergence(
            s, teacher[:, c], labels=labels, label_weight=1.0, reduction="none", **g
        ),
    ]
    for call in calls:
        whole = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(whole, slice(None)).sum(), whole)
        assert bool((gradient[:, first].abs().amax(0) > 1e-3).all())
        compare(ranks, call, student)


@check("logprob", "entropy")
def token_logprob(ranks: Ranks, output: str) -> None:
    student, _ = logits()
    student[2] *= 8  # all but certain
    student[4, 7], student[6] = torch.nan, -torch.inf
    ids, mask = token_ids(ranks), torch.arange(ROWS) != 1
    ids[1] = -100
    for temperature in (1.0, torch.rand(ROWS) + 0.5):

        def call(s: Tensor, _: slice, t: Any = temperature, **given: Any) -> Tensor:
            found = pydistill.token_logprob(s, ids, temperature=t, mask=mask, **given)
            value: Tensor = getattr(found, output)
            return value

        compare(ranks, call, student)
