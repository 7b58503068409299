"""A causal convolution of each channel along the tokens of its sequence, with an optional SiLU:
what stands before the linear-time mixers of Mamba-2, gated delta nets and KDA.

    pre[t, d] = bias[d] + sum_{j < W} weight[d, j] x[t - W + 1 + j, d]
    out       = pre,  or  pre sigmoid(pre)

where tokens before the sequence's first are those of its state, or 0. docs/ops/causal_conv1d.md has
the gradients.

Shapes: x [B, T, D], weight [D, W]; fp32, bf16 or fp16 (fp64 on the reference), any mixture of x and
weight. Sums are fp32; the result has the dtype of x, gradients those of their tensors. Cost: one
read and one write of x forward, two reads and one write backward; 2 W flops an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _memory, _rows
from pydistill.reference.causal_conv1d import (
    Inputs,
    causal_conv1d_reference,
    pre_activation,
    tokens_at,
)

OP = _registry.operator("causal_conv1d", {torch.float32, torch.bfloat16, torch.float16})
ACTIVATIONS = (None, "silu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tokens whose part of the weight's gradient is one fp32 sum: the kernels' unit of work, so that
# results do not depend on the number of threads. csrc/cpu/causal_conv1d.h has it too.
CHUNK = 256


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolves every channel with its own W taps over the last W tokens, differentiable in all
    tensors.

    Args:
        x: `[B, T, D]`, any strides. fp32, bf16, fp16; fp64 on the reference.
        weight: `[D, W]`, tap W - 1 being that of the token itself; an `nn.Conv1d`'s
            `weight.squeeze(1)`. Any of those dtypes, and so the bias.
        bias: `[D]`.
        activation: None, or "silu".
        initial_state: `[N, W - 1, D]` of x's dtype, the last tokens before each sequence; N is B,
            or the number of packed sequences. None is zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: int64 or int32 `[N + 1]`, 0 to T: sequences packed behind one another in the
            single row of x (B = 1), each of which begins anew. Empty ones are allowed.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        `(out, final_state)`: out `[B, T, D]` in x's dtype, and the last W - 1 tokens of every
        sequence `[N, W - 1, D]`, to be passed on as `initial_state`; None unless asked for. A text
        fed in pieces gives what it gives whole, token by token too. To go back to an earlier token,
        keep the tokens: a state is nothing else.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix.
    """
    inputs = _prepare(x, weight, bias, activation, initial_state, cu_seqlens)
    wide = any(t is not None and t.dtype == torch.float64 for t in (x, weight, bias))
    dtype = torch.float64 if wide else x.dtype
    backend = _registry.resolve(OP.name, impl, x.device.type, dtype)
    out = _convolve(inputs, activation is not None, backend).reshape(x.shape)
    return out, _final_state(x, inputs, cu_seqlens is not None) if output_final_state else None


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Inputs:
    """Checks every argument and brings the call into the form that kernels take."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", state)):
        if tensor is None and name in ("bias", "initial_state"):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} is {got}; pass an fp32, bf16, fp16 or fp64 tensor.")
        _rows.check_device(name, tensor, x.device)
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass [B, T, D] with D >= 1.")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or not weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and x {channels} channels; pass"
            f" ({channels}, W) with W >= 1 (an nn.Conv1d's weight.squeeze(1))."
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; pass ({channels},).")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; use None or 'silu'.")
    if cu_seqlens is None:
        starts = torch.arange(batch + 1, device=x.device) * length
    else:
        starts = _starts(cu_seqlens, x)
    if state is not None:
        want = (starts.shape[0] - 1, weight.shape[1] - 1, channels)
        if tuple(state.shape) != want:
            raise ValueError(
                f"initial_state has shape {tuple(state.shape)}; pass {want}, the last"
                f" {want[1]} tokens before each of {want[0]} sequences."
            )
        if state.dtype != x.dtype:
            raise TypeError(
                f"initial_state is {state.dtype} and x {x.dtype}; pass"
                f" initial_state.to({x.dtype}): it is tokens of x."
            )
        state = state.contiguous()
    bias = None if bias is None else bias.contiguous()
    return Inputs(_rows.flatten(x), weight.contiguous(), bias, state, starts)


def _starts(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int64, torch.int32):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens is {got}; pass an int64 or int32 tensor [N + 1].")
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; pass [N + 1], from 0.")
    if x.shape[0] != 1:
        raise ValueError(
            f"x has {x.shape[0]} rows beside cu_seqlens; pack the sequences behind one another in"
            " one row, x[None]."
        )
    _rows.check_device("cu_seqlens", cu_seqlens, x.device)
    if _rows.values_readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != x.shape[1] or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens is {ends if len(ends) < 9 else [*ends[:4], '...', ends[-1]]} for"
                f" {x.shape[1]} tokens; pass offsets that rise from 0 to {x.shape[1]}."
            )
    return cu_seqlens.long().contiguous()


def _final_state(x: Tensor, inputs: Inputs, packed: bool) -> Tensor:
    """The last W - 1 tokens of every sequence, in memory of their own."""
    before, length = inputs.weight.shape[1] - 1, x.shape[1]
    if packed:
        sequence = torch.arange(inputs.starts.shape[0] - 1, device=x.device)
        place = (inputs.starts[1:] - inputs.starts[:-1])[:, None]
        place = place + torch.arange(-before, 0, device=x.device)
        return tokens_at(inputs, sequence[:, None].expand_as(place), place)
    if length >= before:
        return x[:, length - before :].clone()
    earlier = x.new_zeros((x.shape[0], before, x.shape[2]))
    earlier = earlier if inputs.state is None else inputs.state
    return torch.cat([earlier[:, length:], x], 1)


def _forward_out(*args: Any) -> None:
    with torch.no_grad():
        args[-1].copy_(causal_conv1d_reference(Inputs(*args[:5]), args[5]))


def _backward_out(*args: Any) -> None:
    """The reference's: the whole gradient of the weight and bias is in the first part."""
    inputs, silu, grad_out = Inputs(*args[:5]), args[5], args[6]
    grad_x, grad_state, parts = args[7:]
    with _registry.autograd_inside_op():
        x, weight, bias, state = (
            None if t is None else t.detach().requires_grad_() for t in inputs[:4]
        )
        assert x is not None and weight is not None
        value = causal_conv1d_reference(Inputs(x, weight, bias, state, inputs.starts), silu)
        asked = [t for t in (x, weight, bias, state) if t is not None]
        up = grad_out.to(value.dtype)
        found = torch.autograd.grad(value, asked, up, allow_unused=True, materialize_grads=True)
    grads = iter(found)
    grad_x.copy_(next(grads))
    grad_weight = next(grads)
    if parts.numel():
        parts.zero_()
        parts[0, :-1] = grad_weight.T
    if inputs.bias is not None:
        grad_bias = next(grads)
        if parts.numel():
            parts[0, -1] = grad_bias
    if grad_state.numel():
        grad_state.copy_(next(grads))


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor starts, bool silu"
_registry.kernel(
    OP, "causal_conv1d_fwd", f"({_TENSORS}, Tensor(a!) out) -> ()", _forward_out
)  # fmt: skip
_registry.kernel(
    OP,
    "causal_conv1d_bwd",
    f"({_TENSORS}, Tensor grad_out, Tensor(a!) grad_x, Tensor(b!) grad_state, Tensor(c!) parts)"
    " -> ()",
    _backward_out,
)


