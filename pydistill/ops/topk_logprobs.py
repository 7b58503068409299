"""The K most likely tokens of each row of logits, with their log-probabilities under the full
softmax, the mass of all others, and the normaliser: what a teacher cache, a teacher server and a
support of the student's choice need.

    lse       = log sum exp(x / T)
    logprobs  = x / T - lse                      of the K tokens, falling
    tail      = log sum exp(x / T - lse)         over all others

docs/ops/topk_logprobs.md gives order, limits and numerics.

Shapes: logits [..., V], K from 1 to V; fp32, bf16 or fp16 (fp64 on the reference), arithmetic and
results fp32. Cost: one read of the logits; nothing of size V is written. With a head's `weight` the
logits come from hidden states, a block of rows at a time (pydistill/ops/_linear_head.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _linear_head as linear
from pydistill.ops import _rows
from pydistill.reference.linear_head import Head, head_logits
from pydistill.reference.topk_logprobs import topk_logprobs_fwd, topk_logprobs_reference

OP = _registry.operator("topk_logprobs", {torch.float32, torch.bfloat16, torch.float16})
_registry.kernel(
    OP,
    "topk_logprobs_fwd",
    "(Tensor logits, int k, float temperature, Tensor(a!) ids, Tensor(b!) logprobs,"
    " Tensor(c!) tail, Tensor(d!) lse) -> ()",
    topk_logprobs_fwd,
)


class TopkLogprobs(NamedTuple):
    """What `topk_logprobs` returns. fp32, or fp64 for fp64 logits, but for the ids."""

    ids: Tensor  # int64 [..., K]
    logprobs: Tensor  # [..., K]
    tail_logprob: Tensor  # [...]
    lse: Tensor  # [...]


def topk_logprobs(
    logits: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> TopkLogprobs:
    """The K most likely tokens of each row, and what a loss on them needs to know of the rest.

    `topk_divergence(student, t.logprobs, t.ids, tail_logprob=t.tail_logprob)` takes the result `t`
    as it is.

    Args:
        logits: `[..., V]`, any strides. fp32, bf16, fp16; fp64 on the reference. With `weight`, the
            hidden states `[..., H]` that they come from.
        k: K, from 1 to V.
        weight, bias, logit_scale, softcap: a head, as in `pydistill.linear_token_logprob`, whose
            logits are never in memory as a whole.
        temperature: T, between 1e-30 and 1e30.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        TopkLogprobs:
            ids: in order of falling logit, equal logits by rising id.
            logprobs: their log-probabilities under the softmax of all of logits / T.
            tail_logprob: log of the mass of all other tokens, summed over them (never 1 - P);
                -inf where there is none.
            lse: log sum exp(logits / T).

        A token of logit -inf is never chosen: where fewer than K are left, the last slots are empty
        (id -1, log-probability -inf). A row without a softmax (NaN or +inf in it, only -inf in it)
        has ids -1 and is NaN elsewhere.

        There is no gradient: results never require grad, whatever the logits do. To differentiate,
        gather from `logits.log_softmax(-1)` by the ids.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix.
        RuntimeError: the logits carry a forward-mode tangent, which would be lost; detach them
            outside the transform.
    """
    head = None
    if weight is not None:
        head = linear.check_head("", logits, weight, bias, logit_scale, softcap)
    elif bias is not None or logit_scale != 1.0 or softcap is not None:
        raise ValueError(
            "bias, logit_scale and softcap belong to a head; pass its weight, and hidden states in"
            " place of logits."
        )
    else:
        _rows.check_logits("logits", logits)
    shape, vocab = logits.shape[:-1], logits.shape[-1] if weight is None else weight.shape[0]
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k is a {type(k).__name__}; pass the number of tokens, 1 to V.")
    if not 1 <= k <= vocab:
        raise ValueError(f"k={k} is outside 1 to {vocab}, the tokens of a row; choose one inside.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is a {type(temperature).__name__}; pass a number.")
    _rows.check_range("temperature", temperature, 1e-30, 1e30)
    dtype = logits.dtype if head is None else linear.widest(head).dtype
    backend = _registry.resolve(OP.name, impl, logits.device.type, dtype)
    numbers = (k, float(temperature), backend)
    dual = forward_ad._current_level >= 0
    if torch.compiler.is_compiling() and dual:
        raise RuntimeError(_NO_TANGENT)
    if head is not None:
        if any(x is not None and _rows.has_tangent(x) for x in head[:3]):
            raise RuntimeError(_NO_TANGENT)
        with torch.no_grad():
            return _shaped(_forward_from_hidden(head, *numbers), shape)
    rows = _rows.flatten(logits)
    wrapped = not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(
        rows
    )
    if dual or wrapped:
        return _shaped(_TopkLogprobs.apply(rows, *numbers), shape)
    return _shaped(_forward(rows.detach(), *numbers), shape)


def _shaped(found: tuple[Tensor, Tensor, Tensor, Tensor], prefix: torch.Size) -> TopkLogprobs:
    return TopkLogprobs(*(x.reshape((*prefix, *x.shape[1:])) for x in found))


_NO_TANGENT = (
    "pydistill.topk_logprobs has no derivatives, and the logits' tangent would be lost; call it"
    " outside the forward-mode transform, and gather from log_softmax by the ids inside."
)


def _forward(
    logits: Tensor, k: int, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids and log-probabilities [R, K], tail and normaliser [R]."""
    if backend == "reference":
        return topk_logprobs_reference(logits, k, temperature)
    found = _empty(logits, k)
    _registry.overload("topk_logprobs_fwd", backend)(logits, k, temperature, *found)
    return found


