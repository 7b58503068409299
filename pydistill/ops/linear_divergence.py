"""`divergence` of the logits of two language-model heads, from hidden states: the logits are
never in memory as a whole.

    loss = divergence(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)

with gradients for the student's hidden states, weight and bias. Every kind and every option of
`divergence`; the rows go through its kernels. docs/ops/linear_divergence.md has the cost, and how
the tiles are cut (pydistill/ops/_linear_head.py).

Shapes: hidden states [..., H_s] and [..., H_t] with one prefix, weights [V, H_s] and [V, H_t];
fp32, bf16 or fp16, any mixture (fp64 on the reference). Products and logits are fp32 sums of the
operands as they are; gradients come back in their tensors' dtypes, the weight's rounded once.
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
from pydistill.ops._divergence_call import RowArguments, common_vocab, row_arguments
from pydistill.ops._vocab_parallel_divergence import divergence_backward, divergence_forward
from pydistill.reference.divergence import KINDS, SAVED, Inputs, Options
from pydistill.reference.linear_divergence import linear_divergence_reference
from pydistill.reference.linear_head import Head

OP = _registry.operator("linear_divergence", {torch.float32, torch.bfloat16, torch.float16}, KINDS)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
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
    vocab: str = "equal",
    convention: str | None = None,
    gradient: str = "recompute",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's head's distribution from the teacher's head's, differentiable in
    the student's hidden states, weight and bias.

    Args:
        student_hidden, teacher_hidden: `[..., H_s]`, `[..., H_t]`, the last hidden states, of one
            prefix. fp32, bf16, fp16; fp64 on the reference. The teacher's must not require grad.
        student_weight, teacher_weight: `[V, H_s]`, `[V, H_t]`, as `nn.Linear.weight`. A tensor that
            does not require grad costs no work for its gradient. Sharded weights must be gathered
            (docs/vocab_parallel.md: `weight.full_tensor()` of FSDP2, `GatheredParameters` of
            ZeRO-3), or stay where they are, with `group`.
        student_bias, teacher_bias: `[V]`.
        student_logit_scale, teacher_logit_scale: multiply the logits.
        student_softcap, teacher_softcap: c > 0, logits become c tanh(logits / c).
        kind, beta, alpha, temperature, scale_t2, weight, mask, labels, label_weight, ignore_index,
        z_loss, reduction, denominator, vocab, convention: as in `pydistill.divergence`. Rows that
            do not count are left out of the products.
        gradient: "recompute" keeps O(rows) for backward, which computes the logits again; any
            upstream gradient and a repeated backward are right. "in_forward" computes the gradients
            with the loss, from logits computed once, when one of the student's tensors requires
            grad: a quarter to a third less work; needs a scalar reduction, and can be used once. It
            holds the gradients, and for more tokens than hidden states have features a part of the
            logits' gradient, or fp32 sums of a half weight's shape (docs/ops/linear_divergence.md).
        group: a `torch.distributed.ProcessGroup` whose ranks each hold some rows of the weights and
            biases, in the order of ranks; all else is the same on every rank, and so are the
            results. Gradients are those of the local rows, and the whole of the hidden states',
            which this call sums over the ranks. Every rank must call, and run backward.
            docs/vocab_parallel.md.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        A scalar, or the prefix's shape for reduction="none"; fp32, or fp64 for fp64 tensors.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) the offending
            row's loss is NaN instead.
    """
    arguments = (
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap, beta, alpha,
        temperature, scale_t2, weight, mask, labels, label_weight, ignore_index, z_loss, reduction,
        denominator, vocab, convention, impl,
    )  # fmt: skip
    shard = parallel.find(
        group, 0, (student_weight, teacher_weight, student_bias, teacher_bias),
        (student_hidden, teacher_hidden, kind, *arguments, gradient),
    )  # fmt: skip
    call = _prepare(
        student_hidden, student_weight, teacher_hidden, teacher_weight, kind, student_bias,
        teacher_bias, *arguments, shard,
    )  # fmt: skip
    student, row_weight = call.student, call.rows.weight
    if autograd.in_forward(gradient, student, reduction, row_weight, call.backend):
        return _in_forward(call)
    return _rows.reduce_rows(
        _loss_rows(call), row_weight, call.rows.counted, reduction, denominator, call.shape
    )


class Call(NamedTuple):
    """A checked call."""

    student: Head
    teacher: Head
    rows: RowArguments
    backend: str
    shape: tuple[int, ...]
    reduction: str
    denominator: float | Tensor | None
    shard: parallel.Shard | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self.teacher[:3], self.rows.labels, self.rows.params)

    def numbers(self) -> tuple[Any, ...]:
        return (*self.student[3:], *self.teacher[3:], *self.rows.options)


