"""`topk_divergence` of a language-model head's logits, from hidden states: the logits are never in
memory as a whole.

    loss = topk_divergence(student_hidden @ student_weight.T, topk_logprobs, topk_ids)

with gradients for hidden states, weight and bias. Every kind, tail and option of `topk_divergence`;
the rows go through its kernels. docs/ops/linear_topk_divergence.md has the cost, and
pydistill/ops/_linear_head.py how the tiles are cut.

Shapes: hidden states [..., H], weight [V, H], teacher [..., K]; fp32, bf16 or fp16, any mixture
(fp64 on the reference). Products and logits are fp32 sums of the operands as they are; gradients
come back in their tensors' dtypes, the weight's rounded once.
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
from pydistill.ops._hard_terms import SAVED as HARD_SAVED
from pydistill.ops._hard_terms import HardRows
from pydistill.ops._topk_divergence_call import (
    Names,
    RowArguments,
    duplicate_ids,
    row_arguments,
)
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.ops._vocab_parallel_topk_divergence import topk_backward, topk_forward
from pydistill.reference.hard_terms import Hard
from pydistill.reference.linear_head import Head
from pydistill.reference.linear_topk_divergence import linear_topk_divergence_reference
from pydistill.reference.topk_divergence import SAVED, STATUS, TOPK_KINDS, Inputs, Options

OP = _registry.operator(
    "linear_topk_divergence", {torch.float32, torch.bfloat16, torch.float16}, TOPK_KINDS
)
_NAMES = Names("linear_topk_divergence", "student_hidden", "student_weight")


def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_logprobs: Tensor | TopkTeacher,
    topk_ids: Tensor | None = None,
    kind: str = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
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
    gradient: str = "recompute",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of a head's distribution from a teacher known on K tokens a row, differentiable in
    hidden states, weight and bias.

    Args:
        student_hidden, student_weight, student_bias, student_logit_scale, student_softcap,
        gradient, group: as in `pydistill.linear_divergence`.
        topk_logprobs, topk_ids, kind, tail, tail_logprob, beta, temperature, teacher_temperature,
        scale_t2, weight, mask, labels, label_weight, ignore_index, z_loss, reduction, denominator,
        convention, impl: as in `pydistill.topk_divergence`; labels and z-loss cost no further
        product.

    Returns:
        A scalar, or the prefix's shape for reduction="none"; fp32, or fp64 for fp64 tensors.

    Raises:
        ValueError, TypeError: for an argument that cannot be right; the message names the value and
            the fix. Where values cannot be read for free (under compile, on a GPU) the offending
            row's loss is NaN instead.
    """
    numbers = (student_logit_scale, student_softcap)
    arguments = (
        topk_logprobs, topk_ids, kind, tail, tail_logprob, beta, temperature, teacher_temperature,
        scale_t2, weight, mask, labels, label_weight, ignore_index, z_loss,
        convention,
    )  # fmt: skip
    shard = parallel.find(
        group, 0, (student_weight, student_bias),
        (student_hidden, *numbers, *arguments, reduction, denominator, gradient, impl),
    )  # fmt: skip
    head = linear.check_head(
        "student", student_hidden, student_weight, student_bias, student_logit_scale,
        student_softcap,
    )  # fmt: skip
    _rows.check_reduction(reduction, denominator)
    like, shape = linear.widest(head), tuple(student_hidden.shape[:-1])
    parallel.check(shard, like)
    vocab = student_weight.shape[0] if shard is None else shard.total
    backend = _registry.resolve(OP.name, impl, like.device.type, like.dtype)
    rows = row_arguments(*arguments, vocab, shape, like, _NAMES)
    call = Call(head, rows, backend, shard)
    if autograd.in_forward(gradient, head, reduction, rows.weight, backend):
        scale = _rows.row_scale(
            like, rows.weight, rows.counted, reduction, denominator, rows=head.hidden.shape[0]
        )
        _check_ids(rows.ids)
        return autograd.loss_with_gradients(
            head, rows.counted, call.tensors(), call.numbers(), scale, name=OP.name,
            backend=backend, shard=shard,
        )  # fmt: skip
    loss = _loss_rows(call)
    return _rows.reduce_rows(loss, rows.weight, rows.counted, reduction, denominator, shape)