def _convolve(inputs: Inputs, silu: bool, backend: str) -> Tensor:
    """`[M, D]` in x's dtype, differentiable."""
    if backend == "reference":
        return causal_conv1d_reference(inputs, silu).to(inputs.x.dtype)
    given = [t for t in inputs if t is not None]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not wanted and forward_ad._current_level < 0 and all(map(_rows.values_readable, given)):
        return _forward(inputs, silu, backend)  # for a token, a Function costs more than the rest
    function: type[torch.autograd.Function] = _ConvJvp
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "torch.compile drops the tangents of custom functions; pass impl='reference' inside"
                " compiled code, or take the forward-mode derivative in eager mode."
            )
        function = _Conv
    out: Tensor = function.apply(*inputs, silu, backend)
    return out


def _forward(inputs: Inputs, silu: bool, backend: str) -> Tensor:
    out = _memory.empty_like(inputs.x)
    _registry.overload("causal_conv1d_fwd", backend)(*inputs, silu, out)
    return out


class _Conv(torch.autograd.Function):
    """(x, weight, bias, state, starts, silu, backend) -> out [M, D]. No `jvp`, so that Dynamo
    accepts it."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        starts: Tensor,
        silu: bool,
        backend: str,
    ) -> Tensor:
        return _forward(Inputs(x, weight, bias, state, starts), silu, backend)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*args[:5])
        ctx.silu, ctx.backend = args[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[:4])
        compiling = torch.compiler.is_compiling()
        function = _ConvBackward if compiling else _ConvBackwardJvp
        grads = function.apply(grad, *ctx.saved_tensors, ctx.silu, ctx.backend, needed)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 3

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        folded = _fold(info.batch_size, in_dims[:5], args[:5])
        return _unfold(_ConvJvp.apply(*folded, *args[5:]), info.batch_size), 0


class _ConvJvp(_Conv):
    """The eager form: forward-mode derivatives through `jvp`."""

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
        _Conv.setup_context(ctx, args, output)
        ctx.save_for_forward(*args[:5])  # Dynamo would append these to saved_tensors

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """pre is linear in the state and x together, in the weight, and in the bias."""
        inputs = Inputs(*ctx.saved_tensors)
        x, weight, bias, state = tangents[:4]
        moved = inputs._replace(
            x=torch.zeros_like(inputs.x) if x is None else x, bias=bias, state=state
        )
        along = pre_activation(moved)
        if weight is not None:
            along = along + pre_activation(inputs._replace(weight=weight, bias=None))
        if ctx.silu:
            pre = pre_activation(inputs)
            gate = torch.sigmoid(pre)
            along = along * (gate * (1 + pre * (1 - gate)))
        return along.to(inputs.x.dtype)


class _ConvBackward(torch.autograd.Function):
    """(grad [M, D], x, ..., starts, silu, backend, needed) -> gradients of x, weight, bias and
    state, empty where not needed; raises if differentiated again."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        starts: Tensor,
        silu: bool,
        backend: str,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        channels, width = weight.shape
        grad_x = _memory.empty_like(x)
        grad_state = torch.zeros_like(state) if state is not None and needed[3] else x.new_empty(0)
        sums = needed[1] or needed[2]
        chunks = -(-x.shape[0] // CHUNK) if sums else 0
        parts = torch.zeros((chunks, width + 1, channels), dtype=torch.float32, device=x.device)
        kernel = _registry.overload("causal_conv1d_bwd", backend)
        kernel(
            x, weight, bias, state, starts, silu, _rows.flatten(grad), grad_x, grad_state, parts
        )  # fmt: skip
        total = parts.sum(0)
        grad_weight = total[:-1].T.to(weight.dtype).contiguous()
        grad_bias = weight.new_empty(0) if bias is None else total[-1].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_state

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_NO_SECOND)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batch = info.batch_size
        folded = _fold(batch, in_dims[1:6], args[1:6])
        grad = _fold_channels(_batched(args[0], in_dims[0], batch))
        x, weight, bias, state = _ConvBackwardJvp.apply(grad, *folded, *args[6:])
        return (
            _unfold(x, batch), weight.view(batch, -1, weight.shape[1]),
            bias.view(batch, -1), _unfold(state, batch) if state.numel() else state.view(batch, 0)
        ), (0, 0, 0, 0)  # fmt: skip