def _empty(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the results of `rows [R, ...]`."""
    ids = torch.empty((rows.shape[0], k), dtype=torch.int64, device=rows.device)
    logprobs = torch.empty((rows.shape[0], k), dtype=torch.float32, device=rows.device)
    return ids, logprobs, logprobs.new_empty(rows.shape[0]), logprobs.new_empty(rows.shape[0])


def _forward_from_hidden(
    head: Head, k: int, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "reference":
        return topk_logprobs_reference(head_logits(head), k, temperature)
    found = _empty(head.hidden, k)
    kernel = _registry.overload("topk_logprobs_from_hidden", backend)
    kernel(*head, k, temperature, *found)
    return found


def _from_hidden_reference(*args: Any) -> None:
    topk_logprobs_fwd(head_logits(Head(*args[:5])), *args[5:])


class _Rows:
    """`topk_logprobs` as the driver of linear heads calls it."""

    def __init__(self, kernel: Any, numbers: tuple[int, float], outputs: tuple[Tensor, ...]):
        self.kernel, self.numbers, self.outputs = kernel, numbers, outputs

    def forward(self, logits: Tensor, rows: slice) -> None:
        self.kernel(logits, *self.numbers, *(x[rows] for x in self.outputs))


def _from_hidden_run(backend: str, *args: Any) -> None:
    head, numbers, outputs = Head(*args[:5]), args[5:7], args[7:]
    rows = _Rows(_registry.overload("topk_logprobs_fwd", backend), numbers, outputs)
    with linear.plain(head.hidden):
        linear.forward(linear.Tiles(head, head.weight.shape[0]), rows)


_registry.composed_kernel(
    OP,
    "topk_logprobs_from_hidden",
    "(Tensor hidden, Tensor weight, Tensor? bias, float scale, float softcap, int k, float"
    " temperature, Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) tail, Tensor(d!) lse) -> ()",
    _from_hidden_reference,
    _from_hidden_run,
    of="topk_logprobs_fwd",
)


class _TopkLogprobs(torch.autograd.Function):
    """`_forward` under transforms. Not differentiable: a gradient is none, a tangent an error."""

    @staticmethod
    def forward(
        logits: Tensor, k: int, temperature: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(logits, k, temperature, backend)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_TANGENT)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], logits: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        merged = _rows.lead(logits, in_dims[0], info.batch_size)
        found = _TopkLogprobs.apply(merged, *options)
        return tuple(x.reshape(info.batch_size, -1, *x.shape[1:]) for x in found), (0,) * 4
