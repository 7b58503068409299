"""What the processes exchange, and that all of them refuse what one of them must."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

import pydistill
from pydistill.ops import _linear_head as linear
from pydistill.ops import _vocab_parallel as parallel
from vocab_parallel.heads import heads
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
