"""Divergence of a student's row of logits from a teacher known by its K most likely tokens.

Over a support S of K tokens the teacher gives log-probabilities under its full softmax, and a tail
mass p_t = 1 - sum p for the rest. With q = softmax(student / T) and q_t the student's mass outside
S, `tail` says what the rest of the vocabulary counts:

    bucket       the K + 1 cells (p_S, p_t) against (q_S, q_t)
    renormalize  p and q both conditioned on S
    truncate     the sum over S alone
    zero         p conditioned on S, against all of q

docs/ops/topk_divergence.md gives value and gradient of each, and their sources.

Shapes: student [..., V]; teacher [..., K] with K from 1 to V, ids in any order, -1 in empty slots.
fp32, bf16 or fp16 logits (fp64 on the reference); arithmetic and loss fp32; the gradient comes back
in the student's dtype. Cost: one read of the student's row forward, one read and one write
backward; the teacher's K numbers are small beside them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _memory, _rows
from pydistill.ops import _vocab_parallel as parallel
from pydistill.ops._hard_terms import hard_rows, hard_rows_jvp, refuse
from pydistill.ops._topk_divergence_call import OP, Call, duplicate_ids, prepare
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.ops._vocab_parallel_topk_divergence import (
    support_status,
    topk_backward,
    topk_forward,
)
from pydistill.reference.hard_terms import add_hard_terms
from pydistill.reference.topk_divergence import (
    ID_TWICE,
    SAVED,
    SOUND,
    STATUS,
    Inputs,
    Options,
    topk_divergence_reference,
)


def topk_divergence(
    student_logits: Tensor,
    topk_logprobs: Tensor | TopkTeacher,
    topk_ids: Tensor | None = None,
    kind: str = "forward_kl",
    *,
    tail: str | None = None,
    tail_logprob: Tensor | None = None,
    beta: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | None = None,
    scale_t2: bool = False,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    convention: str | None = None,
    overwrite_logits: bool = False,
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's distribution from a teacher known on K tokens a row,
    differentiable in the student's logits.

    Args:
        student_logits: `[..., V]`, any strides. fp32, bf16, fp16; fp64 on the reference.
        topk_logprobs: `[..., K]`, log-probabilities of the teacher under its full softmax, any
            floating-point dtype. Whoever chose the tokens (the teacher's top, the student's, both)
            has scored them by the teacher. Or a `TopkTeacher`, as a slice of a teacher cache is:
            it brings `topk_ids`, `tail_logprob` and `teacher_temperature`, which are then not
            passed, and its vocabulary must be the student's.
        topk_ids: int64 or int32 `[..., K]`, the tokens, in any order, each at most once a row; a
            negative id marks an empty slot, whose log-probability is not read.
        kind: "forward_kl", "reverse_kl", "jsd" or "tvd", as in `pydistill.divergence`.
        tail: what tokens outside the support count: "bucket", "renormalize", "truncate" or "zero";
            None is the convention's, or "bucket".
        tail_logprob: log of the teacher's mass outside the support, one a row, for "bucket". None
            computes it as log(1 - sum p) in fp64, and warns where that is below 1e-6 and therefore
            mostly rounding.
        beta: of `jsd`, in (0, 1), a scalar or one value a row; None is 0.5.
        temperature: T > 0 of the student, a scalar or one value a row.
        teacher_temperature: at which the log-probabilities were recorded; None is 1. "renormalize"
            and "zero" bring them to `temperature`; "bucket" and "truncate", whose tail mass would
            be unknown, raise unless the two are equal.
        scale_t2, weight, mask, reduction, denominator, group, impl: as in `pydistill.divergence`.
        labels, label_weight, ignore_index, z_loss: as in `pydistill.divergence`; a label_weight or
            z_loss that is not 0 reads the logits once more in each direction.
        convention: reproduces another project's value and gradient, see
            `pydistill.TOPK_CONVENTIONS`.
        overwrite_logits: as in `pydistill.divergence`; not with label_weight or z_loss.

    Returns:
        A scalar, or the prefix's shape for reduction="none"; fp32, or fp64 for fp64 logits. The
        truncated sum may be negative; every other value is >= 0. A cell to which the student
        (forward_kl) or the teacher (reverse_kl) gives nothing and the other something makes the
        loss +inf and the row's gradient NaN.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) the offending
            row's loss is NaN instead.
    """
    arguments = (
        topk_logprobs, topk_ids, kind, tail, tail_logprob, beta, temperature, teacher_temperature,
        scale_t2, weight, mask, labels, label_weight, ignore_index, z_loss, reduction, denominator,
        convention, impl,
    )  # fmt: skip
    shard = parallel.find(group, -1, (student_logits,), (*arguments, overwrite_logits))
    parallel.check(shard, student_logits, overwrite_logits)
    call = prepare(student_logits, *arguments, shard)
    if overwrite_logits:
        refuse(call.hard, "overwrite_logits=True", "overwrite_logits=False")
    if overwrite_logits and torch.is_grad_enabled() and student_logits.requires_grad:
        return _overwrite(call, student_logits)
    return call.reduce(_loss_rows(call))


