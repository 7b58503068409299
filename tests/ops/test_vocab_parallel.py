"""A vocabulary sharded over the processes of a group against one process that holds all of it.

For each number of processes they start once, run every check below in the same order, and write
down what failed; each check is then a test. Shards are uneven, and with three processes one holds a
single token. Both sides of a comparison are fp32: gradients are differences of probabilities, each
rounded to 1e-7 of a log of about 10, so 1e-6 beside 1 is round-off.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

import pydistill
from pydistill import _native
from pydistill.ops import _linear_head as linear
from pydistill.ops import _vocab_parallel as parallel

OP = "divergence"
pytestmark = pytest.mark.skipif(
    not _native.available(), reason="without native code one process is the less exact side"
)
ROWS, VOCAB, PADDED, HIDDEN = 13, 400, 392, 24
CUTS = {2: (0, 130, VOCAB), 3: (0, 1, 270, VOCAB)}
CHECKS: dict[str, Callable[[Any], None]] = {}


class Ranks(NamedTuple):
    """The processes, as one of them sees them."""

    rank: int
    world: int
    group: Any

    @property
    def cuts(self) -> tuple[int, ...]:
        return CUTS[self.world]

    @property
    def columns(self) -> slice:
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    def raises(self, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
        """On every rank, and the group is still in step."""
        with pytest.raises(error, match=match):
            call()
        dist.barrier(self.group)


def check(*values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a check, once for each of `values`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for value in values or (None,):
            given = () if value is None else value if isinstance(value, tuple) else (value,)
            name = "-".join([function.__name__, *map(str, given)]).replace(" ", "_")
            CHECKS[name] = lambda ranks, given=given: function(ranks, *given)
        return function

    return register


def logits(padded: bool = True) -> tuple[Tensor, Tensor]:
    """Student and teacher, from all but equal (row 0) to far apart; row 3 is equal."""
    student = torch.randn(ROWS, VOCAB) * 3
    teacher = student + torch.randn(ROWS, VOCAB) * torch.logspace(-3, 0.5, ROWS)[:, None]
    teacher[3] = student[3]
    if padded:
        student[:, PADDED:] = teacher[:, PADDED:] = -torch.inf
    return student, teacher


def token_ids(ranks: Ranks) -> Tensor:
    """Labels among which are the first and the last token of every shard."""
    ids = torch.randint(0, PADDED, (ROWS,))
    edges = [0, *(c for cut in ranks.cuts[1:-1] for c in (cut - 1, cut)), PADDED - 1]
    ids[: len(edges)] = torch.tensor(edges)
    return ids


def close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5, or 1e-6 of the largest number of the row."""
    assert found.dtype == wanted.dtype
    scale = wanted.nan_to_num(0, 0, 0).abs()
    scale = (scale.amax(-1, keepdim=True) if scale.ndim == 2 else scale).clamp(min=1)
    torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-5, atol=1e-6, equal_nan=True)


def agree(found: Tensor, ranks: Ranks) -> None:
    """Every rank has the very same numbers."""
    all_of_them = [torch.empty_like(found) for _ in range(ranks.world)]
    dist.all_gather(all_of_them, found.contiguous(), group=ranks.group)
    for other in all_of_them:
        torch.testing.assert_close(other, found, rtol=0, atol=0, equal_nan=True)


def compare(
    ranks: Ranks,
    function: Callable[..., Tensor],
    student: Tensor,
    impls: tuple[str, ...] = ("auto", "reference"),
    truth: bool = False,
) -> None:
    """`function(student, columns, group=..., impl=...)` -> row values; sharded against whole (or,
    for `truth`, against the definition in fp64), with the gradient of a random mixture of the rows,
    twice."""
    upstream = torch.randn(ROWS)

    def mixture(x: Tensor) -> Tensor:
        return (x.reshape(-1) * upstream).sum()

    whole = student.clone().requires_grad_()
    wanted = function(whole.double() if truth else whole, slice(None)).float()
    (gradient,) = torch.autograd.grad(mixture(wanted), whole)
    for impl in impls:
        part = student[:, ranks.columns].clone().requires_grad_()
        found = function(part, ranks.columns, group=ranks.group, impl=impl)
        (local,) = torch.autograd.grad(mixture(found), part, retain_graph=True)
        (again,) = torch.autograd.grad(mixture(found), part)
        agree(found.detach(), ranks)  # first: a rank that fails alone leaves the others waiting
        close(found.detach(), wanted.detach())
        close(local, gradient[:, ranks.columns])
        torch.testing.assert_close(again, local, rtol=0, atol=0, equal_nan=True)


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


