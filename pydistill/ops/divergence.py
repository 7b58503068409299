"""Divergence between a teacher's and a student's next-token distributions, from logits.

For a row of V logits, with p = softmax(teacher / T), q = softmax(student / T),

    loss = (1 - label_weight) * t2 * D(p, q) + label_weight * CE(student, label) + z_loss *
    logsumexp(student)^2

where t2 is T^2 or 1, and CE and the z-loss are at temperature 1. With h = dD/dq, the gradient of D
with respect to the student's logits is q * (h - sum(q h)) / T. `pydistill.KINDS` lists D;
docs/ops/divergence.md gives each D and h and its source.

Shapes: logits [..., V], one loss a row. Inputs fp32, bf16 or fp16 (fp64 on the reference), the two
sides may differ; arithmetic, statistics and loss are fp32 (fp64 for fp64); the gradient comes back
in the student's dtype. Cost: forward reads each row once (twice from memory on a GPU where D needs
the normalisers first); backward recomputes p and q from the normalisers it saved, so extra memory
is O(rows) and any upstream gradient, a repeated backward and `retain_graph` are right.
`overwrite_logits=True` trades that for no gradient memory at all.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _memory, _rows
from pydistill.ops import _vocab_parallel as parallel
from pydistill.ops._divergence_call import OP, Call, prepare
from pydistill.ops._vocab_parallel_divergence import divergence_backward, divergence_forward
from pydistill.reference.divergence import (
    ENTROPY_T,
    SAVED,
    STATS,
    Inputs,
    Options,
    divergence_reference,
)


class DivergenceStats(NamedTuple):
    """`divergence_with_stats`: the loss and, a row each (shape of the prefix, no gradient, NaN
    where not counted)."""

    loss: Tensor
    student_lse: Tensor  # logsumexp(student / T)
    teacher_lse: Tensor
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    acceptance: (
        Tensor  # sum min(p, q): the probability that speculative decoding accepts a draft token
    )
    argmax_agreement: (
        Tensor  # 1.0 where both sides prefer the same token (the first of equals), else 0.0
    )


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    *,
    beta: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale_t2: bool = False,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    student_rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    vocab: str = "equal",
    convention: str | None = None,
    overwrite_logits: bool = False,
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's distribution from the teacher's, differentiable in the student's
    logits.

    Args:
        student_logits: `[..., V]`, any strides. fp32, bf16, fp16; fp64 on the reference.
        teacher_logits: `[..., V]`, same prefix (see the row arguments), any of those dtypes; must
            not require grad.
        kind: one of `pydistill.KINDS`.
        beta, alpha: the kind's parameters, a scalar or one value a row; None takes the kind's
            default. `jsd` needs 0 < beta < 1, the skewed kinds 0 < alpha < 1, `alpha_beta` any
            finite pair.
        temperature: T > 0, a scalar or one value a row. Both sides are divided by it.
        scale_t2: multiplies D by T^2 (Hinton et al. 2015), so that gradients keep their size as T
        grows.
        weight: one value a row, multiplies the row's loss; a row of weight 0 is not counted.
        mask: bool, one a row; True counts the row. The logits of other rows are never read.
        labels: int64, one a row; a row whose label is `ignore_index` is not counted.
        label_weight: share of hard-label cross-entropy in the loss, in [0, 1]; needs `labels`.
        z_loss: coefficient of logsumexp(student_logits)^2.
        reduction: "mean" = sum(w l) / sum(w) over counted rows, or / `denominator`; "sum"; "none".
            With no counted row, mean and sum are 0.
        denominator: what mean divides by instead (the trainers' `num_items_in_batch`).
        student_rows, teacher_rows: int64 `[R]` into the flattened prefixes, which may then differ;
            pair i compares student row student_rows[i] with teacher row teacher_rows[i]. Gradients
            of repeated rows accumulate. Per-row arguments and the result of reduction="none" then
            have shape `[R]`.
        vocab: "equal" raises if the vocabularies differ in size; "min" compares the first min(V_s,
            V_t) tokens.
        convention: reproduces another project's value and gradient, see `pydistill.CONVENTIONS`.
        overwrite_logits: writes the gradient over `student_logits` during forward (no gradient
            memory). Needs a scalar reduction; the logits are lost, and a second backward raises.
            Gradients reach what the logits were computed from; of logits that are a view, torch
            itself has none to give.
        group: a `torch.distributed.ProcessGroup` whose ranks each hold some columns of the
            vocabulary, in the order of ranks, of both logits; all else is the same on every rank,
            token ids are global, and so are the results. The gradient is that of the local columns.
            Every rank must call, and run backward. docs/vocab_parallel.md.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        A scalar, or the prefix's shape for reduction="none"; fp32, or fp64 for fp64 logits.

    Infinities: p = 0 contributes its q term or 0; where q = 0 < p makes D infinite the loss is +inf
    (and, except for forward_kl, the row's gradient NaN); a row of only -inf is NaN, and no other
    row is touched.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) the offending
            row's loss is NaN instead.
    """
    arguments = (
        kind, beta, alpha, temperature, scale_t2, weight, mask, labels, label_weight, ignore_index,
        z_loss, reduction, denominator, student_rows, teacher_rows, vocab, convention, impl,
    )  # fmt: skip
    shard = parallel.find(
        group, -1, (student_logits, teacher_logits), (*arguments, overwrite_logits)
    )
    parallel.check(shard, student_logits, overwrite_logits)
    call = prepare(student_logits, teacher_logits, *arguments, shard)
    if overwrite_logits and torch.is_grad_enabled() and student_logits.requires_grad:
        return _overwrite(call, student_logits)
    loss, _ = _loss_rows(call, with_stats=call.soft_cross_entropy)
    return call.reduce(loss)