def topk_divergence_jvp(
    student_logits: Tensor,
    student_tangent: Tensor,
    topk_logprobs: Tensor | TopkTeacher,
    topk_ids: Tensor | None = None,
    kind: str = "forward_kl",
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """`topk_divergence` and its directional derivative along `student_tangent [..., V]`: (loss,
    tangent of the loss).

    The explicit form of `torch.func.jvp`, and the one to use under `torch.compile`, which drops
    tangents of custom functions. Takes the arguments of `topk_divergence` except `overwrite_logits`
    and `group`. Not differentiable again.
    """
    if student_tangent.shape != student_logits.shape:
        raise ValueError(
            f"student_tangent has shape {tuple(student_tangent.shape)}, student_logits"
            f" {tuple(student_logits.shape)}; they must be equal."
        )
    arguments = {**_DEFAULTS, **arguments}
    call = prepare(student_logits.detach(), topk_logprobs, topk_ids, kind, **arguments)
    loss, tangent = _tangent_rows(call, _rows.flatten(student_tangent.detach()))
    return call.reduce(loss), call.reduce(tangent)


_DEFAULTS: dict[str, Any] = {
    name: p.default
    for name, p in inspect.signature(topk_divergence).parameters.items()
    if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("overwrite_logits", "group")
}

_TEACHER = "Tensor ids, Tensor log_p, Tensor? log_tail"
_OPTIONS = "int kind, int tail_mode, float temperature, float beta, bool scale_t2"


def _forward_out(*args: Any) -> None:
    inputs, options, (loss, saved) = Inputs(*args[:6]), Options(*args[6:11]), args[11:]
    with torch.no_grad():
        row_loss, status = topk_divergence_reference(inputs, options)
    loss.copy_(row_loss)
    if saved.numel():
        saved.zero_()
        saved[:, STATUS] = status


def _backward_out(*args: Any) -> None:
    student, ids, log_p, log_tail, params, _, grad_rows = args[:7]
    options, grad = Options(*args[7:12]), args[12]
    with _registry.autograd_inside_op():
        leaf = student.detach().requires_grad_()
        inputs = Inputs(leaf, ids, log_p, log_tail, grad_rows != 0, params)
        loss, _ = topk_divergence_reference(inputs, options)
        grad.copy_(torch.autograd.grad(loss, leaf, grad_rows.to(loss.dtype))[0])


def _overwrite_out(*args: Any) -> None:
    inputs, scale_rows, options = Inputs(*args[:6]), args[6], Options(*args[7:12])
    loss, saved = args[12:]
    _forward_out(*inputs, *options, loss, saved)
    grad = torch.empty_like(inputs.student)
    _backward_out(*inputs[:4], inputs.params, saved, scale_rows, *options, grad)
    inputs.student.copy_(grad)


_registry.kernel(
    OP,
    "topk_divergence_fwd",
    f"(Tensor student, {_TEACHER}, Tensor? counted, Tensor? params, {_OPTIONS}, Tensor(a!) loss,"
    " Tensor(b!) saved) -> ()",
    _forward_out,
)
_registry.kernel(
    OP,
    "topk_divergence_bwd",
    f"(Tensor student, {_TEACHER}, Tensor? params, Tensor saved, Tensor grad_rows, {_OPTIONS},"
    " Tensor(a!) grad) -> ()",
    _backward_out,
)
_registry.kernel(
    OP,
    "topk_divergence_overwrite",
    f"(Tensor(a!) student, {_TEACHER}, Tensor? counted, Tensor? params, Tensor scale_rows,"
    f" {_OPTIONS}, Tensor(b!) loss, Tensor(c!) saved) -> ()",
    _overwrite_out,
)


def _check_status(inputs: Inputs, status: Tensor) -> None:
    """Raises for an id that a row names twice, where reading that is free."""
    if _rows.values_readable(status) and bool((status == ID_TWICE).any()):
        raise duplicate_ids(torch.where(status[:, None] == ID_TWICE, inputs.ids, -1))


def _loss_rows(call: Call) -> Tensor:
    """Row losses `[R]`, differentiable in the student's logits."""
    loss, hard, inputs = _divergence_rows(call), call.hard, call.inputs
    if hard is None:
        return loss
    if call.backend == "reference" and call.shard is None:
        return add_hard_terms(loss, inputs.student, inputs.counted, hard)
    found = hard_rows(inputs.student, inputs.counted, hard, call.backend, call.shard)
    return (1 - hard.label_weight) * loss + found


def _divergence_rows(call: Call) -> Tensor:
    """`_loss_rows` without labels and z-loss."""
    inputs, options = call.inputs, call.options
    if call.shard is not None:
        op = _parallel_op(call, call.shard)
        status = support_status(inputs.ids, call.shard.total)
        if inputs.counted is not None:
            status = torch.where(inputs.counted, status, SOUND)
        _check_status(inputs, status)
        return parallel.rows(op, *inputs)[0]
    if call.backend == "reference":
        loss, status = topk_divergence_reference(inputs, options)
        _check_status(inputs, status)
        return loss
    function: type[torch.autograd.Function] = _TopkDivergenceJvp
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "torch.compile drops the tangents of custom functions; call"
                " pydistill.topk_divergence_jvp inside compiled code, or take the forward-mode"
                " derivative in eager mode."
            )
        function = _TopkDivergence
    out: tuple[Tensor, Tensor] = function.apply(*inputs, options, call.backend)
    loss, saved = out
    _check_status(inputs, saved[:, STATUS])
    return loss


