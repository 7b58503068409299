"""The definition of `pydistill.divergence`: every kind written out from log p and log q, and the
row loss around it.

Plain torch, differentiable any number of times by autograd, no cleverness: a kernel that disagrees
is wrong. In fp64 it is the truth that tests compare with; in the inputs' precision it is what runs
where no kernel does.

Sums over a vocabulary follow 0 log 0 = 0. Kinds with detached weights (adaptive_kl, todi) detach
them here as well, so their gradient is the one their papers train with, not the derivative of the
value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """A divergence: its id in every kernel, and the defaults of the parameters it uses (None: does
    not use it)."""

    id: int
    alpha: float | None = None
    beta: float | None = None


KINDS: dict[str, Kind] = {
    "forward_kl": Kind(0),  # KL(p || q)
    "reverse_kl": Kind(1),  # KL(q || p)
    "jsd": Kind(2, beta=0.5),  # beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q
    "tvd": Kind(3),  # sum |p - q| / 2
    "skew_forward_kl": Kind(4, alpha=0.1),  # KL(p || alpha p + (1 - alpha) q)
    "skew_reverse_kl": Kind(5, alpha=0.1),  # KL(q || (1 - alpha) p + alpha q)
    "alpha_beta": Kind(6, alpha=0.2, beta=0.7),  # alpha-beta divergence of p from q
    "adaptive_kl": Kind(7),  # head/tail mix of the two KLs, weights detached
    "hellinger": Kind(8),  # sum (sqrt p - sqrt q)^2
    "chi2": Kind(9),  # sum (p - q)^2 / q, Pearson's chi^2(p || q)
    "todi": Kind(10),  # sum s p log(p/q) + (1 - s) q log(q/p), s = sigmoid(log p/q) detached
}
ADAPTIVE_HEAD_MASS = (
    0.5  # adaptive_kl: the head holds the teacher's most likely tokens up to this mass
)

# Columns of the [R, SAVED] fp32 tensor that forward leaves for backward, in every backend.
SAVED = 8
MAX_S, LOGZ_S, MAX_T, LOGZ_T, VALUE, CENTRE, LOGZ_1, HEAD = range(SAVED)
# Columns of the [R, STATS] fp32 tensor of `divergence_with_stats`.
STATS = 6
LSE_S, LSE_T, ENTROPY_S, ENTROPY_T, ACCEPTANCE, AGREE = range(STATS)


class Options(NamedTuple):
    """The scalars of a call, as every kernel takes them. Per-row values in `params [R, 3]` (T,
    alpha, beta) win."""

    kind: int
    temperature: float
    alpha: float
    beta: float
    scale_t2: bool
    label_weight: float
    z_loss: float
    vocab: int


class Inputs(NamedTuple):
    """The tensors of a call, as every kernel takes them; R pairs of rows."""

    student: Tensor  # [S, V_s], unit last stride
    teacher: Tensor  # [T, V_t]
    student_rows: Tensor | None  # [R]; None: pair i is row i
    teacher_rows: Tensor | None
    counted: Tensor | None  # bool [R]
    labels: Tensor | None  # int64 [R], only when label_weight > 0
    params: Tensor | None


def divergence_reference(
    inputs: Inputs, options: Options, *, with_stats: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition: row losses `[R]` and, if asked for, row statistics `[R, STATS]`, in plain
    differentiable torch.

    fp32 for half inputs, else in the inputs' own precision. Raises nothing: rows that are not
    counted are 0, rows with an index, label or parameter out of range are NaN.
    """
    student, teacher = inputs.student[:, : options.vocab], inputs.teacher[:, : options.vocab]
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    device = student.device
    student, bad_s = _gather(student.to(dtype), inputs.student_rows)
    teacher, bad_t = _gather(teacher.to(dtype), inputs.teacher_rows)
    rows = student.shape[0]
    if inputs.params is not None:
        temperature, alpha, beta = inputs.params.to(dtype)[:, :, None].unbind(1)
    else:
        scalars = torch.tensor(
            [options.temperature, options.alpha, options.beta], dtype=dtype, device=device
        )
        temperature, alpha, beta = scalars.expand(rows, 3)[:, :, None].unbind(1)
    bad = bad_s | bad_t | ~_parameters_valid(options.kind, temperature, alpha, beta).squeeze(-1)
    counted = inputs.counted if inputs.counted is not None else torch.ones_like(bad)
    keep, given = (counted & ~bad)[:, None], student
    student, teacher = torch.where(keep, student, 0), torch.where(keep, teacher, 0)
    temperature = torch.where(keep, temperature, 1)
    alpha, beta = torch.where(keep, alpha, 0.5), torch.where(keep, beta, 0.5)

    log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    value = _VALUE[options.kind](log_p, log_q, alpha, beta)
    infinite = _infinite(options.kind, log_p, log_q, alpha, beta)
    undefined = torch.isnan(log_p).any(-1) | torch.isnan(log_q).any(-1)
    if options.kind == KINDS["forward_kl"].id:
        value, no_slope = (
            value + torch.where(infinite, math.inf, 0.0),
            undefined,
        )  # slope stays q - p
    else:
        value, no_slope = torch.where(infinite, math.inf, value), undefined | infinite
    loss = value * temperature.squeeze(-1) ** 2 if options.scale_t2 else value
    if options.label_weight or options.z_loss:
        lse = torch.logsumexp(student, dim=-1)
        hard = lse * 0
        if inputs.labels is not None:
            labels = torch.where(keep.squeeze(-1), inputs.labels, 0)
            wrong = (labels < 0) | (labels >= options.vocab)
            bad = bad | wrong
            hard = lse - student.gather(1, torch.where(wrong, 0, labels)[:, None]).squeeze(-1)
        loss = (
            (1 - options.label_weight) * loss
            + options.label_weight * hard
            + options.z_loss * lse**2
        )
    loss = torch.where(bad | undefined, math.nan, loss)
    loss = torch.where(counted, loss, 0)
    loss = loss + _nan_gradient(given, (no_slope | bad) & ~bad_s & counted)
    if not with_stats:
        return loss, loss.new_empty((0, STATS))
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        stats = torch.stack(
            [
                torch.logsumexp(student / temperature, dim=-1),
                torch.logsumexp(teacher / temperature, dim=-1),
                -_times(q, log_q).sum(-1),
                -_times(p, log_p).sum(-1),
                torch.minimum(p, q).sum(-1),
                (student.argmax(-1) == teacher.argmax(-1)).to(dtype),
            ],
            dim=-1,
        )
        undefined = (~counted | bad | ~torch.isfinite(stats[:, LSE_S] + stats[:, LSE_T]))[:, None]
        return loss, torch.where(undefined, math.nan, stats)