def _prepare(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: str,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    beta: float | Tensor | None,
    alpha: float | Tensor | None,
    temperature: float | Tensor,
    scale_t2: bool,
    weight: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weight: float,
    ignore_index: int,
    z_loss: float,
    reduction: str,
    denominator: float | Tensor | None,
    vocab: str,
    convention: str | None,
    impl: str,
    shard: parallel.Shard | None,
) -> Call:
    student = linear.check_head(
        "student", student_hidden, student_weight, student_bias, student_logit_scale,
        student_softcap,
    )  # fmt: skip
    teacher = linear.check_head(
        "teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale,
        teacher_softcap,
    )  # fmt: skip
    linear.check_frozen(teacher, "teacher")
    _rows.check_device("teacher_hidden", teacher_hidden, student_hidden.device)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden has prefix {tuple(student_hidden.shape[:-1])} and teacher_hidden"
            f" {tuple(teacher_hidden.shape[:-1])}; they must be equal."
        )
    _rows.check_reduction(reduction, denominator)
    like = linear.widest(student, teacher)
    parallel.check(shard, like)
    backend = _registry.resolve(OP.name, impl, like.device.type, like.dtype)
    vocab_size = common_vocab("weight", student_weight.shape[0], teacher_weight.shape[0], vocab)
    shape = tuple(student_hidden.shape[:-1])
    rows = row_arguments(
        kind, beta, alpha, temperature, scale_t2, weight, mask, labels, label_weight, ignore_index,
        z_loss, convention, vocab_size if shard is None else shard.total, shape, like,
    )  # fmt: skip
    rows = rows._replace(options=rows.options._replace(vocab=vocab_size))
    if rows.soft_cross_entropy:
        raise ValueError(
            f"convention={convention!r} reports kind={kind!r} as a cross-entropy, which needs the"
            " teacher's entropy; pass convention=None (the gradient is the same), or call"
            " divergence."
        )
    return Call(student, teacher, rows, backend, shape, reduction, denominator, shard)


_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? counted, Tensor"
    " teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels, Tensor? params"
)
_NUMBERS = (
    "float student_scale, float student_softcap, float teacher_scale, float teacher_softcap, int"
    " kind, float temperature, float alpha, float beta, bool scale_t2, float label_weight, float"
    " z_loss, int vocab"
)
_GRADIENTS = "Tensor(a!) grad_hidden, Tensor(b!) grad_weight, Tensor(c!) grad_bias"


def _call(
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    backend: str,
    shard: parallel.Shard | None = None,
) -> Call:
    """The call that a kernel was given."""
    counted, labels, params = tensors[3], *tensors[7:9]
    rows = RowArguments(Options(*numbers[4:]), counted, labels, params, None, False)
    student, teacher = Head(*tensors[:3], *numbers[:2]), Head(*tensors[4:7], *numbers[2:4])
    return Call(student, teacher, rows, backend, (), "", None, shard)


def _reference_rows(call: Call) -> Tensor:
    """The definition's row losses; of weights cut to the tokens that are compared."""
    student, teacher = (
        h._replace(
            weight=h.weight[: call.rows.options.vocab],
            bias=None if h.bias is None else h.bias[: call.rows.options.vocab],
        )
        for h in (call.student, call.teacher)
    )
    rows = call.rows
    return linear_divergence_reference(
        student, teacher, rows.counted, rows.labels, rows.params, rows.options
    )


def _forward_reference(*args: Any) -> None:
    call, (loss, saved) = _call(args[:9], args[9:21], "reference"), args[21:]
    with torch.no_grad():
        loss.copy_(_reference_rows(call))
    saved.zero_()


def _backward_reference(*args: Any) -> None:
    tensors, grad_rows, out = args[:9], args[10], linear.wanted(*args[23:])
    call = _call(tensors, args[11:23], "reference")
    call = call._replace(rows=call.rows._replace(counted=grad_rows != 0))
    linear.reference_gradients(
        call.student, lambda h: [_reference_rows(call._replace(student=h))], [grad_rows], out
    )


def _gradients_reference(*args: Any) -> None:
    tensors, scale_rows, numbers, (loss, *grads) = args[:9], args[9], args[10:22], args[22:]
    saved = loss.new_empty((loss.shape[0], SAVED))
    _forward_reference(*tensors, *numbers, loss, saved)
    _backward_reference(*tensors, saved, scale_rows, *numbers, *grads)