def _parallel_op(call: Call, shard: parallel.Shard) -> parallel.Op:
    options, backend = call.options, call.backend

    def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
        return topk_forward(shard, Inputs(*tensors), options)

    def backward(*tensors: Any) -> Tensor:
        inputs, saved, grad_rows = Inputs(*tensors[:6]), *tensors[6:]
        inputs = inputs._replace(ids=shard.local(inputs.ids))
        if backend != "reference":
            return _gradient(*inputs, saved, grad_rows, options, backend)
        grad = torch.empty_like(inputs.student)
        if inputs.counted is not None:
            grad_rows = torch.where(inputs.counted, grad_rows, 0)
        topk_backward(inputs, options, saved, grad_rows, grad)
        return grad

    return parallel.Op(forward, backward)


def _forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    rows = inputs.student.shape[0]
    loss = torch.empty(rows, dtype=torch.float32, device=inputs.student.device)
    saved = loss.new_empty((rows, SAVED))
    _registry.overload("topk_divergence_fwd", backend)(*inputs, *options, loss, saved)
    return loss, saved


class _TopkDivergence(torch.autograd.Function):
    """(student, teacher, ...) -> (loss [R], saved [R, SAVED]). No `jvp`, so that Dynamo accepts
    it."""

    @staticmethod
    def forward(
        student: Tensor,
        ids: Tensor,
        log_p: Tensor,
        log_tail: Tensor | None,
        counted: Tensor | None,
        params: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward(Inputs(student, ids, log_p, log_tail, counted, params), options, backend)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*args[:6], output[1])
        ctx.options, ctx.backend = args[6:]
        ctx.set_materialize_grads(False)  # a zero tangent of the teacher would look like a real one

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_rows is None:
            return (None,) * 8
        return _gradient(*ctx.saved_tensors, grad_rows, ctx.options, ctx.backend), *[None] * 7

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        merged = _merge(info.batch_size, in_dims, args[:6])
        outputs = _TopkDivergenceJvp.apply(*merged, *args[6:])
        return tuple(o.reshape(info.batch_size, -1, *o.shape[1:]) for o in outputs), (0, 0)


class _TopkDivergenceJvp(_TopkDivergence):
    """The eager form: forward-mode derivatives through `jvp`."""

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _TopkDivergence.setup_context(ctx, args, output)
        ctx.save_for_forward(*args[:6], output[1])  # Dynamo would append these to saved_tensors

    @staticmethod
    def jvp(ctx: Any, student_tangent: Tensor | None, *tangents: Any) -> tuple[Tensor | None, None]:
        if student_tangent is None:
            return None, None
        *inputs, saved = ctx.saved_tensors
        tangent = _tangent(Inputs(*inputs), saved, student_tangent, ctx.options, ctx.backend)
        return tangent, None


def _gradient(*args: Any) -> Tensor:
    compiling = torch.compiler.is_compiling()
    function = _TopkDivergenceBackward if compiling else _TopkDivergenceBackwardJvp
    grad: Tensor = function.apply(*args)
    return grad


