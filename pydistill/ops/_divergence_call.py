"""The arguments of `pydistill.divergence`: every check, and the form that kernels take.

Errors name the offending value and the fix. Values of tensors (temperatures, labels, row indices)
are read only where that is free, in eager calls on the CPU; elsewhere the kernels flag the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.ops._conventions import find_convention
from pydistill.ops._vocab_parallel import Shard
from pydistill.reference.divergence import KINDS, Inputs, Options

OP = _registry.operator("divergence", {torch.float32, torch.bfloat16, torch.float16}, KINDS)


class Call(NamedTuple):
    """A checked call."""

    inputs: Inputs
    options: Options
    backend: str
    shape: tuple[int, ...]
    weight: Tensor | None
    reduction: str
    denominator: float | Tensor | None
    soft_cross_entropy: bool
    shard: Shard | None

    def reduce(self, loss: Tensor) -> Tensor:
        return _rows.reduce_rows(
            loss, self.weight, self.inputs.counted, self.reduction, self.denominator, self.shape
        )


def prepare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str,
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
    student_rows: Tensor | None,
    teacher_rows: Tensor | None,
    vocab: str,
    convention: str | None,
    impl: str,
    shard: Shard | None = None,
) -> Call:
    """Checks every argument and brings the call into the form that kernels take."""
    _rows.check_logits("student_logits", student_logits)
    _rows.check_logits("teacher_logits", teacher_logits)
    device = student_logits.device
    _rows.check_device("teacher_logits", teacher_logits, device)
    if teacher_logits.requires_grad:
        raise ValueError(
            "teacher_logits requires grad, but gradients flow to the student only; detach it."
        )
    _rows.check_reduction(reduction, denominator)
    backend = _registry.resolve(OP.name, impl, device.type, student_logits.dtype)
    if backend != "reference" and teacher_logits.dtype not in OP.dtypes:
        raise TypeError(
            f"teacher_logits has dtype {teacher_logits.dtype}; cast it, or pass impl='reference'."
        )
    vocab_size = common_vocab("logits", student_logits.shape[-1], teacher_logits.shape[-1], vocab)
    vocab_size = vocab_size if shard is None else shard.total
    shape, rows_s, rows_t = _pairs(student_logits, teacher_logits, student_rows, teacher_rows)
    rows = row_arguments(
        kind, beta, alpha, temperature, scale_t2, weight, mask, labels, label_weight, ignore_index,
        z_loss, convention, vocab_size, shape, student_logits,
    )  # fmt: skip
    inputs = Inputs(
        _rows.flatten(student_logits),
        _rows.flatten(teacher_logits),
        rows_s,
        rows_t,
        rows.counted,
        rows.labels,
        rows.params,
    )
    return Call(
        inputs, rows.options, backend, shape, rows.weight, reduction, denominator,
        rows.soft_cross_entropy, shard,
    )  # fmt: skip


class RowArguments(NamedTuple):
    """The checked arguments of a call that say what is done with its rows, wherever their logits
    come from."""

    options: Options
    counted: Tensor | None
    labels: Tensor | None
    params: Tensor | None
    weight: Tensor | None
    soft_cross_entropy: bool


def row_arguments(
    kind: str,
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
    convention: str | None,
    vocab_size: int,
    shape: tuple[int, ...],
    like: Tensor,
) -> RowArguments:
    """Checks what every row of the prefix `shape` is given; `like` has the call's device and
    dtype."""
    device = like.device
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}.")
    rule = find_convention(convention, kind)
    kind, alpha, beta, scale_t2 = rule.apply(kind, alpha, beta, scale_t2)
    options, params = _parameters(kind, temperature, alpha, beta, shape, like)
    labels, label_weight, z_loss = hard_arguments(
        labels, label_weight, ignore_index, z_loss, vocab_size, shape, device
    )
    mask = _rows.row_mask(mask, shape, device)
    weight = _rows.row_weight(weight, shape, device)
    counted = _rows.counted_rows(mask, weight, labels, ignore_index)
    options = options._replace(
        scale_t2=scale_t2, label_weight=label_weight, z_loss=z_loss, vocab=vocab_size
    )
    labels = labels if label_weight > 0.0 else None
    return RowArguments(options, counted, labels, params, weight, rule.soft_cross_entropy)


def hard_arguments(
    labels: Tensor | None,
    label_weight: float,
    ignore_index: int,
    z_loss: float,
    vocab_size: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor | None, float, float]:
    """Checked labels `[R]`, label_weight and z_loss."""
    label_weight, z_loss = _number("label_weight", label_weight), _number("z_loss", z_loss)
    if not 0.0 <= label_weight <= 1.0:
        raise ValueError(
            f"label_weight={label_weight} is outside [0, 1]; it is the share of cross-entropy."
        )
    if label_weight > 0.0 and labels is None:
        raise ValueError(f"label_weight={label_weight} needs labels; pass int64 labels, one a row.")
    return _labels(labels, ignore_index, vocab_size, shape, device), label_weight, z_loss


def _number(name: str, value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not -math.inf < value < math.inf
    ):
        raise TypeError(f"{name} is {value!r}; pass a finite number.")
    return float(value)


def common_vocab(what: str, v_s: int, v_t: int, vocab: str) -> int:
    """How many tokens of the student's V_s and the teacher's V_t are compared; `what` has that
    size."""
    if vocab not in ("equal", "min"):
        raise ValueError(f"vocab={vocab!r} is not known; use 'equal' or 'min'.")
    if v_s != v_t and vocab == "equal":
        raise ValueError(
            f"student_{what} has {v_s} tokens and teacher_{what} {v_t}; pass vocab='min' to"
            f" compare the first {min(v_s, v_t)}, if both tokenizers share them."
        )
    return min(v_s, v_t)


def _pairs(
    student: Tensor, teacher: Tensor, student_rows: Tensor | None, teacher_rows: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
    """The result's shape and the two checked row indices."""
    prefix_s, prefix_t = tuple(student.shape[:-1]), tuple(teacher.shape[:-1])
    count_s, count_t = math.prod(prefix_s), math.prod(prefix_t)
    rows_s = _rows.row_index("student_rows", student_rows, count_s, student.device)
    rows_t = _rows.row_index("teacher_rows", teacher_rows, count_t, student.device)
    if rows_s is None and rows_t is None:
        if prefix_s != prefix_t:
            raise ValueError(
                f"student_logits has prefix {prefix_s} and teacher_logits {prefix_t}; make them"
                " equal or name the"
                " pairs with student_rows and teacher_rows."
            )
        return prefix_s, None, None
    size_s = count_s if rows_s is None else rows_s.shape[0]
    size_t = count_t if rows_t is None else rows_t.shape[0]
    if size_s != size_t:
        raise ValueError(
            f"the student's side has {size_s} rows and the teacher's {size_t}; they pair one to"
            " one."
        )
    return (size_s,), rows_s, rows_t