class Call(NamedTuple):
    """A checked call."""

    head: Head
    rows: RowArguments
    backend: str
    shard: parallel.Shard | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        labels = None if self.rows.hard is None else self.rows.hard.labels
        return (self.rows.ids, self.rows.log_p, self.rows.log_tail, self.rows.params, labels)

    def numbers(self) -> tuple[Any, ...]:
        hard = self.rows.hard or Hard(None, 0.0, 0.0)
        return (*self.head[3:], *self.rows.options, hard.label_weight, hard.z_loss)

    def saved(self) -> int:
        """Statistics a row: those of the divergence, then those of the hard terms."""
        return SAVED + (0 if self.rows.hard is None else HARD_SAVED)


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? counted, Tensor ids, Tensor log_p, Tensor?"
    " log_tail, Tensor? params, Tensor? labels"
)
_NUMBERS = (
    "float scale, float softcap, int kind, int tail_mode, float temperature, float beta, bool"
    " scale_t2, float label_weight, float z_loss"
)
_GRADIENTS = "Tensor(a!) grad_hidden, Tensor(b!) grad_weight, Tensor(c!) grad_bias"


def _call(
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    backend: str,
    shard: parallel.Shard | None = None,
) -> Call:
    """The call that a kernel was given."""
    counted, ids, log_p, log_tail, params, labels = tensors[3:]
    options, hard = Options(*numbers[2:7]), Hard(labels, *numbers[7:])
    rows = RowArguments(
        options, ids, log_p, log_tail, counted, params, None,
        hard if hard.label_weight or hard.z_loss else None,
    )  # fmt: skip
    return Call(Head(*tensors[:3], *numbers[:2]), rows, backend, shard)


def _reference_rows(head: Head, rows: RowArguments) -> tuple[Tensor, Tensor]:
    return linear_topk_divergence_reference(
        head,
        rows.ids,
        rows.log_p,
        rows.log_tail,
        rows.counted,
        rows.params,
        rows.options,
        rows.hard,
    )


def _forward_reference(*args: Any) -> None:
    call, (loss, saved) = _call(args[:9], args[9:18], "reference"), args[18:]
    with torch.no_grad():
        row_loss, status = _reference_rows(call.head, call.rows)
    loss.copy_(row_loss)
    saved.zero_()
    saved[:, STATUS] = status


def _backward_reference(*args: Any) -> None:
    grad_rows, out = args[10], linear.wanted(*args[20:])
    call = _call(args[:9], args[11:20], "reference")
    rows = call.rows._replace(counted=grad_rows != 0)
    linear.reference_gradients(call.head, lambda h: _reference_rows(h, rows)[:1], [grad_rows], out)


def _gradients_reference(*args: Any) -> None:
    tensors, scale_rows, numbers, (loss, *grads) = args[:9], args[9], args[10:19], args[19:]
    saved = loss.new_empty((loss.shape[0], SAVED))
    _forward_reference(*tensors, *numbers, loss, saved)
    _backward_reference(*tensors, saved, scale_rows, *numbers, *grads)


