"""The arguments of `pydistill.topk_divergence`, and those of `linear_topk_divergence` beside its
head: every check, and the form that kernels take.

Kernels see the teacher at the call's temperature: log p over the support (normalised there, where
the tail is dropped) and the log of its tail mass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.ops._divergence_call import hard_arguments
from pydistill.ops._topk_conventions import read_convention
from pydistill.ops._topk_teacher import TopkTeacher
from pydistill.ops._vocab_parallel import Shard
from pydistill.reference.divergence import KINDS
from pydistill.reference.hard_terms import Hard
from pydistill.reference.topk_divergence import (
    TAILS,
    TOPK_KINDS,
    WITH_TAIL,
    Inputs,
    Options,
)

OP = _registry.operator(
    "topk_divergence", {torch.float32, torch.bfloat16, torch.float16}, TOPK_KINDS
)


class Names(NamedTuple):
    """What a caller calls the arguments that a message is about."""

    function: str
    rows: str  # the tensor of the rows' prefix
    vocab: str  # the one with a token a row or column


_NAMES = Names("topk_divergence", "student_logits", "student_logits")


class Call(NamedTuple):
    """A checked call."""

    inputs: Inputs
    options: Options
    backend: str
    shape: tuple[int, ...]
    weight: Tensor | None
    reduction: str
    denominator: float | Tensor | None
    shard: Shard | None
    hard: Hard | None = None

    def reduce(self, loss: Tensor) -> Tensor:
        return _rows.reduce_rows(
            loss, self.weight, self.inputs.counted, self.reduction, self.denominator, self.shape
        )


def prepare(
    student_logits: Tensor,
    topk_logprobs: Tensor | TopkTeacher,
    topk_ids: Tensor | None,
    kind: str,
    tail: str | None,
    tail_logprob: Tensor | None,
    beta: float | Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | None,
    scale_t2: bool,
    weight: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weight: float,
    ignore_index: int,
    z_loss: float,
    reduction: str,
    denominator: float | Tensor | None,
    convention: str | None,
    impl: str,
    shard: Shard | None = None,
) -> Call:
    """Checks every argument and brings the call into the form that kernels take."""
    _rows.check_logits("student_logits", student_logits)
    _rows.check_reduction(reduction, denominator)
    backend = _registry.resolve(OP.name, impl, student_logits.device.type, student_logits.dtype)
    shape, vocab = tuple(student_logits.shape[:-1]), student_logits.shape[-1]
    vocab = vocab if shard is None else shard.total
    rows = row_arguments(
        topk_logprobs, topk_ids, kind, tail, tail_logprob, beta, temperature, teacher_temperature,
        scale_t2, weight, mask, labels, label_weight, ignore_index, z_loss, convention,
        vocab, shape, student_logits, _NAMES,
    )  # fmt: skip
    student = _rows.flatten(student_logits)
    inputs = Inputs(student, rows.ids, rows.log_p, rows.log_tail, rows.counted, rows.params)
    return Call(
        inputs, rows.options, backend, shape, rows.weight, reduction, denominator, shard, rows.hard
    )


class RowArguments(NamedTuple):
    """The checked arguments of a call that say what is done with its rows, wherever their logits
    come from."""

    options: Options
    ids: Tensor
    log_p: Tensor
    log_tail: Tensor | None
    counted: Tensor | None
    params: Tensor | None
    weight: Tensor | None
    hard: Hard | None = None


def row_arguments(
    topk_logprobs: Tensor | TopkTeacher,
    topk_ids: Tensor | None,
    kind: str,
    tail: str | None,
    tail_logprob: Tensor | None,
    beta: float | Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | None,
    scale_t2: bool,
    weight: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weight: float,
    ignore_index: int,
    z_loss: float,
    convention: str | None,
    vocab: int,
    shape: tuple[int, ...],
    like: Tensor,
    names: Names,
) -> RowArguments:
    """Checks what every row of the prefix `shape` is given; `like` has the call's device and
    dtype."""
    device = like.device
    if kind not in TOPK_KINDS:
        raise ValueError(
            f"kind={kind!r} is not defined on a support; use one of {', '.join(TOPK_KINDS)}."
        )
    kind, tail, beta, scale_t2 = read_convention(
        convention, kind, tail, beta, temperature, scale_t2
    )
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is not known; use one of {', '.join(TAILS)}.")
    if tail == "zero" and kind == "reverse_kl":
        raise ValueError(
            "kind='reverse_kl' is infinite with tail='zero', which gives the teacher nothing where"
            " the student has mass; use tail='bucket' or 'renormalize'."
        )
    if isinstance(topk_logprobs, TopkTeacher):
        given = (topk_ids, tail_logprob, teacher_temperature)
        teacher = _of_student(topk_logprobs, vocab, given, names)
        topk_logprobs, topk_ids = teacher.topk_logprobs, teacher.topk_ids
        tail_logprob = teacher.tail_logprob if tail == "bucket" else None
        teacher_temperature = teacher.temperature
    if teacher_temperature is None:
        teacher_temperature = 1.0
    log_p = _logprobs(topk_logprobs, shape, device, names)
    ids = _ids(topk_ids, topk_logprobs, vocab, device, names)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    options, params = _parameters(kind, tail, beta, temperature, shape, like)
    options = options._replace(scale_t2=bool(scale_t2))
    log_p, log_tail = _teacher(
        log_p,
        ids,
        tail,
        tail_logprob,
        temperature,
        teacher_temperature,
        shape,
        dtype,
        names,
    )
    mask = _rows.row_mask(mask, shape, device)
    weight = _rows.row_weight(weight, shape, device)
    labels, label_weight, z_loss = hard_arguments(
        labels, label_weight, ignore_index, z_loss, vocab, shape, device
    )
    counted = _rows.counted_rows(mask, weight, labels, ignore_index)
    hard = None
    if label_weight or z_loss:
        hard = Hard(labels if label_weight else None, label_weight, z_loss)
    return RowArguments(options, ids, log_p.contiguous(), log_tail, counted, params, weight, hard)


def _of_student(
    teacher: TopkTeacher, vocab: int, given: tuple[object, ...], names: Names
) -> TopkTeacher:
    """`teacher`, if it comes alone and is over the student's vocabulary."""
    for name, value in zip(("topk_ids", "tail_logprob", "teacher_temperature"), given, strict=True):
        if value is not None:
            raise ValueError(f"{name} is given beside a TopkTeacher, which has its own; drop it.")
    if teacher.vocab_size not in (None, vocab):
        raise ValueError(
            f"the teacher was recorded over {teacher.vocab_size} tokens, but {names.vocab} has"
            f" {vocab}; they must share the vocabulary. If the ids mean the same and only padding"
            " differs, pass teacher._replace(vocab_size=None)."
        )
    return teacher