def divergence_with_stats(
    student_logits: Tensor, teacher_logits: Tensor, kind: str = "forward_kl", **arguments: Any
) -> DivergenceStats:
    """`divergence` and, from the same pass, each row's normalisers, entropies, acceptance and
    arg-max agreement.

    Takes the arguments of `divergence` except `overwrite_logits` and `group`. The statistics are
    those of p and q at the row's temperature, have the prefix's shape (`[R]` with row indices) and
    carry no gradient.
    """
    if arguments.pop("overwrite_logits", False):
        raise ValueError(
            "overwrite_logits=True is not offered with statistics; call divergence for it."
        )
    call = prepare(student_logits, teacher_logits, kind, **{**_DEFAULTS, **arguments})
    loss, stats = _loss_rows(call, with_stats=True)
    return DivergenceStats(call.reduce(loss), *(s.reshape(call.shape) for s in stats.unbind(-1)))


def divergence_jvp(
    student_logits: Tensor,
    student_tangent: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """`divergence` and its directional derivative along `student_tangent [..., V]`: (loss, tangent
    of the loss).

    The explicit form of `torch.func.jvp`, and the one to use under `torch.compile`, which drops
    tangents of custom functions. Takes the arguments of `divergence` except `overwrite_logits` and
    `group`. Not differentiable again.
    """
    if student_tangent.shape != student_logits.shape:
        raise ValueError(
            f"student_tangent has shape {tuple(student_tangent.shape)}, student_logits"
            f" {tuple(student_logits.shape)}; they must be equal."
        )
    call = prepare(student_logits.detach(), teacher_logits, kind, **{**_DEFAULTS, **arguments})
    loss, tangent = _tangent_rows(call, _rows.flatten(student_tangent.detach()))
    return call.reduce(loss), call.reduce(tangent)


_DEFAULTS: dict[str, Any] = {
    name: p.default
    for name, p in inspect.signature(divergence).parameters.items()
    if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("overwrite_logits", "group")
}

_OPTIONS = (
    "int kind, float temperature, float alpha, float beta, bool scale_t2, float label_weight,"
    " float z_loss, int vocab"
)
_PAIRS = "Tensor? student_rows, Tensor? teacher_rows"


def _forward_out(*args: Any) -> None:
    inputs, options, (loss, saved, stats) = Inputs(*args[:7]), Options(*args[7:15]), args[15:]
    with torch.no_grad():
        row_loss, row_stats = divergence_reference(inputs, options, with_stats=stats.numel() > 0)
    loss.copy_(row_loss)
    saved.zero_()
    stats.copy_(row_stats)


def _backward_out(*args: Any) -> None:
    student, teacher, student_rows, teacher_rows, _, _, labels, params, _, grad_rows = args[:10]
    options, grad = Options(*args[10:18]), args[18]
    with _registry.autograd_inside_op():
        leaf = student.detach().requires_grad_()
        inputs = Inputs(leaf, teacher, student_rows, teacher_rows, grad_rows != 0, labels, params)
        loss, _ = divergence_reference(inputs, options)
        grad.copy_(torch.autograd.grad(loss, leaf, grad_rows.to(loss.dtype))[0])


def _overwrite_out(*args: Any) -> None:
    inputs, options, (scale_rows, loss) = (
        Inputs(*args[:7]),
        Options(*args[8:16]),
        (args[7], args[16]),
    )
    empty = loss.new_empty(0)
    _forward_out(*inputs, *options, loss, empty, loss.new_empty((0, STATS)))
    grad = torch.empty_like(inputs.student)
    _backward_out(*inputs[:4], None, None, *inputs[5:], empty, scale_rows, *options, grad)
    inputs.student.copy_(grad)


_registry.kernel(
    OP,
    "divergence_fwd",
    f"(Tensor student, Tensor teacher, {_PAIRS}, Tensor? counted, Tensor? labels, Tensor? params,"
    f" {_OPTIONS},"
    " Tensor(a!) loss, Tensor(b!) saved, Tensor(c!) stats) -> ()",
    _forward_out,
)
_registry.kernel(
    OP,
    "divergence_bwd",
    f"(Tensor student, Tensor teacher, {_PAIRS}, Tensor? row_start, Tensor? pairs, Tensor?"
    " labels, Tensor? params,"
    f" Tensor saved, Tensor grad_rows, {_OPTIONS}, Tensor(a!) grad) -> ()",
    _backward_out,
)
_registry.kernel(
    OP,
    "divergence_overwrite",
    f"(Tensor(a!) student, Tensor teacher, {_PAIRS}, Tensor? counted, Tensor? labels, Tensor?"
    " params,"
    f" Tensor scale_rows, {_OPTIONS}, Tensor(b!) loss) -> ()",
    _overwrite_out,
)


def _loss_rows(call: Call, *, with_stats: bool) -> tuple[Tensor, Tensor]:
    """Row losses `[R]`, differentiable in the student's logits, and row statistics `[R, STATS]` or
    `[0, STATS]`."""
    inputs, options = call.inputs, call.options
    if call.shard is not None:
        loss, stats = _parallel_rows(call, call.shard)
    elif call.backend == "reference":
        loss, stats = divergence_reference(
            inputs, options, with_stats=with_stats or call.soft_cross_entropy
        )
    elif torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "torch.compile drops the tangents of custom functions; call"
                " pydistill.divergence_jvp inside compiled"
                " code, or take the forward-mode derivative in eager mode."
            )
        loss, _, stats = _Divergence.apply(*inputs, options, call.backend, with_stats)
    else:
        loss, _, stats = _DivergenceJvp.apply(*inputs, options, call.backend, with_stats)
    if call.soft_cross_entropy:
        entropy = stats[:, ENTROPY_T].detach()
        if options.scale_t2:
            entropy = (
                entropy
                * (options.temperature if inputs.params is None else inputs.params[:, 0]) ** 2
            )
        if inputs.counted is not None:  # the statistics of other rows are NaN
            entropy = torch.where(inputs.counted, entropy, 0)
        loss = loss + (1 - options.label_weight) * entropy
    return loss, stats