def _gather(logits: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that `index` names, and where it is out of range."""
    if index is None:
        return logits, torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    bad = (index < 0) | (index >= logits.shape[0])
    return logits[torch.where(bad, 0, index)], bad


def _parameters_valid(kind: int, temperature: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    valid = (temperature > 0) & torch.isfinite(temperature)
    if kind == KINDS["jsd"].id:
        return valid & (beta > 0) & (beta < 1)
    if kind in (KINDS["skew_forward_kl"].id, KINDS["skew_reverse_kl"].id):
        return valid & (alpha > 0) & (alpha < 1)
    return valid & torch.isfinite(alpha) & torch.isfinite(beta)


def _infinite(kind: int, log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Rows whose D is +inf because exactly one side gives a token no probability at all."""
    no_q = ((log_q == -math.inf) & (log_p > -math.inf)).any(-1)
    no_p = ((log_p == -math.inf) & (log_q > -math.inf)).any(-1)
    name = next(k for k, spec in KINDS.items() if spec.id == kind)
    if name in ("forward_kl", "chi2"):
        return no_q
    if name == "reverse_kl":
        return no_p
    if name in ("adaptive_kl", "todi"):
        return no_q | no_p
    if name == "alpha_beta":
        a, b, s = alpha.squeeze(-1), beta.squeeze(-1), (alpha + beta).squeeze(-1)
        return (no_q & ((b <= 0) | (s <= 0))) | (no_p & ((a <= 0) | (s <= 0)))
    return torch.zeros_like(no_q)


def _nan_gradient(student: Tensor, rows: Tensor) -> Tensor:
    """0 a row, with a NaN gradient for the whole of each of `rows` (a square root has no slope at
    0)."""
    squashed = torch.sigmoid(torch.where(rows[:, None], student, 0))
    return torch.where(rows, torch.sqrt((squashed * 0).sum(-1)), 0)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0, for the value and for the gradient."""
    zero = p == 0
    return torch.where(zero, 0, p * torch.where(zero, 0, x))


def _finite_pair(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q with infinities replaced by a floor that exp takes to 0, and d = log p - log
    q (0 if both are)."""
    floor = -1e30
    log_p, log_q = log_p.clamp(min=floor), log_q.clamp(min=floor)
    return log_p, log_q, log_p - log_q


def _forward_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _times(log_p.exp(), log_p - log_q).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _times(log_q.exp(), log_q - log_p).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, share_of_p: Tensor) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + torch.log(share_of_p), log_q + torch.log1p(-share_of_p))


