"""`token_logprob` of a language-model head's logits, from hidden states: [tokens, V] is never in
memory.

    logprob, entropy = token_logprob(hidden @ weight.T, ids)

with gradients of both for hidden states, weight and bias. The rows go through `token_logprob`'s
kernels; pydistill/ops/_linear_head.py says how the tiles are cut. docs/ops/linear_token_logprob.md
has the cost.

Shapes: hidden states [..., H], weight [V, H], ids [...]; fp32, bf16 or fp16, any mixture (fp64 on
the reference). Products and logits are fp32 sums of the operands as they are; gradients come back
in their tensors' dtypes, the weight's rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _linear_autograd as autograd
from pydistill.ops import _linear_head as linear
from pydistill.ops import _rows
from pydistill.ops import _vocab_parallel as parallel
from pydistill.ops._vocab_parallel_token_logprob import token_forward
from pydistill.ops.token_logprob import (
    TokenLogprob,
    backward_reference,
    row_ids,
    row_temperature,
)
from pydistill.reference.linear_head import Head
from pydistill.reference.linear_token_logprob import linear_token_logprob_reference
from pydistill.reference.token_logprob import SAVED, Inputs

OP = _registry.operator("linear_token_logprob", {torch.float32, torch.bfloat16, torch.float16})


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
) -> TokenLogprob:
    """Log-probability of each row's token under a head's distribution, and the row's entropy, both
    differentiable in hidden states, weight and bias.

    Args:
        hidden: `[..., H]`, the last hidden states. fp32, bf16, fp16; fp64 on the reference.
        weight: `[V, H]`, as `nn.Linear.weight`; one that does not require grad costs no work for
            its gradient. Sharded weights must be gathered, as for `linear_divergence`.
        bias: `[V]`.
        logit_scale: multiplies the logits.
        softcap: c > 0, logits become c tanh(logits / c).
        ids, temperature, mask, impl: as in `pydistill.token_logprob`. Rows whose mask is False are
            left out of the products.
        group: as in `pydistill.linear_divergence`.

    Returns:
        `TokenLogprob(logprob, entropy)`, in nats, of the prefix's shape; fp32, or fp64 for fp64
        tensors.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) a row whose id
            or temperature is out of range is NaN instead.
    """
    arguments = (hidden, ids, logit_scale, softcap, temperature, mask, impl)
    shard = parallel.find(group, 0, (weight, bias), arguments)
    head = linear.check_head("", hidden, weight, bias, logit_scale, softcap)
    like, shape = linear.widest(head), tuple(hidden.shape[:-1])
    parallel.check(shard, like)
    vocab = weight.shape[0] if shard is None else shard.total
    counted = _rows.row_mask(mask, shape, like.device)
    rows = row_ids(ids, shape, counted, vocab, like.device, "hidden", "weight")
    backend = _registry.resolve(OP.name, impl, like.device.type, like.dtype)
    t, params = row_temperature(temperature, shape, like)
    counted = None if counted is None else counted.contiguous()
    call = Call(head, rows, counted, params, t, backend, shard)
    logprob, entropy = _rows_of(call)
    return TokenLogprob(logprob.reshape(shape), entropy.reshape(shape))


class Call(NamedTuple):
    """A checked call."""

    head: Head
    ids: Tensor
    counted: Tensor | None
    params: Tensor | None
    temperature: float
    backend: str
    shard: parallel.Shard | None = None


_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? counted, Tensor ids, Tensor? params"
_NUMBERS = "float scale, float softcap, float temperature"


def _call(
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    backend: str,
    shard: parallel.Shard | None = None,
) -> Call:
    """The call that a kernel was given."""
    counted, ids, params = tensors[3:]
    head = Head(*tensors[:3], *numbers[:2])
    return Call(head, ids, counted, params, numbers[2], backend, shard)


def _reference_rows(head: Head, call: Call) -> tuple[Tensor, Tensor]:
    found = linear_token_logprob_reference(
        head, call.ids, call.counted, call.params, call.temperature
    )
    return found.logprob, found.entropy


def _forward_reference(*args: Any) -> None:
    call, (logprob, entropy, saved) = _call(args[:6], args[6:9], "reference"), args[9:]
    with torch.no_grad():
        found = _reference_rows(call.head, call)
    for out, value in zip((logprob, entropy), found, strict=True):
        out.copy_(value)
    saved.zero_()


def _backward_reference(*args: Any) -> None:
    upstreams, out = args[7:9], linear.wanted(*args[12:])
    call = _call(args[:6], args[9:12], "reference")
    call = call._replace(counted=(upstreams[0] != 0) | (upstreams[1] != 0))
    linear.reference_gradients(call.head, lambda h: _reference_rows(h, call), upstreams, out)


class _Rows:
    """`token_logprob` as the driver calls it, over the rows of `index`."""

    def __init__(self, call: Call, index: Tensor | None, **tensors: Tensor) -> None:
        self.temperature, self.backend, self.shard = call.temperature, call.backend, call.shard
        self.ids = linear.select(call.ids, index)
        self.params = linear.select_optional(call.params, index)
        self.tensors = tensors

    def forward(self, logits: Tensor, rows: slice) -> None:
        params = None if self.params is None else self.params[rows]
        if self.shard is not None:
            inputs = Inputs(logits, self.ids[rows], None, params)
            found = token_forward(self.shard, inputs, self.temperature)
            for name, value in zip(("logprob", "entropy", "saved"), found, strict=True):
                self.tensors[name][rows] = value
            return
        _registry.overload("token_logprob_fwd", self.backend)(
            logits, self.ids[rows], None, params, self.temperature,
            *(self.tensors[name][rows] for name in ("logprob", "entropy", "saved")),
        )  # fmt: skip

    def backward(self, logits: Tensor, rows: slice, columns: slice) -> None:
        params = None if self.params is None else self.params[rows]
        ids = self.ids[rows] - columns.start  # outside the tile, it is nobody's token
        ids = ids if self.shard is None else ids - self.shard.offset
        kernel = backward_reference
        if self.backend != "reference":
            kernel = _registry.overload("token_logprob_bwd", self.backend)
        kernel(
            logits, ids, params,
            *(self.tensors[name][rows] for name in ("saved", "grad_logprob", "grad_entropy")),
            self.temperature, logits,
        )  # fmt: skip


def _tiles(call: Call, index: Tensor | None) -> linear.Tiles:
    head = call.head._replace(hidden=linear.select(call.head.hidden, index))
    return linear.Tiles(head, head.weight.shape[0], call.shard and call.shard.widest)


def _forward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, outputs = _call(args[:6], args[6:9], backend, shard), args[9:]
    with linear.plain(outputs[0]):
        index = linear.rows_where(call.counted)
        part = linear.Selected(index, *outputs)
        logprob, entropy, saved = part.rows
        rows = _Rows(call, index, logprob=logprob, entropy=entropy, saved=saved)
        linear.forward(_tiles(call, index), rows)
        part.put()


def _backward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, out = _call(args[:6], args[9:12], backend, shard), linear.wanted(*args[12:])
    with linear.plain(args[6]):
        index = linear.rows_where((args[7] != 0) | (args[8] != 0))
        part = linear.Selected(index, out.hidden)
        names = ("saved", "grad_logprob", "grad_entropy")
        tensors = (linear.select(x, index) for x in args[6:9])
        rows = _Rows(call, index, **dict(zip(names, tensors, strict=True)))
        linear.backward(_tiles(call, index), rows, out._replace(hidden=part.rows[0]))
        part.put()


_registry.composed_kernel(
    OP,
    "linear_token_logprob_fwd",
    f"({_TENSORS}, {_NUMBERS}, Tensor(a!) logprob, Tensor(b!) entropy, Tensor(c!) saved) -> ()",
    _forward_reference,
    _forward_run,
    of="token_logprob_fwd",
)
_registry.composed_kernel(
    OP,
    "linear_token_logprob_bwd",
    f"({_TENSORS}, Tensor saved, Tensor grad_logprob, Tensor grad_entropy, {_NUMBERS}, Tensor(a!)"
    " grad_hidden, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()",
    _backward_reference,
    _backward_run,
    of="token_logprob_bwd",
)


def _rows_of(call: Call) -> tuple[Tensor, ...]:
    """Log-probability and entropy `[R]`, differentiable."""
    if call.backend == "reference" and call.shard is None:
        return _reference_rows(call.head, call)
    return autograd.rows(
        call.head, call.counted, (call.ids, call.params), (*call.head[3:], call.temperature),
        name=OP.name, outputs=2, saved=SAVED, backend=call.backend, shard=call.shard,
    )  # fmt: skip