def _parallel_rows(call: Call, shard: parallel.Shard) -> tuple[Tensor, Tensor]:
    """`_loss_rows` of a sharded vocabulary; of the statistics only the teacher's entropy."""
    options, backend = call.options, call.backend
    here = options._replace(vocab=shard.width)
    stats = torch.empty(0)

    def forward(*tensors: Any) -> tuple[Tensor, Tensor]:
        nonlocal stats
        inputs = Inputs(*tensors)
        entropy = call.soft_cross_entropy
        loss, saved, entropies = divergence_forward(shard, inputs, options, entropy=entropy)
        if entropy:
            stats = entropies[:, None].expand(-1, STATS)
        return loss, saved

    def backward(*tensors: Any) -> Tensor:
        inputs, saved, grad_rows = Inputs(*tensors[:7]), *tensors[7:]
        if inputs.labels is not None:  # outside the shard, it is nobody's token
            inputs = inputs._replace(labels=inputs.labels - shard.offset)
        if backend == "reference":
            grad = torch.empty_like(inputs.student)
            if inputs.counted is not None:
                grad_rows = torch.where(inputs.counted, grad_rows, 0)
            divergence_backward(inputs, here, saved, grad_rows, grad)
            return grad
        return _gradient(*inputs, saved, grad_rows, here, backend)

    loss = parallel.rows(parallel.Op(forward, backward), *call.inputs)[0]
    return loss, stats