def _jsd(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_p, log_q, _ = _finite_pair(log_p, log_q)
    log_m = _mixture(log_p, log_q, beta)
    return (beta * _times(p, log_p - log_m) + (1 - beta) * _times(q, log_q - log_m)).sum(-1)


def _tvd(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    p = log_p.exp()
    log_p, log_q, _ = _finite_pair(log_p, log_q)
    return _times(p, log_p - _mixture(log_p, log_q, alpha)).sum(-1)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    q = log_q.exp()
    log_p, log_q, _ = _finite_pair(log_p, log_q)
    return _times(q, log_q - _mixture(log_p, log_q, 1 - alpha)).sum(-1)


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Cichocki et al. 2011, eq. 20 with its limits; ABKD (arXiv 2505.04560) names alpha and beta
    this way round."""
    present = (log_p != -math.inf) | (log_q != -math.inf)
    log_p, log_q, d = _finite_pair(log_p, log_q)
    log_p, log_q = torch.where(present, log_p, 0), torch.where(present, log_q, 0)
    total = alpha + beta
    a0, b0, s0 = alpha == 0, beta == 0, total == 0
    a, b = torch.where(a0, 1, alpha), torch.where(b0, 1, beta)
    s = torch.where(s0, 1, total)
    p_s, q_s = torch.exp(s * log_p), torch.exp(s * log_q)
    general = -(torch.exp(a * log_p + b * log_q) - a / s * p_s - b / s * q_s) / (a * b)
    p_a, q_b = torch.exp(a * log_p), torch.exp(b * log_q)
    at_b0 = (_times(p_a, a * d) - p_a + torch.exp(a * log_q)) / a**2
    at_a0 = (_times(q_b, -b * d) - q_b + torch.exp(b * log_p)) / b**2
    d_s0 = torch.where(s0, d, 0)  # elsewhere exp would overflow, and its slope spoil the gradient
    at_s0 = (-a * d_s0 + torch.exp(a * d_s0) - 1) / a**2
    at_origin = d**2 / 2
    term = torch.where(s0, torch.where(a0, at_origin, at_s0), general)
    term = torch.where(b0 & ~s0, at_b0, torch.where(a0 & ~s0, at_a0, term))
    return torch.where(present, term, 0).sum(-1)


def _adaptive_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Wu et al. 2024 (arXiv 2404.02657): the KLs weighted by the error on the teacher's head and on
    its tail.

    The head is the most likely token and every following one (ties in token order) while the mass
    up to and with it is at most 1/2. Identical rows weigh both KLs equally.
    """
    with torch.no_grad():
        p, q = log_p.detach().exp(), log_q.detach().exp()  # no_grad alone lets tangents through
        sorted_p, order = torch.sort(p, dim=-1, descending=True, stable=True)
        head = torch.cumsum(sorted_p, dim=-1) <= ADAPTIVE_HEAD_MASS
        head[:, :1] = True
        error = (sorted_p - q.gather(-1, order)).abs()
        head_error, total = _times(head.to(p.dtype), error).sum(-1), error.sum(-1)
        share = torch.where(total == 0, 0.5, head_error / torch.where(total == 0, 1, total))
    return share * _forward_kl(log_p, log_q, alpha, beta) + (1 - share) * _reverse_kl(
        log_p, log_q, alpha, beta
    )


def _hellinger(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def _chi2(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    absent = log_p == -math.inf
    p_ratio = torch.exp(torch.where(absent, 0, 2 * log_p - log_q))  # p^2 / q
    return (torch.where(absent, 0, p_ratio) - 2 * p + q).sum(-1)


def _todi(log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Jung et al. 2025 (arXiv 2505.16297)."""
    p, q = log_p.exp(), log_q.exp()
    _, _, d = _finite_pair(log_p, log_q)
    share = torch.sigmoid(d).detach()
    return (share * _times(p, d) - (1 - share) * _times(q, d)).sum(-1)


_VALUE: dict[int, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    spec.id: globals()[f"_{name}"] for name, spec in KINDS.items()
}