class _Rows:
    """`topk_divergence` as the driver calls it, over the rows of `index`."""

    def __init__(self, call: Call, index: Tensor | None, **tensors: Tensor) -> None:
        self.options, self.backend, self.shard = call.rows.options, call.backend, call.shard
        self.ids, self.log_p = (linear.select(x, index) for x in (call.rows.ids, call.rows.log_p))
        self.log_tail = linear.select_optional(call.rows.log_tail, index)
        self.params = linear.select_optional(call.rows.params, index)
        self.tensors = tensors  # loss, saved and upstream, as far as a direction has them

    def forward(self, logits: Tensor, rows: slice) -> None:
        teacher, params = self._row_arguments(rows)
        if self.shard is not None:
            inputs = Inputs(logits, *teacher, None, params)
            loss, saved = topk_forward(self.shard, inputs, self.options)
            self.tensors["loss"][rows], self.tensors["saved"][rows] = loss, saved
            return
        _registry.overload("topk_divergence_fwd", self.backend)(
            logits, *teacher, None, params, *self.options, self.tensors["loss"][rows],
            self.tensors["saved"][rows],
        )  # fmt: skip

    def backward(self, logits: Tensor, rows: slice, columns: slice) -> None:
        (ids, log_p, log_tail), params = self._row_arguments(rows)
        ids = ids if self.shard is None else self.shard.local(ids)
        inside = (ids >= columns.start) & (ids < columns.stop)
        ids = torch.where(inside, ids - columns.start, -1)
        if self.backend == "reference":
            inputs = Inputs(logits, ids, log_p, log_tail, None, params)
            saved, upstream = self.tensors["saved"][rows], self.tensors["upstream"][rows]
            return topk_backward(inputs, self.options, saved, upstream, logits)
        _registry.overload("topk_divergence_bwd", self.backend)(
            logits, ids, log_p, log_tail, params, self.tensors["saved"][rows],
            self.tensors["upstream"][rows], *self.options, logits,
        )  # fmt: skip

    def overwrite(self, logits: Tensor, rows: slice) -> None:
        if self.shard is not None:
            self.forward(logits, rows)
            return self.backward(logits, rows, slice(0, logits.shape[1]))
        teacher, params = self._row_arguments(rows)
        _registry.overload("topk_divergence_overwrite", self.backend)(
            logits, *teacher, None, params, self.tensors["upstream"][rows], *self.options,
            self.tensors["loss"][rows], self.tensors["saved"][rows],
        )  # fmt: skip

    def _row_arguments(
        self, rows: slice
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor | None]:
        log_tail = None if self.log_tail is None else self.log_tail[rows]
        params = None if self.params is None else self.params[rows]
        return (self.ids[rows], self.log_p[rows], log_tail), params