class _ConvBackwardJvp(_ConvBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_SECOND)


_NO_SECOND = (
    "the kernels of pydistill.causal_conv1d have first derivatives only; pass impl='reference' for"
    " second derivatives (create_graph=True, forward over reverse, hessians)."
)


def _fold(batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Inputs:
    """The inputs of `batch` vmapped calls as those of one call on batch * D channels."""
    if in_dims[4] is not None:
        raise ValueError(
            "cu_seqlens is mapped by vmap, but sequences of different calls have the same lengths;"
            " map the other arguments alone."
        )
    x, weight, bias, state = (
        None if t is None else _batched(t, d, batch)
        for t, d in zip(args[:4], in_dims[:4], strict=True)
    )
    assert x is not None and weight is not None
    return Inputs(
        _fold_channels(x), weight.flatten(0, 1), None if bias is None else bias.flatten(),
        None if state is None else _fold_channels(state), args[4],
    )  # fmt: skip


def _batched(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """`x` with its mapped dimension, or a new one, in front."""
    return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold_channels(x: Tensor) -> Tensor:
    """`[batch, ..., D]` -> `[..., batch * D]`."""
    return x.movedim(0, -2).flatten(-2)


def _unfold(x: Tensor, batch: int) -> Tensor:
    out: Tensor = x.unflatten(-1, (batch, -1)).movedim(-2, 0)
    return out
