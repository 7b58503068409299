"""Losses of hidden states and heads whose rows are sharded: the fused-linear operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pydistill
from vocab_parallel.ranks import (
    ROWS,
    VOCAB,
    Ranks,
    agree,
    check,
    close,
    supports,
    token_ids,
)

HIDDEN = 24


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
    hard = {"labels": token_ids(ranks), "label_weight": 0.2, "z_loss": 1e-3}
    for more in ({}, hard):

        def call(h: Heads, more: Any = more, **given: Any) -> Tensor:
            return pydistill.linear_topk_divergence(
                h.hidden, h.weight, log_p, ids, "jsd", tail=tail, student_bias=h.bias, mask=MASK,
                gradient=gradient, reduction="sum", **more, **given,
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
    # Beside an fp32 weight no gradient of the logits is rounded, so the sum alone is seen.
    given = given._replace(weight=given.weight.float())
    part = given.local(ranks.columns)
    call(part, group=ranks.group).backward()
    exact = Heads(*(x.float() for x in given)).local(slice(None))
    call(exact).backward()
    assert part.hidden.grad is not None and exact.hidden.grad is not None
    # Half a unit in the last place: partial sums rounded to bf16 on each rank would miss it.
    torch.testing.assert_close(
        part.hidden.grad.float(), exact.hidden.grad, rtol=1.01 * 2**-8, atol=1e-7
    )


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