class _TopkDivergenceBackward(torch.autograd.Function):
    """(student, teacher, ..., saved, upstream [R]) -> gradient [R, V] in the student's dtype;
    raises if differentiated again."""

    @staticmethod
    def forward(
        student: Tensor,
        ids: Tensor,
        log_p: Tensor,
        log_tail: Tensor | None,
        counted: Tensor | None,
        params: Tensor | None,
        saved: Tensor,
        grad_rows: Tensor,
        options: Options,
        backend: str,
    ) -> Tensor:
        if counted is not None:
            grad_rows = torch.where(counted, grad_rows, 0)
        grad = _memory.empty_like(student)
        _registry.overload("topk_divergence_bwd", backend)(
            student, ids, log_p, log_tail, params, saved, grad_rows.contiguous(), *options, grad
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
        merged = _merge(batch, in_dims, args[:6])
        saved, grad_rows = (
            _rows.lead(x, d, batch) for x, d in zip(args[6:8], in_dims[6:8], strict=True)
        )
        grad = _gradient(*merged, saved, grad_rows, *args[8:])
        return grad.reshape(batch, -1, grad.shape[-1]), 0


class _TopkDivergenceBackwardJvp(_TopkDivergenceBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_SECOND)


_NO_SECOND = (
    "the kernels of pydistill.topk_divergence have first derivatives only; pass impl='reference'"
    " for second derivatives (create_graph=True, forward over reverse, hessians)."
)


def _merge(batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Inputs:
    """The inputs of `batch` vmapped calls as those of one call on batch * R rows."""
    student, ids, log_p = (
        _rows.lead(x, d, batch) for x, d in zip(args[:3], in_dims[:3], strict=True)
    )
    rest = (_rows.lead_optional(x, d, batch) for x, d in zip(args[3:], in_dims[3:6], strict=True))
    return Inputs(student, ids, log_p, *rest)


def _tangent(
    inputs: Inputs, saved: Tensor, student_tangent: Tensor, options: Options, backend: str
) -> Tensor:
    """The tangent of each row's loss: <gradient of the row, tangent of its logits>, in fp32."""
    inputs = inputs._replace(student=inputs.student.float())
    ones = torch.ones(inputs.student.shape[0], dtype=torch.float32, device=inputs.student.device)
    return (_gradient(*inputs, saved, ones, options, backend) * student_tangent.float()).sum(-1)


def _tangent_rows(call: Call, student_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Row losses and their tangents, by the explicit route that also compiles."""
    inputs, options = call.inputs, call.options
    if call.backend == "reference":
        with torch.enable_grad():
            leaf = inputs.student.detach().requires_grad_()
            loss = _loss_rows(call._replace(inputs=inputs._replace(student=leaf)))
            pulled = torch.ones_like(loss, requires_grad=True)
            (grad,) = torch.autograd.grad(loss, leaf, pulled, create_graph=True)
            (tangent,) = torch.autograd.grad(grad, pulled, student_tangent.to(grad.dtype))
        return loss.detach(), tangent
    loss = _loss_rows(call)
    _, saved = _forward(inputs, options, call.backend)
    tangent = _tangent(inputs, saved, student_tangent, options, call.backend)
    if call.hard is not None:
        arguments = (inputs.counted, call.hard, call.backend)
        found = hard_rows_jvp(inputs.student, student_tangent, *arguments)
        tangent = (1 - call.hard.label_weight) * tangent + found
    return loss, tangent


class _TopkDivergenceOverwrite(torch.autograd.Function):
    """(student, teacher, ..., scale [R]) -> sum of scale * row loss, with the gradient of that sum
    written over `student`. One `forward` with ctx: functorch's transforms cannot use it, and
    raise."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, (scale_rows, options, backend) = Inputs(*args[:6]), args[6:]
        loss = torch.empty_like(scale_rows)
        saved = loss.new_empty((loss.shape[0], SAVED))
        if backend == "reference":
            _overwrite_out(*inputs, scale_rows, *options, loss, saved)
        else:
            kernel = _registry.overload("topk_divergence_overwrite", backend)
            kernel(*inputs, scale_rows, *options, loss, saved)
            torch.autograd.graph.increment_version(inputs.student)
        _check_status(inputs, saved[:, STATUS])
        ctx.save_for_backward(inputs.student)
        ctx.used = False
        return torch.where(scale_rows == 0, 0, scale_rows * loss).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _rows.spend_overwritten(ctx)
        (student,) = ctx.saved_tensors
        grad = student.detach()
        if not _rows.values_readable(upstream) or upstream.item() != 1.0:
            grad.mul_(upstream)
        return grad, *[None] * 8


def _overwrite(call: Call, student_logits: Tensor) -> Tensor:
    inputs = call.inputs
    _rows.check_overwrite(call.reduction, call.weight, student_logits, inputs.student)
    scale = _rows.row_scale(
        inputs.student, call.weight, inputs.counted, call.reduction, call.denominator
    )
    loss: Tensor = _TopkDivergenceOverwrite.apply(*inputs, scale, call.options, call.backend)
    return loss
