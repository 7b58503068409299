"""Log-probability of one given token of each row of logits, and the row's entropy in nats.

With k = 1 / T, m the row's maximum, Z = sum exp(k (z - m)) and q = exp(k (z - m)) / Z:

    logprob = k (z_id - m) - log Z
    entropy = log Z + sum q k (m - z)

    d logprob / d z_j =  k (1[j = id] - q_j)
    d entropy / d z_j = -k q_j (log q_j + entropy)

Both sums have terms of one sign, so nothing cancels: a row that is all but certain keeps the digits
of its entropy and of a log-probability near 0. docs/ops/token_logprob.md has the rest.

Shapes: logits [..., V], ids [...]. fp32, bf16 or fp16 logits (fp64 on the reference); arithmetic
and both outputs fp32; the gradient comes back in the logits' dtype. Cost: one read of the row
forward, one read and one write backward.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _memory, _rows
from pydistill.ops import _vocab_parallel as parallel
from pydistill.ops._vocab_parallel_token_logprob import token_forward
from pydistill.reference.token_logprob import (
    DEPTH,
    ID_OUT_OF_RANGE,
    LOG_Z,
    LOGPROB,
    MAX,
    SAVED,
    SOUND,
    STATUS,
    Inputs,
    token_logprob_reference,
)

OP = _registry.operator("token_logprob", {torch.float32, torch.bfloat16, torch.float16})


class TokenLogprob(NamedTuple):
    """One of each for a row: log-probability of its token, and entropy of its distribution."""

    logprob: Tensor
    entropy: Tensor


def token_logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    group: Any = None,
    impl: str = "auto",
) -> TokenLogprob:
    """Log-probability of each row's token under softmax(logits / temperature), and the row's
    entropy, both differentiable in the logits.

    Args:
        logits: `[..., V]`, any strides. fp32, bf16, fp16; fp64 on the reference.
        ids: int64 or int32 `[...]`, the token of each row, 0 to V - 1.
        temperature: T > 0, a scalar or one value a row.
        mask: bool `[...]`; rows that are False are never read and give 0 and no gradient, whatever
            their id.
        group: as in `pydistill.divergence`; the logits are sharded.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        `TokenLogprob(logprob, entropy)`, in nats, of the prefix's shape; fp32, or fp64 for fp64
        logits. A logit of -inf has probability 0 and adds nothing to the entropy; as the token it
        has a logprob of -inf, whose gradient is the formula's, k (1[j = id] - q_j). A row with NaN
        or +inf in it, or with only -inf, is NaN.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) a row whose id
            or temperature is out of range is NaN instead.
    """
    shard = parallel.find(group, -1, (logits,), (ids, temperature, mask, impl))
    parallel.check(shard, logits)
    call = _prepare(logits, ids, temperature, mask, impl, shard)
    return call.shaped(*_rows_of(call))


def token_logprob_jvp(
    logits: Tensor, tangent: Tensor, ids: Tensor, **arguments: Any
) -> tuple[TokenLogprob, TokenLogprob]:
    """`token_logprob` and its directional derivatives along `tangent [..., V]`.

    The explicit form of `torch.func.jvp`, and the one to use under `torch.compile`, which drops
    tangents of custom functions. Takes the arguments of `token_logprob` except `group`. Not
    differentiable again.
    """
    if tangent.shape != logits.shape:
        raise ValueError(
            f"tangent has shape {tuple(tangent.shape)}, logits {tuple(logits.shape)}; they must be"
            " equal."
        )
    call = _prepare(logits.detach(), ids, **{**_DEFAULTS, **arguments})
    values, tangents = _tangent_rows(call, _rows.flatten(tangent.detach()))
    return call.shaped(*values), call.shaped(*tangents)


_DEFAULTS: dict[str, Any] = {
    name: p.default
    for name, p in inspect.signature(token_logprob).parameters.items()
    if p.kind is inspect.Parameter.KEYWORD_ONLY and name != "group"
}


class _Call(NamedTuple):
    """A checked call."""

    inputs: Inputs
    temperature: float
    backend: str
    shape: tuple[int, ...]
    shard: parallel.Shard | None

    def shaped(self, logprob: Tensor, entropy: Tensor) -> TokenLogprob:
        return TokenLogprob(logprob.reshape(self.shape), entropy.reshape(self.shape))


def _prepare(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    impl: str,
    shard: parallel.Shard | None = None,
) -> _Call:
    """Checks every argument and brings the call into the form that kernels take."""
    _rows.check_logits("logits", logits)
    device, shape = logits.device, tuple(logits.shape[:-1])
    mask = _rows.row_mask(mask, shape, device)
    vocab = logits.shape[-1] if shard is None else shard.total
    rows = row_ids(ids, shape, mask, vocab, device, "logits", "logits")
    backend = _registry.resolve(OP.name, impl, device.type, logits.dtype)
    t, params = row_temperature(temperature, shape, logits)
    counted = None if mask is None else mask.contiguous()
    return _Call(Inputs(_rows.flatten(logits), rows, counted, params), t, backend, shape, shard)


def row_temperature(
    temperature: float | Tensor, shape: tuple[int, ...], like: Tensor
) -> tuple[float, Tensor | None]:
    """The scalar, or 1 and one value a row `[R]`; `like` has the call's device and dtype."""
    t = _rows.row_scalar("temperature", temperature)
    _rows.check_range("temperature", t, 0.0, math.inf, fix="pass a positive, finite temperature.")
    if not isinstance(t, Tensor):
        return t, None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = _rows.row_values("temperature", t.detach(), shape, like.device)
    return 1.0, rows.to(dtype).contiguous()