class _RowsWithHard:
    """`_Rows` with labels or z-loss: both are taken of a tile of logits while it is there."""

    def __init__(self, call: Call, hard: Hard, index: Tensor | None, **tensors: Tensor) -> None:
        self.hard = HardRows(hard, call.backend, call.shard)
        self.labels = linear.select_optional(hard.labels, index)
        self.share, self.tensors = 1 - hard.label_weight, tensors
        soft, self.saved = (x.contiguous() for x in tensors["saved"].split([SAVED, HARD_SAVED], 1))
        others = {**tensors, "saved": soft}
        if "upstream" in tensors:
            others["upstream"] = self.share * tensors["upstream"]
        self.soft = _Rows(call, index, **others)

    def forward(self, logits: Tensor, rows: slice) -> None:
        found, self.saved[rows] = self.hard.forward(logits, self._labels(rows))
        self.soft.forward(logits, rows)
        self._add(found, rows)
        saved = (self.soft.tensors["saved"][rows], self.saved[rows])
        self.tensors["saved"][rows] = torch.cat(saved, 1)

    def backward(self, logits: Tensor, rows: slice, columns: slice) -> None:
        grad = self._gradient(logits, rows, columns)
        self.soft.backward(logits, rows, columns)
        logits += grad

    def overwrite(self, logits: Tensor, rows: slice) -> None:
        found, self.saved[rows] = self.hard.forward(logits, self._labels(rows))
        grad = self._gradient(logits, rows, slice(0, logits.shape[1]))
        self.soft.overwrite(logits, rows)
        self._add(found, rows)
        logits += grad

    def _labels(self, rows: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[rows]

    def _gradient(self, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        upstream = self.tensors["upstream"][rows]
        return self.hard.backward(logits, self._labels(rows), self.saved[rows], upstream, columns)

    def _add(self, found: Tensor, rows: slice) -> None:
        self.tensors["loss"][rows] = self.share * self.tensors["loss"][rows] + found


def _rows_of(call: Call, index: Tensor | None, **tensors: Tensor) -> _Rows | _RowsWithHard:
    hard = call.rows.hard
    if hard is None:
        return _Rows(call, index, **tensors)
    return _RowsWithHard(call, hard, index, **tensors)


def _tiles(call: Call, index: Tensor | None) -> linear.Tiles:
    head = call.head._replace(hidden=linear.select(call.head.hidden, index))
    return linear.Tiles(head, head.weight.shape[0], call.shard and call.shard.widest)


def _forward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, (loss, saved) = _call(args[:9], args[9:18], backend, shard), args[18:]
    with linear.plain(loss):
        index = linear.rows_where(call.rows.counted)
        part = linear.Selected(index, loss, saved)
        rows = _rows_of(call, index, loss=part.rows[0], saved=part.rows[1])
        linear.forward(_tiles(call, index), rows)
        part.put()


def _backward_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, out = _call(args[:9], args[11:20], backend, shard), linear.wanted(*args[20:])
    with linear.plain(args[9]):
        index = linear.rows_where(args[10] != 0)
        part = linear.Selected(index, out.hidden)
        saved, upstream = (linear.select(x, index) for x in args[9:11])
        rows = _rows_of(call, index, saved=saved, upstream=upstream)
        linear.backward(_tiles(call, index), rows, out._replace(hidden=part.rows[0]))
        part.put()


def _gradients_run(backend: str, *args: Any, shard: parallel.Shard | None = None) -> None:
    call, out = _call(args[:9], args[10:19], backend, shard), linear.wanted(*args[20:])
    with linear.plain(args[9]):
        index = linear.rows_where(call.rows.counted)
        part = linear.Selected(index, args[19], out.hidden)
        loss, upstream = part.rows[0], linear.select(args[9], index)
        saved = loss.new_empty((loss.shape[0], call.saved()))
        rows = _rows_of(call, index, loss=loss, saved=saved, upstream=upstream)
        linear.forward_backward(_tiles(call, index), rows, out._replace(hidden=part.rows[1]))
        part.put()


_registry.composed_kernel(
    OP,
    "linear_topk_divergence_fwd",
    f"({_TENSORS}, {_NUMBERS}, Tensor(a!) loss, Tensor(b!) saved) -> ()",
    _forward_reference,
    _forward_run,
    of="topk_divergence_fwd",
)
_registry.composed_kernel(
    OP,
    "linear_topk_divergence_bwd",
    f"({_TENSORS}, Tensor saved, Tensor grad_rows, {_NUMBERS}, {_GRADIENTS}) -> ()",
    _backward_reference,
    _backward_run,
    of="topk_divergence_bwd",
)
_registry.composed_kernel(
    OP,
    "linear_topk_divergence_gradients",
    f"({_TENSORS}, Tensor scale_rows, {_NUMBERS}, Tensor(d!) loss, {_GRADIENTS}) -> ()",
    _gradients_reference,
    _gradients_run,
    of="topk_divergence_overwrite",
)


def _loss_rows(call: Call) -> Tensor:
    """Row losses `[R]`, differentiable; raises for an id that a row names twice."""
    _check_ids(call.rows.ids)
    if call.backend == "reference" and call.shard is None:
        return _reference_rows(call.head, call.rows)[0]
    return autograd.rows(
        call.head, call.rows.counted, call.tensors(), call.numbers(), name=OP.name, outputs=1,
        saved=call.saved(), backend=call.backend, shard=call.shard,
    )[0]  # fmt: skip


def _check_ids(ids: Tensor) -> None:
    """Raises for an id that a row names twice, before the products are paid for."""
    if not _rows.values_readable(ids):
        return
    ordered = ids.sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise duplicate_ids(ids)