class _Rows:
    """`divergence` as the driver calls it, over the rows of `index`."""

    def __init__(self, call: Call, index: Tensor | None, **tensors: Tensor) -> None:
        teacher = call.teacher._replace(hidden=linear.select(call.teacher.hidden, index))
        self.options, self.backend, self.shard = call.rows.options, call.backend, call.shard
        self.teacher = linear.Tiles(teacher, self.options.vocab)
        self.labels = linear.select_optional(call.rows.labels, index)
        self.params = linear.select_optional(call.rows.params, index)
        self.tensors = tensors  # loss, saved and upstream, as far as a direction has them

    def forward(self, logits: Tensor, rows: slice) -> None:
        loss, saved = self.tensors["loss"][rows], self.tensors["saved"][rows]
        teacher = self.teacher.logits(rows, slice(0, self.options.vocab))
        if self.shard is not None:
            inputs = Inputs(logits, teacher, None, None, None, *self._row_arguments(rows))
            found = divergence_forward(self.shard, inputs, self.options)
            loss.copy_(found[0])
            saved.copy_(found[1])
            return
        _registry.overload("divergence_fwd", self.backend)(
            logits, teacher, None, None, None, *self._row_arguments(rows), *self.options, loss,
            saved, loss.new_empty((0, 6)),
        )  # fmt: skip

    def backward(self, logits: Tensor, rows: slice, columns: slice) -> None:
        teacher = self.teacher.logits(rows, columns)
        labels, params = self._row_arguments(rows)
        if labels is not None:  # outside the tile, it is nobody's token
            labels = labels - columns.start - (0 if self.shard is None else self.shard.offset)
        options = self.options._replace(vocab=columns.stop - columns.start)
        if self.backend == "reference":
            inputs = Inputs(logits, teacher, None, None, None, labels, params)
            saved, upstream = self.tensors["saved"][rows], self.tensors["upstream"][rows]
            return divergence_backward(inputs, options, saved, upstream, logits)
        _registry.overload("divergence_bwd", self.backend)(
            logits, teacher, None, None, None, None, labels, params, self.tensors["saved"][rows],
            self.tensors["upstream"][rows], *options, logits,
        )  # fmt: skip

    def overwrite(self, logits: Tensor, rows: slice) -> None:
        if self.shard is not None:
            self.forward(logits, rows)
            return self.backward(logits, rows, slice(0, self.options.vocab))
        teacher = self.teacher.logits(rows, slice(0, self.options.vocab))
        _registry.overload("divergence_overwrite", self.backend)(
            logits, teacher, None, None, None, *self._row_arguments(rows),
            self.tensors["upstream"][rows], *self.options, self.tensors["loss"][rows],
        )  # fmt: skip

    def _row_arguments(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.labels is None else self.labels[rows],
            None if self.params is None else self.params[rows],
        )


def _tiles(call: Call, index: Tensor | None) -> linear.Tiles:
    student = call.student._replace(hidden=linear.select(call.student.hidden, index))
    return linear.Tiles(student, call.rows.options.vocab, call.shard and call.shard.widest)


def _forward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, (loss, saved) = _call(args[:9], args[9:21], backend, shard), args[21:]
    with linear.plain(loss):
        index = linear.rows_where(call.rows.counted)
        part = linear.Selected(index, loss, saved)
        linear.forward(
            _tiles(call, index), _Rows(call, index, loss=part.rows[0], saved=part.rows[1])
        )
        part.put()


def _backward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, out = _call(args[:9], args[11:23], backend, shard), linear.wanted(*args[23:])
    with linear.plain(args[9]):
        index = linear.rows_where(args[10] != 0)
        part = linear.Selected(index, out.hidden)
        saved, upstream = (linear.select(x, index) for x in args[9:11])
        rows = _Rows(call, index, saved=saved, upstream=upstream)
        linear.backward(_tiles(call, index), rows, out._replace(hidden=part.rows[0]))
        part.put()


def _gradients_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, out = _call(args[:9], args[10:22], backend, shard), linear.wanted(*args[23:])
    with linear.plain(args[9]):
        index = linear.rows_where(call.rows.counted)
        part = linear.Selected(index, args[22], out.hidden)
        loss, upstream = part.rows[0], linear.select(args[9], index)
        saved = loss.new_empty((loss.shape[0], SAVED))
        rows = _Rows(call, index, loss=loss, saved=saved, upstream=upstream)
        linear.forward_backward(_tiles(call, index), rows, out._replace(hidden=part.rows[1]))
        part.put()


_registry.composed_kernel(
    OP,
    "linear_divergence_fwd",
    f"({_TENSORS}, {_NUMBERS}, Tensor(a!) loss, Tensor(b!) saved) -> ()",
    _forward_reference,
    _forward_run,
    of="divergence_fwd",
)
_registry.composed_kernel(
    OP,
    "linear_divergence_bwd",
    f"({_TENSORS}, Tensor saved, Tensor grad_rows, {_NUMBERS}, {_GRADIENTS}) -> ()",
    _backward_reference,
    _backward_run,
    of="divergence_bwd",
)
_registry.composed_kernel(
    OP,
    "linear_divergence_gradients",
    f"({_TENSORS}, Tensor scale_rows, {_NUMBERS}, Tensor(d!) loss, {_GRADIENTS}) -> ()",
    _gradients_reference,
    _gradients_run,
    of="divergence_overwrite",
)


def _loss_rows(call: Call) -> Tensor:
    """Row losses `[R]`, differentiable."""
    if call.backend == "reference" and call.shard is None:
        return _reference_rows(call)
    return autograd.rows(
        call.student, call.rows.counted, call.tensors(), call.numbers(), name=OP.name, outputs=1,
        saved=SAVED, backend=call.backend, shard=call.shard,
    )[0]  # fmt: skip


def _in_forward(call: Call) -> Tensor:
    scale = _rows.row_scale(
        linear.widest(call.student, call.teacher), call.rows.weight, call.rows.counted,
        call.reduction, call.denominator, rows=call.student.hidden.shape[0],
    )  # fmt: skip
    return autograd.loss_with_gradients(
        call.student, call.rows.counted, call.tensors(), call.numbers(), scale, name=OP.name,
        backend=call.backend, shard=call.shard,
    )  # fmt: skip