def row_ids(
    ids: Tensor,
    shape: tuple[int, ...],
    counted: Tensor | None,
    vocab: int,
    device: torch.device,
    rows_of: str,
    vocab_of: str,
) -> Tensor:
    """Checked ids `[R]`; the last two are the names of the arguments that have the prefix and the
    tokens."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids is {got}; pass int64 or int32 token ids (ids.long()).")
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, {rows_of} the prefix {shape}; pass one token a row."
        )
    _rows.check_device("ids", ids, device)
    ids = ids.reshape(-1).long().contiguous()
    if _rows.values_readable(ids) and (counted is None or _rows.values_readable(counted)):
        wrong = (ids < 0) | (ids >= vocab)
        wrong = wrong if counted is None else wrong & counted
        if bool(wrong.any()):
            raise ValueError(
                f"ids holds {int(ids[wrong][0])}, outside the {vocab} tokens of {vocab_of}; use 0"
                f" to {vocab - 1}, and mask=ids != {int(ids[wrong][0])} for rows without a token."
            )
    return ids


def _forward_out(*args: Any) -> None:
    inputs, temperature, (logprob, entropy, saved) = Inputs(*args[:4]), args[4], args[5:]
    wrong = (inputs.ids < 0) | (inputs.ids >= inputs.logits.shape[1])
    wrong = wrong if inputs.counted is None else wrong & inputs.counted
    # A flagged row's statistics are sound all the same: they do not hang on its token.
    inputs = inputs._replace(ids=torch.where(wrong, 0, inputs.ids))
    with torch.no_grad():
        rows = token_logprob_reference(inputs, temperature)
    logprob.copy_(torch.where(wrong, math.nan, rows.logprob))
    entropy.copy_(torch.where(wrong, math.nan, rows.entropy))
    saved[:, MAX], saved[:, LOG_Z], saved[:, DEPTH] = rows.maximum, rows.log_z, rows.depth
    saved[:, LOGPROB] = logprob
    saved[:, STATUS] = torch.where(wrong, ID_OUT_OF_RANGE, SOUND)


def backward_reference(*args: Any) -> None:
    """Of whole rows, or of some of their columns."""
    logits, ids, params, saved, grad_logprob, grad_entropy, temperature, grad = args
    dtype = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[1]
    t = temperature if params is None else params[:, None].to(dtype)
    up_logprob, up_entropy = grad_logprob[:, None].to(dtype), grad_entropy[:, None].to(dtype)
    saved = saved.to(dtype)
    maximum, log_z, depth, logprob, status = saved[:, :, None].unbind(1)
    d = (logits.to(dtype) - maximum) / t
    q = (d - log_z).exp()
    soft = q * torch.where(q == 0, 0, d + depth)  # of a logit of -inf: 0
    here = torch.arange(vocab, device=logits.device) == ids[:, None]
    hard = torch.where(here, -torch.expm1(logprob), -q)
    value = (up_logprob * hard - up_entropy * soft) / t
    value = torch.where(status != SOUND, math.nan, value)
    grad.copy_(torch.where((up_logprob == 0) & (up_entropy == 0), 0, value))


_registry.kernel(
    OP,
    "token_logprob_fwd",
    "(Tensor logits, Tensor ids, Tensor? counted, Tensor? params, float temperature,"
    " Tensor(a!) logprob, Tensor(b!) entropy, Tensor(c!) saved) -> ()",
    _forward_out,
)
_registry.kernel(
    OP,
    "token_logprob_bwd",
    "(Tensor logits, Tensor ids, Tensor? params, Tensor saved, Tensor grad_logprob,"
    " Tensor grad_entropy, float temperature, Tensor(a!) grad) -> ()",
    backward_reference,
)


def _rows_of(call: _Call) -> tuple[Tensor, Tensor]:
    """logprob and entropy `[R]`, differentiable in the logits."""
    if call.shard is not None:
        logprob, entropy = parallel.rows(_parallel_op(call, call.shard), *call.inputs)
        return logprob, entropy
    if call.backend == "reference":
        rows = token_logprob_reference(call.inputs, call.temperature)
        return rows.logprob, rows.entropy
    function: type[torch.autograd.Function] = _TokenLogprobJvp
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "torch.compile drops the tangents of custom functions; call"
                " pydistill.token_logprob_jvp inside compiled code, or take the forward-mode"
                " derivative in eager mode."
            )
        function = _TokenLogprob
    out: tuple[Tensor, Tensor, Tensor] = function.apply(
        *call.inputs, call.temperature, call.backend
    )
    return out[0], out[1]


def _parallel_op(call: _Call, shard: parallel.Shard) -> parallel.Op:
    def forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        return token_forward(shard, Inputs(*tensors), call.temperature)

    def backward(logits: Tensor, ids: Tensor, counted: Tensor | None, *rest: Any) -> Tensor:
        ids = ids - shard.offset  # outside the shard, it is nobody's token
        if call.backend != "reference":
            return _gradient(logits, ids, counted, *rest, call.temperature, call.backend)
        params, saved, *ups = rest
        if counted is not None:
            ups = [torch.where(counted, up, 0) for up in ups]
        grad = torch.empty_like(logits)
        backward_reference(logits, ids, params, saved, *ups, call.temperature, grad)
        return grad

    return parallel.Op(forward, backward)


def _forward(inputs: Inputs, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = inputs.logits.shape[0], inputs.logits.device
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    entropy, saved = torch.empty_like(logprob), logprob.new_empty((rows, SAVED))
    kernel = _registry.overload("token_logprob_fwd", backend)
    kernel(*inputs, temperature, logprob, entropy, saved)
    return logprob, entropy, saved


class _TokenLogprob(torch.autograd.Function):
    """(logits, ids, ...) -> (logprob [R], entropy [R], saved [R, SAVED]). No `jvp`, so that Dynamo
    accepts it."""

    @staticmethod
    def forward(
        logits: Tensor,
        ids: Tensor,
        counted: Tensor | None,
        params: Tensor | None,
        temperature: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(Inputs(logits, ids, counted, params), temperature, backend)

    @staticmethod
    def setup_context(
        ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*args[:4], output[2])
        ctx.temperature, ctx.backend = args[4:]
        ctx.set_materialize_grads(False)  # a zero tangent of the ids would look like a real one

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 6
        *inputs, saved = ctx.saved_tensors
        ups = (_or_zeros(grad_logprob, saved), _or_zeros(grad_entropy, saved))
        return _gradient(*inputs, saved, *ups, ctx.temperature, ctx.backend), *[None] * 5

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        merged = _merge(info.batch_size, in_dims, args[:4])
        outputs = _TokenLogprobJvp.apply(*merged, *args[4:])
        return tuple(o.reshape(info.batch_size, -1, *o.shape[1:]) for o in outputs), (0, 0, 0)


def _or_zeros(x: Tensor | None, saved: Tensor) -> Tensor:
    return torch.zeros_like(saved[:, LOGPROB]) if x is None else x


class _TokenLogprobJvp(_TokenLogprob):
    """The eager form: forward-mode derivatives through `jvp`."""

    @staticmethod
    def setup_context(
        ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _TokenLogprob.setup_context(ctx, args, output)
        ctx.save_for_forward(*args[:4], output[2])  # Dynamo would append these to saved_tensors

    @staticmethod
    def jvp(
        ctx: Any, tangent: Tensor | None, *tangents: Any
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if tangent is None:
            return None, None, None
        *inputs, saved = ctx.saved_tensors
        return *_tangents(Inputs(*inputs), saved, tangent, ctx.temperature, ctx.backend), None


def _gradient(*args: Any) -> Tensor:
    compiling = torch.compiler.is_compiling()
    function = _TokenLogprobBackward if compiling else _TokenLogprobBackwardJvp
    grad: Tensor = function.apply(*args)
    return grad


class _TokenLogprobBackward(torch.autograd.Function):
    """(logits, ids, ..., saved, both upstreams [R]) -> gradient [R, V] in the logits' dtype; raises
    if differentiated again."""

    @staticmethod
    def forward(
        logits: Tensor,
        ids: Tensor,
        counted: Tensor | None,
        params: Tensor | None,
        saved: Tensor,
        grad_logprob: Tensor,
        grad_entropy: Tensor,
        temperature: float,
        backend: str,
    ) -> Tensor:
        ups = [grad_logprob, grad_entropy]
        if counted is not None:
            ups = [torch.where(counted, x, 0) for x in ups]
        grad = _memory.empty_like(logits)
        _registry.overload("token_logprob_bwd", backend)(
            logits, ids, params, saved, *(x.contiguous() for x in ups), temperature, grad
        )
        return grad

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_NO_SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        batch = info.batch_size
        merged = _merge(batch, in_dims, args[:4])
        rest = (_rows.lead(x, d, batch) for x, d in zip(args[4:7], in_dims[4:7], strict=True))
        grad = _gradient(*merged, *rest, *args[7:])
        return grad.reshape(batch, -1, grad.shape[-1]), 0


class _TokenLogprobBackwardJvp(_TokenLogprobBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_SECOND)


_NO_SECOND = (
    "the kernels of pydistill.token_logprob have first derivatives only; pass impl='reference'"
    " for second derivatives (create_graph=True, forward over reverse, hessians)."
)


def _merge(batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Inputs:
    """The inputs of `batch` vmapped calls as those of one call on batch * R rows."""
    logits, ids = (_rows.lead(x, d, batch) for x, d in zip(args[:2], in_dims[:2], strict=True))
    rest = (_rows.lead_optional(x, d, batch) for x, d in zip(args[2:], in_dims[2:4], strict=True))
    return Inputs(logits, ids, *rest)


def _tangents(
    inputs: Inputs, saved: Tensor, tangent: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The tangents of logprob and entropy: <gradient of each, tangent of the logits>, in fp32."""
    inputs = inputs._replace(logits=inputs.logits.float())
    one, zero = torch.ones_like(saved[:, LOGPROB]), torch.zeros_like(saved[:, LOGPROB])
    ups = ((one, zero), (zero, one))
    slopes = (_gradient(*inputs, saved, *up, temperature, backend) for up in ups)
    along, again = ((slope * tangent.float()).sum(-1) for slope in slopes)
    return along, again


def _tangent_rows(
    call: _Call, tangent: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """logprob and entropy, and their tangents, by the explicit route that also compiles."""
    inputs, temperature, backend, *_ = call
    if backend == "reference":
        with torch.enable_grad():
            leaf = inputs.logits.detach().requires_grad_()
            values = _rows_of(call._replace(inputs=inputs._replace(logits=leaf)))
            pulled = [torch.ones_like(x, requires_grad=True) for x in values]
            tangents = []
            for value, pull in zip(values, pulled, strict=True):
                (grad,) = torch.autograd.grad(value, leaf, pull, create_graph=True)
                along = torch.autograd.grad(grad, pull, tangent.to(grad.dtype), retain_graph=True)
                tangents.append(along[0])
        return (values[0].detach(), values[1].detach()), (tangents[0], tangents[1])
    logprob, entropy, saved = _forward(inputs, temperature, backend)
    return (logprob, entropy), _tangents(inputs, saved, tangent, temperature, backend)