def _forward(
    inputs: Inputs, options: Options, backend: str, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = inputs.student if inputs.student_rows is None else inputs.student_rows
    loss = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    saved = loss.new_empty((rows.shape[0], SAVED))
    stats = loss.new_empty((rows.shape[0] if with_stats else 0, STATS))
    _registry.overload("divergence_fwd", backend)(*inputs, *options, loss, saved, stats)
    return loss, saved, stats


class _Divergence(torch.autograd.Function):
    """(student, ...) -> (loss [R], saved [R, SAVED], stats). No `jvp`, so that Dynamo accepts
    it."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        student_rows: Tensor | None,
        teacher_rows: Tensor | None,
        counted: Tensor | None,
        labels: Tensor | None,
        params: Tensor | None,
        options: Options,
        backend: str,
        with_stats: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Named one by one: where nothing requires grad, Dynamo would hand a ctx to `*args`.
        inputs = Inputs(student, teacher, student_rows, teacher_rows, counted, labels, params)
        return _forward(inputs, options, backend, with_stats)

    @staticmethod
    def setup_context(
        ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, saved, stats = output
        ctx.mark_non_differentiable(saved, stats)
        ctx.save_for_backward(*args[:7], saved)
        ctx.options, ctx.backend, _ = args[7:]
        ctx.set_materialize_grads(False)  # a zero tangent of the teacher would look like a real one

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_rows is None:
            return (None,) * 10
        return _gradient(*ctx.saved_tensors, grad_rows, ctx.options, ctx.backend), *[None] * 9

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _DivergenceJvp.apply(*_merge(info.batch_size, in_dims, args[:7]), *args[7:])
        return tuple(o.reshape(info.batch_size, -1, *o.shape[1:]) for o in outputs), (0, 0, 0)


class _DivergenceJvp(_Divergence):
    """The eager form: forward-mode derivatives through `jvp`."""

    @staticmethod
    def setup_context(
        ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _Divergence.setup_context(ctx, args, output)
        ctx.save_for_forward(*args[:7], output[1])  # Dynamo would append these to saved_tensors

    @staticmethod
    def jvp(
        ctx: Any, student_tangent: Tensor | None, *tangents: Any
    ) -> tuple[Tensor | None, None, None]:
        if tangents[0] is not None:
            raise RuntimeError(
                "teacher_logits has a tangent, but derivatives flow to the student only; detach it."
            )
        if student_tangent is None:
            return None, None, None
        *inputs, saved = ctx.saved_tensors
        return (
            _tangent(Inputs(*inputs), saved, student_tangent, ctx.options, ctx.backend),
            None,
            None,
        )


def _gradient(*args: Any) -> Tensor:
    grad: Tensor = (
        _DivergenceBackward if torch.compiler.is_compiling() else _DivergenceBackwardJvp
    ).apply(*args)
    return grad


class _DivergenceBackward(torch.autograd.Function):
    """(student, ..., saved, upstream [R]) -> gradient [S, V_s] in the student's dtype; raises if
    differentiated again."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        student_rows: Tensor | None,
        teacher_rows: Tensor | None,
        counted: Tensor | None,
        labels: Tensor | None,
        params: Tensor | None,
        saved: Tensor,
        grad_rows: Tensor,
        options: Options,
        backend: str,
    ) -> Tensor:
        inputs = Inputs(student, teacher, student_rows, teacher_rows, counted, labels, params)
        if inputs.counted is not None:
            grad_rows = torch.where(inputs.counted, grad_rows, 0)
        grouped: tuple[Tensor | None, Tensor | None] = (None, None)
        if inputs.student_rows is not None:
            grouped = _rows.group_by_row(inputs.student_rows, inputs.student.shape[0])
        grad = _memory.empty_like(inputs.student)
        _registry.overload("divergence_bwd", backend)(
            *inputs[:4],
            *grouped,
            inputs.labels,
            inputs.params,
            saved,
            grad_rows.contiguous(),
            *options,
            grad,
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
        merged = _merge(batch, in_dims, args[:7])
        saved, grad_rows = (
            _rows.lead(x, d, batch) for x, d in zip(args[7:9], in_dims[7:9], strict=True)
        )
        grad = _gradient(*merged, saved, grad_rows, *args[9:])
        return grad.reshape(batch, -1, grad.shape[-1]), 0


class _DivergenceBackwardJvp(_DivergenceBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_SECOND)


_NO_SECOND = (
    "the kernels of pydistill.divergence have first derivatives only; pass impl='reference' for"
    " second derivatives"
    " (create_graph=True, forward over reverse, hessians)."
)


def _merge(batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Inputs:
    """The inputs of `batch` vmapped calls as those of one call on batch * R pairs."""
    student, teacher, student_rows, teacher_rows, *per_row = args
    count_s = (
        student.shape[1 if in_dims[0] == 0 else 0] if in_dims[0] is not None else student.shape[0]
    )
    count_t = (
        teacher.shape[1 if in_dims[1] == 0 else 0] if in_dims[1] is not None else teacher.shape[0]
    )
    return Inputs(
        _rows.lead(student, in_dims[0], batch),
        _rows.lead(teacher, in_dims[1], batch),
        _rows.lead_index(student_rows, in_dims[2], batch, count_s),
        _rows.lead_index(teacher_rows, in_dims[3], batch, count_t),
        *(_rows.lead_optional(x, d, batch) for x, d in zip(per_row, in_dims[4:7], strict=True)),
    )


def _tangent(
    inputs: Inputs, saved: Tensor, student_tangent: Tensor, options: Options, backend: str
) -> Tensor:
    """The tangent of each row's loss: <gradient of the row, tangent of its logits>, in fp32."""
    student, tangent = inputs.student.float(), student_tangent.float()
    if inputs.student_rows is not None:
        student, tangent = student[inputs.student_rows], tangent[inputs.student_rows]
    inputs = inputs._replace(student=student, student_rows=None)
    ones = torch.ones(student.shape[0], dtype=torch.float32, device=student.device)
    grad = _gradient(*inputs, saved, ones, options, backend)
    return (grad * tangent).sum(-1)


def _tangent_rows(call: Call, student_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Row losses and their tangents, by the explicit route that also compiles."""
    inputs, options = call.inputs, call.options
    if call.backend == "reference":
        with torch.enable_grad():
            leaf = inputs.student.detach().requires_grad_()
            loss, _ = _loss_rows(
                call._replace(inputs=inputs._replace(student=leaf)), with_stats=False
            )
            pulled = torch.ones_like(loss, requires_grad=True)
            (grad,) = torch.autograd.grad(loss, leaf, pulled, create_graph=True)
            (tangent,) = torch.autograd.grad(grad, pulled, student_tangent.to(grad.dtype))
        return loss.detach(), tangent
    loss, _ = _loss_rows(call, with_stats=call.soft_cross_entropy)
    _, saved, _ = _forward(inputs, options, call.backend, with_stats=False)
    return loss, _tangent(inputs, saved, student_tangent, options, call.backend)


class _DivergenceOverwrite(torch.autograd.Function):
    """(student, ..., scale [R]) -> sum of scale * row loss, with the gradient of that sum written
    over `student`. One `forward` with ctx: functorch's transforms cannot use it, and raise."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, (scale_rows, options, backend) = Inputs(*args[:7]), args[7:]
        loss = torch.empty(scale_rows.shape[0], dtype=scale_rows.dtype, device=scale_rows.device)
        if backend == "reference":
            _overwrite_out(*inputs, scale_rows, *options, loss)
        else:
            _registry.overload("divergence_overwrite", backend)(*inputs, scale_rows, *options, loss)
            torch.autograd.graph.increment_version(inputs.student)
        if inputs.student_rows is not None:
            named = torch.zeros(inputs.student.shape[0], dtype=torch.bool, device=loss.device)
            named[inputs.student_rows] = True
            inputs.student.masked_fill_(~named[:, None], 0)
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
        return grad, *[None] * 9


def _overwrite(call: Call, student_logits: Tensor) -> Tensor:
    inputs = call.inputs
    _rows.check_overwrite(call.reduction, call.weight, student_logits, inputs.student)
    if call.soft_cross_entropy:
        raise ValueError(
            "overwrite_logits=True is not offered under this convention; pass"
            " overwrite_logits=False."
        )
    rows = inputs.student_rows
    if rows is not None and rows.unique().numel() != rows.numel():
        raise ValueError(
            "overwrite_logits=True needs each student row at most once; student_rows has"
            " duplicates."
        )
    scale = _rows.row_scale(
        inputs.student, call.weight, inputs.counted, call.reduction, call.denominator,
        rows=None if rows is None else rows.shape[0],
    )  # fmt: skip
    loss: Tensor = _DivergenceOverwrite.apply(*inputs, scale, call.options, call.backend)
    return loss