def _logprobs(x: Tensor, prefix: tuple[int, ...], device: torch.device, names: Names) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"topk_logprobs is {got}; pass floating-point log-probabilities [..., K].")
    if x.ndim == 0 or tuple(x.shape[:-1]) != prefix:
        raise ValueError(
            f"topk_logprobs has shape {tuple(x.shape)}, {names.rows} the prefix {prefix}; pass"
            " [..., K] with the same prefix."
        )
    if x.requires_grad or _rows.has_tangent(x):
        raise ValueError(
            "topk_logprobs requires grad, but gradients flow to the student only; detach it."
        )
    _rows.check_device("topk_logprobs", x, device)
    return x.reshape(-1, x.shape[-1])


def _ids(
    ids: Tensor | None, like: Tensor, vocab: int, device: torch.device, names: Names
) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"topk_ids is {got}; pass int64 or int32 token ids (ids.long()).")
    if ids.shape != like.shape:
        raise ValueError(
            f"topk_ids has shape {tuple(ids.shape)} and topk_logprobs {tuple(like.shape)}; they"
            " must be equal."
        )
    _rows.check_device("topk_ids", ids, device)
    ids = ids.reshape(-1, ids.shape[-1]).long().contiguous()
    if _rows.values_readable(ids) and ids.numel():
        largest = int(ids.max())
        if largest >= vocab:
            raise ValueError(
                f"topk_ids holds {largest}, but {names.vocab} has {vocab} tokens; teacher and"
                " student must share the vocabulary (-1 marks an empty slot)."
            )
    return ids


def duplicate_ids(ids: Tensor) -> ValueError:
    """The error for `ids [R, K]` of which some row names a token twice."""
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    row, slot = (int(i) for i in twice.nonzero()[0])
    return ValueError(
        f"topk_ids names token {int(ordered[row, slot])} twice in row {row}; keep each token once"
        " (-1 marks an empty slot)."
    )


