"""The definition of `pydistill.topk_divergence`: divergences of a student's row from a teacher who
is known on a support S of K tokens only.

Plain torch, differentiable by autograd. A row is compared in *cells*: one for each token of S and,
where the tail counts, one more for all other tokens together. docs/ops/topk_divergence.md has the
formulas. The student's tail is a log-sum-exp over the complement of S, never 1 - Q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pydistill.reference.divergence import KINDS

TOPK_KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
# What kernels are told of a `tail`: whether there is a cell for it, and over what q is normalised.
WITH_TAIL, SUPPORT_ONLY, TRUNCATED = range(3)
TAILS = {
    "bucket": WITH_TAIL,  # the teacher's tail mass against the student's
    "zero": WITH_TAIL,  # a teacher who gives the tail nothing
    "renormalize": SUPPORT_ONLY,  # both sides conditioned on S
    "truncate": TRUNCATED,  # the sum over S, and nothing else
}

# Columns of the [R, SAVED] fp32 tensor that forward leaves for backward, in every backend.
SAVED = 7
MAX_S, OUTSIDE_MAX, LOG_Q_SCALE, CENTRE, CENTRE_LOW, OUTSIDE_SLOPE, STATUS = range(SAVED)
# STATUS of a row; every other than SOUND has a loss and a gradient of NaN.
SOUND, ID_OUT_OF_RANGE, ID_TWICE = range(3)


class Options(NamedTuple):
    """The scalars of a call. Per-row values in `params [R, 2]` (T, beta) win."""

    kind: int
    mode: int
    temperature: float
    beta: float
    scale_t2: bool


class Inputs(NamedTuple):
    """The tensors of a call, as every kernel takes them."""

    student: Tensor  # [R, V], unit last stride
    ids: Tensor  # int64 [R, K]; negative: an empty slot
    log_p: Tensor  # [R, K], of the teacher at the call's temperature; -inf in empty slots
    log_tail: Tensor | None  # [R], log of the teacher's tail mass; only WITH_TAIL
    counted: Tensor | None  # bool [R]
    params: Tensor | None


def topk_divergence_reference(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Row losses `[R]` and the rows' STATUS.

    fp32 for half inputs, else in the student's own precision. Raises nothing: rows that are not
    counted are 0; rows with an id or a parameter out of range, or an id twice, are NaN.
    """
    student, ids, log_p = inputs.student, inputs.ids, inputs.log_p
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, log_p = student.to(dtype), log_p.to(dtype)
    rows, vocab = student.shape
    temperature = torch.full((rows, 1), options.temperature, dtype=dtype, device=student.device)
    beta = torch.full_like(temperature, options.beta)
    if inputs.params is not None:
        temperature, beta = inputs.params.to(dtype)[:, :, None].unbind(1)
    present = ids >= 0
    outside = (ids >= vocab).any(-1)
    slots = torch.where(present & (ids < vocab), ids, vocab)
    times = torch.zeros(rows, vocab + 1, dtype=torch.int64, device=student.device)
    times = times.scatter_add(1, slots, torch.ones_like(slots))
    twice = (times[:, :vocab] > 1).any(-1)
    status = torch.where(outside, ID_OUT_OF_RANGE, torch.where(twice, ID_TWICE, SOUND))
    counted = inputs.counted if inputs.counted is not None else torch.ones_like(twice)
    bad = (status != SOUND) | ~parameters_valid(options.kind, temperature, beta).squeeze(-1)
    keep = (counted & ~bad)[:, None]
    given = student
    student = torch.where(keep, student, 0)
    temperature, beta = torch.where(keep, temperature, 1), torch.where(keep, beta, 0.5)

    z = student / temperature
    in_support = times[:, :vocab] > 0
    log_q = _masked(z.gather(1, torch.where(slots < vocab, slots, 0)), present, -math.inf)
    normaliser = torch.logsumexp(z, 1, keepdim=True)
    nothing = torch.zeros_like(twice)
    if options.mode == SUPPORT_ONLY:
        normaliser = _log_sum_exp(log_q)
        nothing = (normaliser == -math.inf).squeeze(1)  # to normalise
    log_q = log_q - torch.where(normaliser == -math.inf, 0, normaliser)
    log_p = _masked(log_p, present, -math.inf)
    if options.mode == WITH_TAIL and inputs.log_tail is not None:
        rest = _log_sum_exp(_masked(z, ~in_support, -math.inf)) - normaliser
        log_tail = inputs.log_tail.to(dtype)[:, None]
        log_tail = torch.where(in_support.all(1, keepdim=True), -math.inf, log_tail)  # no such cell
        log_q, log_p = torch.cat([log_q, rest], 1), torch.cat([log_p, log_tail], 1)
    value, infinite = _value(options, log_p, log_q, beta)
    undefined = nothing | torch.isnan(given).any(-1) | (given == math.inf).any(-1)
    undefined = (undefined | (given == -math.inf).all(-1) | torch.isnan(log_p).any(-1)) & counted
    loss = torch.where(infinite, math.inf, value)
    loss = loss * temperature.squeeze(-1) ** 2 if options.scale_t2 else loss
    loss = torch.where(bad | undefined, math.nan, loss)
    loss = torch.where(counted, loss, 0)
    no_slope = (bad | undefined | infinite) & counted
    squashed = torch.sigmoid(torch.where(no_slope[:, None], given, 0))  # a root has no slope at 0
    loss = loss + torch.where(no_slope, torch.sqrt((squashed * 0).sum(-1)), 0)
    return loss, status


