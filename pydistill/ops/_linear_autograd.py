"""Autograd of the fused-linear operators, whose kernels have one form:

    <name>_fwd(hidden, weight, bias, counted, *tensors, *numbers, *row outputs, saved)
    <name>_bwd(hidden, weight, bias, counted, *tensors, saved, *upstreams, *numbers, 3 gradients)
    <name>_gradients(hidden, weight, bias, counted, *tensors, scale, *numbers, loss, 3 gradients)

The second serves `gradient="recompute"`, with any upstream and any number of times; the third
`gradient="in_forward"`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.ops._linear_head import new_gradients
from pydistill.ops._vocab_parallel import Shard
from pydistill.reference.linear_head import Head

GRADIENTS = ("recompute", "in_forward")


class Rows(NamedTuple):
    """What a call is besides its tensors."""

    name: str  # of the operator
    tensors: int  # how many it takes after `counted`
    outputs: int  # values a row, 1 or 2
    saved: int  # statistics a row
    numbers: tuple[Any, ...]
    backend: str
    shard: Shard | None


def _kernel(name: str, backend: str, shard: Shard | None) -> Callable[..., None]:
    """Kernel `name`; where this process has a shard of the vocabulary, one of those columns."""
    if shard is None:
        return _registry.overload(name, backend)
    return partial(_registry.composed_run(name), backend, shard=shard)


def _whole(grads: tuple[Tensor, ...], like: Tensor, shard: Shard | None) -> tuple[Tensor, ...]:
    """`grads` with that of the hidden states, which every token adds to, summed over the shards."""
    hidden, *rest = grads
    if shard is not None and hidden.numel():
        hidden = shard.sum_(hidden)
    return hidden.to(like.dtype), *rest


def rows(
    head: Head,
    counted: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    *,
    name: str,
    outputs: int,
    saved: int,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """The row outputs `[R]` of operator `name`, differentiable in the head's tensors."""
    function: type[torch.autograd.Function] = _LinearRowsEager
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(_NO_FORWARD_MODE.format(name))
        function = _LinearRows
    what = Rows(name, len(tensors), outputs, saved, numbers, backend, shard)
    padded = [*tensors, *[None] * (5 - len(tensors))]
    out: tuple[Tensor, ...] = function.apply(*head[:3], counted, *padded, what)
    return out[:outputs]


class _LinearRows(torch.autograd.Function):
    """-> (first output [R], second output [R] or empty, saved [R, saved])."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counted: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
        what: Rows,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Named one by one: where nothing requires grad, Dynamo would hand a ctx to `*args`.
        n = hidden.shape[0]
        first = torch.empty(n, dtype=torch.float32, device=hidden.device)
        second, saved = first.new_empty(n * (what.outputs - 1)), first.new_empty((n, what.saved))
        tensors = (a, b, c, d, e)[: what.tensors]
        _kernel(f"{what.name}_fwd", what.backend, what.shard)(
            hidden, weight, bias, counted, *tensors, *what.numbers,
            *(first, second)[: what.outputs], saved,
        )  # fmt: skip
        return first, second, saved

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, second, saved = output
        ctx.mark_non_differentiable(*([] if args[-1].outputs == 2 else [second]), saved)
        ctx.save_for_backward(*args[:9], saved)
        ctx.what = args[-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, first: Tensor | None, second: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if first is None and second is None:
            return (None,) * 10
        needed = tuple(ctx.needs_input_grad[:3])
        grads = _LinearRowsBackward.apply(*ctx.saved_tensors, first, second, needed, ctx.what)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 7


class _LinearRowsEager(_LinearRows):
    """The eager form: names the way out of forward mode. Dynamo takes no function with a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_FORWARD_MODE.format(ctx.what.name))


_NO_FORWARD_MODE = "the kernels of pydistill.{} have no forward mode; pass impl='reference'."


class _LinearRowsBackward(torch.autograd.Function):
    """(..., saved, upstreams [R]) -> gradients of hidden states, weight and bias; raises if
    differentiated again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counted: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
        saved: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        needed: tuple[bool, ...],
        what: Rows,
    ) -> tuple[Tensor, ...]:
        upstreams = []
        for upstream in (first, second)[: what.outputs]:
            if upstream is None:
                upstream = saved.new_zeros(saved.shape[0])
            elif counted is not None:
                upstream = torch.where(counted, upstream, 0)
            upstreams.append(upstream.contiguous())
        grads = new_gradients(Head(hidden, weight, bias), needed, what.shard is not None)
        tensors = (a, b, c, d, e)[: what.tensors]
        _kernel(f"{what.name}_bwd", what.backend, what.shard)(
            hidden, weight, bias, counted, *tensors, saved, *upstreams, *what.numbers, *grads
        )
        return _whole(grads, hidden, what.shard)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = args[-1].name

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"the kernels of pydistill.{ctx.name} have first derivatives only; pass"
            " impl='reference' for second derivatives (create_graph=True, hessians)."
        )


def in_forward(
    gradient: str, head: Head, reduction: str, weight: Tensor | None, backend: str
) -> bool:
    """Whether a call computes its gradients with its loss; the reference leaves them to
    autograd."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is not known; use one of {', '.join(GRADIENTS)}.")
    if gradient == "recompute":
        return False
    if reduction == "none":
        raise ValueError("gradient='in_forward' needs reduction='mean' or 'sum', not 'none'.")
    if weight is not None and weight.requires_grad:
        raise ValueError("gradient='in_forward' gives no gradient to weight; pass weight.detach().")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "gradient='in_forward' is for eager mode; under torch.compile pass"
            " gradient='recompute'."
        )
    asked = any(x is not None and x.requires_grad for x in head[:3])
    return torch.is_grad_enabled() and asked and backend != "reference"


def loss_with_gradients(
    head: Head,
    counted: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    scale: Tensor,
    *,
    name: str,
    backend: str,
    shard: Shard | None = None,
) -> Tensor:
    """The sum of scale * row loss of operator `name`, whose gradients are computed with it."""
    kernel = _kernel(f"{name}_gradients", backend, shard)
    loss: Tensor = _GradientInForward.apply(
        *head[:3], kernel, (counted, *tensors, scale, *numbers), scale, shard
    )
    return loss


class _GradientInForward(torch.autograd.Function):
    """(hidden, weight, bias, kernel, its other arguments, scale [R], shard) -> sum of scale * row
    loss, with the gradients of that sum computed beside it. One `forward` with ctx: functorch's
    transforms cannot use it, and raise."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel: Callable[..., None],
        arguments: tuple[Any, ...],
        scale: Tensor,
        shard: Shard | None,
    ) -> Tensor:
        loss = torch.empty_like(scale)
        head = Head(hidden, weight, bias)
        needed = tuple(ctx.needs_input_grad[:3])
        grads = new_gradients(head, needed, shard is not None)
        kernel(*head[:3], *arguments, loss, *grads)
        grads = _whole(grads, hidden, shard)
        ctx.grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
        return torch.where(scale == 0, 0, scale * loss).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradient='in_forward' has no second derivatives; pass gradient='recompute'."
            )
        if ctx.grads is None:
            raise RuntimeError(
                "gradient='in_forward' keeps its gradients for one backward, which has used them;"
                " pass gradient='recompute' to run backward again."
            )
        grads, ctx.grads = ctx.grads, None  # handed over: torch keeps them without a copy
        if not _rows.values_readable(upstream) or upstream.item() != 1.0:
            for g in grads:
                if g is not None:
                    g.mul_(upstream)
        return *grads, *[None] * 4