def _parameters(
    kind: str,
    tail: str,
    beta: float | Tensor | None,
    temperature: float | Tensor,
    shape: tuple[int, ...],
    student: Tensor,
) -> tuple[Options, Tensor | None]:
    if beta is not None and kind != "jsd":
        raise ValueError(f"beta is given, but kind={kind!r} does not use it; it belongs to jsd.")
    b = _rows.row_scalar("beta", 0.5 if beta is None else beta)
    _rows.check_range("beta", b, 0.0, 1.0, fix="its ends are forward_kl and reverse_kl.")
    t = _rows.row_scalar("temperature", temperature)
    _rows.check_range("temperature", t, 0.0, math.inf, fix="pass a positive, finite temperature.")
    if isinstance(t, Tensor) and tail in ("bucket", "truncate"):
        raise ValueError(
            f"temperature is a tensor, but tail={tail!r} needs the teacher's mass at each row's"
            " temperature; use tail='renormalize' or 'zero', or one number."
        )
    scalars = [1.0 if isinstance(v, Tensor) else v for v in (t, b)]
    options = Options(KINDS[kind].id, TAILS[tail], scalars[0], scalars[1], False)
    if not isinstance(t, Tensor) and not isinstance(b, Tensor):
        return options, None
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = [
        _rows.row_values(name, v.detach(), shape, student.device).to(dtype)
        if isinstance(v, Tensor)
        else torch.full((math.prod(shape),), v, dtype=dtype, device=student.device)
        for name, v in (("temperature", t), ("beta", b))
    ]
    return options, torch.stack(columns, dim=-1)


def _teacher(
    log_p: Tensor,
    ids: Tensor,
    tail: str,
    tail_logprob: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    names: Names,
) -> tuple[Tensor, Tensor | None]:
    """log p [R, K] and the log of the tail's mass [R], at the call's temperature."""
    _rows.check_range(
        "teacher_temperature", teacher_temperature, 0.0, math.inf, fix="pass a positive number."
    )
    same = not isinstance(temperature, Tensor) and temperature == teacher_temperature
    if not same and tail in ("bucket", "truncate"):
        raise ValueError(
            f"temperature={temperature:g}, but the teacher was recorded at"
            f" {teacher_temperature:g}, and its tail mass at another temperature cannot be known"
            f" from the top-k; use tail='renormalize' or 'zero', or record it at {temperature:g}."
        )
    if tail_logprob is not None and tail != "bucket":
        raise ValueError(f"tail_logprob is given, but tail={tail!r} does not use it; drop it.")
    log_p = torch.where(ids >= 0, log_p.double(), -math.inf)
    if tail in ("renormalize", "zero"):
        if not same:
            t = temperature
            if isinstance(t, Tensor):
                t = _rows.row_values("temperature", t.detach(), shape, log_p.device)[:, None]
            log_p = log_p * (teacher_temperature / t)
        return torch.log_softmax(log_p, -1).to(dtype), _nothing(log_p, tail, dtype)
    if tail == "truncate":
        return log_p.to(dtype), None
    if tail_logprob is not None:
        if not isinstance(tail_logprob, Tensor) or not tail_logprob.dtype.is_floating_point:
            got = getattr(tail_logprob, "dtype", type(tail_logprob).__name__)
            raise TypeError(f"tail_logprob is {got}; pass a floating-point tensor, one a row.")
        rows = _rows.row_values("tail_logprob", tail_logprob.detach(), shape, log_p.device)
        return log_p.to(dtype), rows.to(dtype).contiguous()
    mass = log_p.exp().sum(-1)
    if _rows.values_readable(mass) and bool((mass > 1 - 1e-6).any()):
        _rows.warn(
            f"pydistill.{names.function}: 1 minus the sum of the teacher's top-k probabilities is"
            f" below 1e-6 in {int((mass > 1 - 1e-6).sum())} rows, less than rounding of the"
            " log-probabilities leaves; pass the recorded tail_logprob.",
        )
    return log_p.to(dtype), torch.log1p(-mass.clamp(max=1)).to(dtype)


def _nothing(log_p: Tensor, tail: str, dtype: torch.dtype) -> Tensor | None:
    if TAILS[tail] != WITH_TAIL:
        return None
    empty = (log_p == -math.inf).all(-1)  # nothing to normalise, and no cell to say so
    return torch.where(empty, math.nan, -math.inf).to(dtype)