def _parameters(
    kind: str,
    temperature: float | Tensor,
    alpha: float | Tensor | None,
    beta: float | Tensor | None,
    shape: tuple[int, ...],
    student: Tensor,
) -> tuple[Options, Tensor | None]:
    """The kind's id and parameters: scalars in `Options`, and `params [R, 3]` if any of them is a
    tensor."""
    spec = KINDS[kind]
    values: list[float | Tensor] = []
    for name, given, default in (("alpha", alpha, spec.alpha), ("beta", beta, spec.beta)):
        if given is not None and default is None:
            users = ", ".join(k for k, s in KINDS.items() if getattr(s, name) is not None)
            raise ValueError(
                f"{name} is given, but kind={kind!r} does not use it; it belongs to {users}."
            )
        value = _rows.row_scalar(name, given) if given is not None else (default or 0.0)
        if default is not None:
            low, high = (-math.inf, math.inf) if kind == "alpha_beta" else (0.0, 1.0)
            fix = "" if kind == "alpha_beta" else "its ends are forward_kl and reverse_kl."
            _rows.check_range(name, value, low, high, fix=fix)
        values.append(value)
    temperature = _rows.row_scalar("temperature", temperature)
    _rows.check_range(
        "temperature", temperature, 0.0, math.inf, fix="pass a positive, finite temperature."
    )
    values.insert(0, temperature)
    scalars = [1.0 if isinstance(v, Tensor) else v for v in values]
    options = Options(spec.id, scalars[0], scalars[1], scalars[2], False, 0.0, 0.0, 0)
    if not any(isinstance(v, Tensor) for v in values):
        return options, None
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = []
    for name, v in zip(("temperature", "alpha", "beta"), values, strict=True):
        if isinstance(v, Tensor):
            columns.append(_rows.row_values(name, v.detach(), shape, student.device).to(dtype))
        else:
            columns.append(torch.full((math.prod(shape),), v, dtype=dtype, device=student.device))
    return options, torch.stack(columns, dim=-1)


def _labels(
    labels: Tensor | None,
    ignore_index: int,
    vocab: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels is {got}; pass int64 token ids (labels.long()).")
    labels = _rows.row_values("labels", labels, shape, device)
    if _rows.values_readable(labels):
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
        if bool(wrong.any()):
            raise ValueError(
                f"labels holds {int(labels[wrong][0])}, which is neither a token id below {vocab}"
                " nor"
                f" ignore_index={ignore_index}; mask it or set ignore_index."
            )
    return labels.contiguous()