def supports(ranks: Ranks, teacher: Tensor, k: int = 16) -> tuple[Tensor, Tensor]:
    """Unsorted supports with empty slots, the edges of shards among their tokens."""
    ids = torch.stack([torch.randperm(PADDED)[:k] for _ in range(ROWS)])
    edge = token_ids(ranks)[:, None]
    ids[:, :1] = torch.where((ids == edge).any(1, keepdim=True), ids[:, :1], edge)
    ids[:, 3] = -1
    ids[5, 4:] = -1
    return torch.log_softmax(teacher, -1).gather(1, ids.clamp(min=0)), ids


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


class Heads(NamedTuple):
    """Hidden states and heads of both sides; the student's tensors require grad."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    def local(self, columns: slice) -> Heads:
        leaves = [
            x.detach().clone() for x in (self.hidden, self.weight[columns], self.bias[columns])
        ]
        leaves = [x.requires_grad_() for x in leaves]
        return Heads(*leaves, self.teacher_hidden, self.teacher_weight[columns])


def heads(dtype: torch.dtype = torch.float32) -> Heads:
    weight, teacher_weight = (torch.randn(VOCAB, HIDDEN) / 3 for _ in range(2))
    hidden, teacher_hidden = (torch.randn(ROWS, HIDDEN) for _ in range(2))
    found = (hidden, weight, torch.randn(VOCAB), teacher_hidden, teacher_weight)
    return Heads(*(x.to(dtype) for x in found))


def compare_heads(
    ranks: Ranks,
    function: Callable[..., Tensor],
    given: Heads,
    impls: tuple[str, ...] = ("auto", "reference"),
    rtol: float = 1e-5,
) -> None:
    """`function(heads, group=..., impl=...)` -> a scalar, and all three gradients."""
    whole = given.local(slice(None))
    wanted = function(whole)
    wanted.backward()
    for impl in impls:
        part = given.local(ranks.columns)
        found = function(part, group=ranks.group, impl=impl)
        found.backward()
        agree(found.detach(), ranks)
        agree(part.hidden.grad, ranks)
        close(found.detach(), wanted.detach())
        for name in ("hidden", "weight", "bias"):
            local, full = getattr(part, name).grad, getattr(whole, name).grad
            full = full if name == "hidden" else full[ranks.columns]
            assert local.dtype == full.dtype
            torch.testing.assert_close(local, full, rtol=rtol, atol=rtol / 10)


GRADIENTS = ("recompute", "in_forward")
MASK = torch.arange(ROWS) % 4 != 2


@check(*itertools.product(GRADIENTS, ("forward_kl", "jsd", "adaptive_kl")))
def linear_divergence(ranks: Ranks, gradient: str, kind: str) -> None:
    labels = token_ids(ranks)

    def call(h: Heads, **given: Any) -> Tensor:
        return pydistill.linear_divergence(
            h.hidden, h.weight, h.teacher_hidden, h.teacher_weight, kind, student_bias=h.bias,
            student_softcap=4.0, student_logit_scale=1.3, temperature=1.5, labels=labels,
            label_weight=0.2, z_loss=1e-3, mask=MASK, gradient=gradient, **given,
        )  # fmt: skip

    compare_heads(ranks, call, heads())


@check(*itertools.product(GRADIENTS, ("bucket", "truncate")))
def linear_topk_divergence(ranks: Ranks, gradient: str, tail: str) -> None:
    log_p, ids = supports(ranks, torch.randn(ROWS, VOCAB))

    def call(h: Heads, **given: Any) -> Tensor:
        return pydistill.linear_topk_divergence(
            h.hidden, h.weight, log_p, ids, "jsd", tail=tail, student_bias=h.bias, mask=MASK,
            gradient=gradient, reduction="sum", **given,
        )  # fmt: skip

    compare_heads(ranks, call, heads())


@check()
def linear_token_logprob(ranks: Ranks) -> None:
    ids, upstream = token_ids(ranks), torch.randn(ROWS)

    def call(h: Heads, **given: Any) -> Tensor:
        found = pydistill.linear_token_logprob(
            h.hidden, h.weight, ids, bias=h.bias, softcap=3.0, mask=MASK, **given
        )
        return (found.logprob * upstream).sum() + 0.3 * found.entropy.sum()

    compare_heads(ranks, call, heads())


@check(*GRADIENTS)
def half_heads_sum_their_gradients_in_fp32(ranks: Ranks, gradient: str) -> None:
    def call(h: Heads, **given: Any) -> Tensor:
        return pydistill.linear_divergence(
            h.hidden, h.weight, h.teacher_hidden, h.teacher_weight, student_bias=h.bias,
            gradient=gradient, **given,
        )  # fmt: skip

    given = heads(torch.bfloat16)
    compare_heads(ranks, call, given, ("auto",), rtol=2**-7)  # one rounding each
    part = given.local(ranks.columns)
    call(part, group=ranks.group).backward()
    exact = Heads(*(x.float() for x in given)).local(slice(None))
    call(exact).backward()
    assert part.hidden.grad is not None and exact.hidden.grad is not None
    # Half a unit in the last place: partial sums rounded to bf16 on each rank would miss it.
    torch.testing.assert_close(
        part.hidden.grad.float(), exact.hidden.grad, rtol=1.01 * 2**-8, atol=1e-7
    )


@contextmanager
def counting() -> Any:
    """How often the processes talk."""
    calls: list[tuple[int, ...]] = []
    original = dist.all_reduce

    def counted(x: Tensor, *args: Any, **named: Any) -> Any:
        calls.append(tuple(x.shape))
        return original(x, *args, **named)

    dist.all_reduce = counted
    try:
        yield calls
    finally:
        dist.all_reduce = original


@check()
def all_reduces_are_few(ranks: Ranks) -> None:
    """One to meet; two for the rows of `divergence` (eight for adaptive_kl), one for those of the
    others; none backward, but one for hidden states. Linear: those of each block of rows."""
    student, teacher = (x[:, ranks.columns] for x in logits())
    log_p, ids = supports(ranks, torch.randn(ROWS, VOCAB))
    h, g = heads().local(ranks.columns), ranks.group
    four = (h.hidden, h.weight, h.teacher_hidden, h.teacher_weight)
    blocks = -(-ROWS // linear.BLOCK_ROWS)
    assert blocks > 1
    tokens = ids[:, 0]
    leaf = student.clone().requires_grad_()
    counts: list[tuple[Callable[[], Tensor], int, int]] = [
        (lambda: pydistill.divergence(leaf, teacher, "jsd", group=g), 1 + 2, 0),
        (lambda: pydistill.divergence(leaf, teacher, "adaptive_kl", group=g), 1 + 8, 0),
        (lambda: pydistill.topk_divergence(leaf, log_p, ids, group=g), 1 + 1, 0),
        (lambda: pydistill.token_logprob(leaf, tokens, group=g).logprob.sum(), 1 + 1, 0),
        (lambda: pydistill.linear_divergence(*four, group=g), 1 + 2 * blocks, 1),
        (
            lambda: pydistill.linear_divergence(*four, gradient="in_forward", group=g),
            1 + 2 * blocks + 1,
            0,
        ),
        (
            lambda: pydistill.linear_topk_divergence(h.hidden, h.weight, log_p, ids, group=g),
            1 + blocks,
            1,
        ),
        (
            lambda: pydistill.linear_token_logprob(
                h.hidden, h.weight, tokens, group=g
            ).logprob.sum(),
            1 + blocks,
            1,
        ),
    ]
    for call, forward, backward in counts:
        with counting() as calls:
            loss = call()
            assert len(calls) == forward, calls
            loss.backward()
            assert len(calls) == forward + backward, calls


@check()
def tiles_of_rows_change_nothing(ranks: Ranks) -> None:
    student, teacher = (x[:, ranks.columns] for x in logits())
    log_p, ids = supports(ranks, torch.randn(ROWS, VOCAB))

    def losses() -> list[Tensor]:
        g: Any = {"group": ranks.group, "reduction": "none"}
        return [
            pydistill.divergence(student, teacher, "adaptive_kl", **g),
            pydistill.topk_divergence(student, log_p, ids, **g),
            pydistill.token_logprob(student, ids[:, 0], group=ranks.group).entropy,
        ]

    whole, parallel.TILE = losses(), 2 * VOCAB
    try:
        tiled = losses()
    finally:
        parallel.TILE = 1 << 19
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


@check()
def no_rows(ranks: Ranks) -> None:
    nothing = torch.zeros(0, VOCAB)[:, ranks.columns].requires_grad_()
    masked = torch.randn(2, VOCAB)[:, ranks.columns].requires_grad_()
    for rows, given in ((nothing, {}), (masked, {"mask": torch.zeros(2, dtype=torch.bool)})):
        for kind in ("jsd", "adaptive_kl"):
            loss = pydistill.divergence(rows, rows.detach(), kind, group=ranks.group, **given)
            loss.backward()
            assert loss.item() == 0 and rows.grad is not None and not rows.grad.any()


@check()
def what_differs_between_ranks_raises_on_every_rank(ranks: Ranks) -> None:
    student, teacher = (x[:, ranks.columns] for x in logits())
    odd = ranks.rank == 1
    kinds = ("jsd", "forward_kl")
    cases: list[Callable[[], Any]] = [
        lambda: pydistill.divergence(student, teacher, kinds[odd], group=ranks.group),
        lambda: pydistill.divergence(student, teacher, temperature=1.0 + odd, group=ranks.group),
        lambda: pydistill.divergence(student[odd:], teacher[odd:], group=ranks.group),
        lambda: pydistill.divergence(
            student.bfloat16() if odd else student, teacher, group=ranks.group
        ),
        lambda: pydistill.divergence(None if odd else student, teacher, group=ranks.group),
        lambda: pydistill.token_logprob(
            student, torch.zeros(ROWS + odd, dtype=torch.long), group=ranks.group
        ),
    ]
    for case in cases:
        ranks.raises(ValueError, "ranks of the group pass different arguments", case)
    ranks.raises(
        ValueError,
        "rank 1 of the group passes tensors of",
        lambda: pydistill.divergence(
            student, torch.cat([teacher, teacher], 1) if odd else teacher, group=ranks.group
        ),
    )
    ranks.raises(
        ValueError,
        "rank 1 of the group passes tensors of 0 and 0",
        lambda: pydistill.token_logprob(
            student[:, :0] if odd else student, torch.zeros(ROWS).long(), group=ranks.group
        ),
    )


@check()
def wrong_values_raise_on_every_rank(ranks: Ranks) -> None:
    student, teacher = (x[:, ranks.columns] for x in logits())
    leaf = student.clone().requires_grad_()
    log_p, ids = supports(ranks, torch.randn(ROWS, VOCAB))
    twice, beyond = ids.clone(), ids.clone()
    twice[2, 1], beyond[2, 1] = twice[2, 0], VOCAB
    labels, g = torch.full((ROWS,), VOCAB), ranks.group
    ranks.raises(
        ValueError, "twice in row 2", lambda: pydistill.topk_divergence(leaf, log_p, twice, group=g)
    )
    ranks.raises(
        ValueError,
        f"topk_ids holds {VOCAB}, but student_logits has {VOCAB}",
        lambda: pydistill.topk_divergence(leaf, log_p, beyond, group=g),
    )
    ranks.raises(
        ValueError,
        f"neither a token id below {VOCAB}",
        lambda: pydistill.divergence(leaf, teacher, labels=labels, label_weight=0.5, group=g),
    )
    ranks.raises(
        ValueError,
        f"outside the {VOCAB} tokens",
        lambda: pydistill.token_logprob(leaf, labels, group=g),
    )
    ranks.raises(ValueError, "kind='x'", lambda: pydistill.divergence(leaf, teacher, "x", group=g))
    ranks.raises(
        ValueError,
        "overwrite_logits=True is not offered with a group",
        lambda: pydistill.divergence(leaf, teacher, overwrite_logits=True, group=g),
    )
    ranks.raises(
        TypeError, "fp64", lambda: pydistill.divergence(leaf.double(), teacher.double(), group=g)
    )
    ranks.raises(
        TypeError, "group is a str", lambda: pydistill.divergence(leaf, teacher, group="tp")
    )
    loss = pydistill.divergence(leaf, teacher, group=g)
    ranks.raises(
        RuntimeError,
        "first derivatives only",
        lambda: torch.autograd.grad(loss, leaf, create_graph=True),
    )
    ranks.raises(
        RuntimeError,
        "no forward mode",
        lambda: along_a_tangent(lambda s: pydistill.divergence(s, teacher, group=g), student),
    )
    if ranks.world == 2:  # once is enough: it takes seconds
        compiled = torch.compile(
            lambda s: pydistill.divergence(s, teacher, group=g), backend="eager", fullgraph=True
        )
        ranks.raises(Exception, "eager mode", lambda: compiled(student))


def along_a_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@check()
def flagged_rows_are_nan(ranks: Ranks) -> None:
    """What a GPU, or a compiled caller, cannot raise for."""
    student, teacher = logits()
    log_p, ids = supports(ranks, teacher)
    ids[2, 1], ids[4, 1] = ids[2, 0], VOCAB
    labels = token_ids(ranks)
    labels[1], labels[6] = VOCAB, -1
    temperature = torch.ones(ROWS)
    temperature[8] = 0
    from pydistill.ops import _rows

    readable, _rows.values_readable = _rows.values_readable, lambda x: False
    try:
        compare(
            ranks,
            lambda s, c, **g: pydistill.topk_divergence(s, log_p, ids, reduction="none", **g),
            student,
        )
        compare(
            ranks,
            lambda s, c, **g: pydistill.divergence(
                s, teacher[:, c], labels=labels, label_weight=0.5, temperature=temperature,
                reduction="none", **g,
            ),
            student,
        )  # fmt: skip
        compare(
            ranks,
            lambda s, c, **g: (
                pydistill.token_logprob(s, labels, temperature=temperature, **g).logprob
            ),
            student,
        )
    finally:
        _rows.values_readable = readable


@check("same rows", "rows of its own")
def a_weight_sharded_by_fsdp2(ranks: Ranks, rows: str) -> None:
    """Without a group: a DTensor's `full_tensor` gathers the weight, and its gradient arrives in
    the shards. Where each process has rows of its own, `grad_placements` must say that they add up.
    The DTensor itself is refused, with and without a group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    h = heads()
    whole, own = h.local(slice(None)), slice(None)
    if rows != "same rows":
        own = slice(ROWS * ranks.rank // ranks.world, ROWS * (ranks.rank + 1) // ranks.world)
    pydistill.linear_divergence(*whole[:2], *whole[3:], reduction="sum").backward()
    mesh = init_device_mesh("cpu", (ranks.world,))
    weight = torch.nn.Parameter(distribute_tensor(h.weight, mesh, [Shard(0)]))
    placements = None if rows == "same rows" else [Partial("sum")]
    gathered = weight.full_tensor(grad_placements=placements)
    pydistill.linear_divergence(
        h.hidden[own], gathered, h.teacher_hidden[own], h.teacher_weight, reduction="sum"
    ).backward()
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
    assert weight.grad.to_local().shape[0] < VOCAB and whole.weight.grad is not None
    close(weight.grad.full_tensor(), whole.weight.grad)
    for group in (None, ranks.group):
        ranks.raises(
            TypeError,
            "student_weight is a DTensor",
            lambda group=group: pydistill.linear_divergence(
                h.hidden, weight, *whole[3:], group=group
            ),
        )


def main(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    linear.BLOCK_ROWS, linear.TILE_ROWS, linear.TILE_COLUMNS = 4, 5, 64
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ranks, found = Ranks(rank, world, dist.group.WORLD), {}
    for name, run in CHECKS.items():
        torch.manual_seed(0)
        try:
            found[name] = ""
            run(ranks)
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
        Path(directory, f"rank{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(CUTS))
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each rank, what failed in each check: "" if nothing did."""
    world, directory = request.param, tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(directory)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    results = [Path(directory, f"rank{r}.json") for r in range(world)]
    assert all(path.exists() for path in results), "\n".join(printed)
    return [json.loads(path.read_text()) for path in results]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_sharded(failures: list[dict[str, str]], name: str) -> None:
    lost = "not run: the ranks lost each other in an earlier check"
    report = [f"rank {r}:\n{found.get(name, lost)}" for r, found in enumerate(failures)]
    assert not any(found.get(name, lost) for found in failures), "\n".join(report)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