def parameters_valid(kind: int, temperature: Tensor, beta: Tensor) -> Tensor:
    valid = (temperature > 0) & torch.isfinite(temperature)
    return valid & (beta > 0) & (beta < 1) if kind == KINDS["jsd"].id else valid


def _value(options: Options, log_p: Tensor, log_q: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """D summed over the cells, and whether it is +inf."""
    p, q = log_p.exp(), log_q.exp()
    no_q, no_p = (p > 0) & (log_q == -math.inf), (q > 0) & (log_p == -math.inf)
    log_p, log_q = _floored(log_p), _floored(log_q)
    d = log_p - log_q
    # The terms -p + q cancel where both sides are distributions, and keep the sum from cancelling.
    bregman = 0.0 if options.mode == TRUNCATED else 1.0
    never = torch.zeros_like(no_q[:, 0])
    if options.kind == KINDS["forward_kl"].id:
        return (_times(p, d) - bregman * (p - q)).sum(-1), no_q.any(-1)
    if options.kind == KINDS["reverse_kl"].id:
        return (_times(q, -d) - bregman * (q - p)).sum(-1), no_p.any(-1)
    if options.kind == KINDS["jsd"].id:
        log_m = torch.logaddexp(log_p + torch.log(beta), log_q + torch.log1p(-beta))
        terms = beta * _times(p, log_p - log_m) + (1 - beta) * _times(q, log_q - log_m)
        return terms.sum(-1), never
    return (p - q).abs().sum(-1) / 2, never


def _floored(x: Tensor, floor: float = -1e30) -> Tensor:
    """Logs not below `floor`, which stays finite in every formula; what is lifted to it keeps its
    slope."""
    slope = torch.where(x == -math.inf, 0, x)
    return torch.where(x < floor, floor + (slope - slope.detach()), x)


def _masked(x: Tensor, mask: Tensor, other: float) -> Tensor:
    return torch.where(mask, x, other)


def _log_sum_exp(x: Tensor) -> Tensor:
    """`[R, n]` -> `[R, 1]`, -inf (and no gradient) where all are -inf."""
    nothing = (x == -math.inf).all(-1, keepdim=True) if x.shape[-1] else x.new_ones((len(x), 1)) > 0
    safe = torch.where(nothing, torch.zeros((), dtype=x.dtype, device=x.device), x)
    if not x.shape[-1]:
        return x.new_full((len(x), 1), -math.inf)
    return torch.where(nothing, -math.inf, torch.logsumexp(safe, -1, keepdim=True))


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0, for the value and for the gradient."""
    zero = p == 0
    return torch.where(zero, 0, p * torch.where(zero, 0, x))
