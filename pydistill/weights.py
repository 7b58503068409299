"""Weights, masks and temperatures that say how much a problem, a segment or a token counts.

    pass_rate, pass_rate_weight      w(p) = p^a (1 - p)^b of a problem solved in c of n samples
    step_weight                      min((d_1 + eps) / (d_k + eps), 1 + delta) of segment k
    segment_ratio                    geometric mean of p_T / p_S over a segment
    entropy, entropy_gap_weight      H of logits; sigmoid(H_S - H_T)
    entropy_temperature              tau with H(tau) = H + 0.5 sigmoid(2 (H - 1.2)), by bisection
    opener_mask, top_entropy_mask    tokens of the first share, and of the top share, of entropy
    margin_calibrate                 advantages whose correct samples lead by a margin

Every result is a constant: inputs are detached, so a weight never carries a gradient. Inputs are
fp64, fp32, bf16 or fp16; results are fp32, or fp64 if an input is (masks are bool). Sequences are
the last dimension, under any leading shape; `mask` is True where an element counts. What does not
count is never read, and gets weight 0 (mask False, temperature 1). NaN stays within its sequence.
docs/weights.md has the sources and limits.

TypeError names a wrong type or dtype, ValueError a wrong shape, device or value. Elements are
checked in eager calls on a CPU; under compile and on a GPU, where reading them would stall, what a
bad one reaches is NaN (mask False).

Sums over a sequence run in fp64: they are small beside one row of logits, and an order of addition
that varies (`scatter_add_` on a GPU) then does not show in fp32. Only `entropy` and
`entropy_temperature` touch logits; they do so in fp32, in blocks of rows that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ROUNDING = 1e-3  # nats by which another's log-probability may exceed 0, or entropy miss it
BLOCK = 1 << 20  # logits in fp32 at once, 4 MB


def pass_rate(
    correct: Tensor, samples: Tensor | int, *, prior: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Pass rate (c + a0) / (n + a0 + b0): its posterior mean under the prior Beta(a0, b0).

    With prior (0, 0) it is c / n, unbiased for every fixed p. With any other it is unbiased only on
    average over problems whose p follows the prior; at one p it is off by
    (a0 - (a0 + b0) p) / (n + a0 + b0), and n = 0 gives the prior's mean a0 / (a0 + b0).

    Args:
        correct: integers c `[...]`, 0 <= c <= n. samples: n, an int or integers `[...]`.
        prior: (a0, b0), both >= 0; (1, 1) is Laplace's rule.

    Returns: fp32 `[...]`. Raises ValueError for n = 0 under prior (0, 0).
    """
    return _pass_rate(*_counts(correct, samples), prior).float()


def pass_rate_weight(
    correct: Tensor,
    samples: Tensor | int,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    prior: tuple[float, float] = (1.0, 1.0),
    estimator: str = "plugin",
) -> Tensor:
    """w(p) = p^alpha (1 - p)^beta from c correct of n samples (Paced, arXiv 2603.11178).

    w of an unbiased p is not unbiased, so `estimator` says what is meant:
        "plugin"     w at `pass_rate(correct, samples, prior=prior)`. Biased, also under prior
                     (0, 0): for alpha = beta = 1 its mean is then p (1 - p) (1 - 1 / n).
        "posterior"  E[w(p) | c] = B(c + a0 + alpha, n - c + b0 + beta) / B(c + a0, n - c + b0)
                     under the prior, a0 and b0 > 0; unbiased on average over that prior.
        "unbiased"   (c)_alpha (n - c)_beta / (n)_(alpha + beta), falling factorials: the
                     minimum-variance estimator unbiased for every p (Lehmann-Scheffe). Integer
                     exponents, n >= alpha + beta; reads no prior; 0 if c < alpha or n - c < beta.

    `correct`, `samples`, `prior` and the result as in `pass_rate`; exponents >= 0, 0^0 is 1.
    """
    alpha, beta = _number("alpha", alpha, 0), _number("beta", beta, 0)
    c, n = _counts(correct, samples)
    if estimator == "plugin":
        p = _pass_rate(c, n, prior)
        return (p**alpha * (1 - p) ** beta).float()
    if estimator == "posterior":
        a0, b0 = _prior(prior)
        if a0 == 0 or b0 == 0:
            raise ValueError(f'prior={prior} is improper; "posterior" needs both numbers > 0.')
        posterior = _log_beta(c + a0 + alpha, n - c + b0 + beta)
        return (posterior - _log_beta(c + a0, n - c + b0)).exp().float()
    if estimator != "unbiased":
        raise ValueError(f"estimator={estimator!r} is not known; use plugin, posterior, unbiased.")
    if alpha % 1 or beta % 1:
        raise ValueError(f'alpha={alpha:g}, beta={beta:g} must be integers; use "posterior".')
    degree = int(alpha + beta)
    n = _checked(n, n < degree, "samples", f'pass n >= alpha + beta = {degree} for "unbiased"')
    factors = [c - i for i in range(int(alpha))] + [n - c - i for i in range(int(beta))]
    weight = torch.ones_like(c)
    for i, factor in enumerate(factors):
        weight = weight * factor.clamp_min(0) / (n - i)
    return weight.float()


def step_weight(
    teacher_logprob: Tensor,
    student_logprob: Tensor,
    segments: Tensor,
    *,
    delta: float,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """w_k = min((d_1 + eps) / (d_k + eps), 1 + delta) at every token of segment k, where d_k is the
    segment's mean |log p_T - log p_S| (step-wise on-policy distillation, arXiv 2605.07725).

    Segments from the first that counts a token are k = 1, 2, ...; one without such a token is
    passed over. Equal d give exactly 1, infinite ones included: a token that one side alone
    excludes makes d infinite. Where both exclude it the difference is 0.

    Args:
        teacher_logprob, student_logprob: `[..., T]`, log-probabilities of the tokens, <= 0.
        segments: integers `[..., T]` below T, numbered in the order of the steps; negative where a
            token belongs to none (prompts, tool outputs).
        delta: >= 0, how far a weight may exceed 1. eps: > 0, in nats. mask: bool `[..., T]`.

    Returns: `[..., T]`, 0 where no segment counts the token.
    """
    delta, eps = _number("delta", delta, 0), _number("eps", eps, 0, open_low=True)
    ratio, index, counted = _log_ratio(teacher_logprob, student_logprob, segments, mask)
    if index.shape[-1] == 0:
        return _like(ratio, teacher_logprob, student_logprob)
    d = _segment_mean(ratio.abs(), index, counted)
    first = index.masked_fill(~counted, index.shape[-1] - 1).amin(-1, keepdim=True)
    # The first segment's mean is that of any of its tokens: the largest over them picks one.
    d_1 = d.masked_fill(index != first, 0).amax(-1, keepdim=True)
    weight = torch.where(d == d_1, 1.0, (d_1 + eps) / (d + eps)).clamp_max(1 + delta)
    return _like(weight.masked_fill(~counted, 0), teacher_logprob, student_logprob)


def segment_ratio(
    teacher_logprob: Tensor,
    student_logprob: Tensor,
    segments: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """exp(mean over the segment of log p_T - log p_S) at every token: the segment's likelihood
    ratio per token, as GSPO's sequence ratio (arXiv 2507.18071) with the teacher above.

    A token that the teacher alone excludes makes its segment 0, one that the student alone excludes
    +inf, both kinds together NaN; excluded by both it counts as ratio 1. A mean above 88 nats is
    +inf in fp32. Arguments and result as in `step_weight`.
    """
    ratio, index, counted = _log_ratio(teacher_logprob, student_logprob, segments, mask)
    weight = _segment_mean(ratio, index, counted).exp().masked_fill(~counted, 0)
    return _like(weight, teacher_logprob, student_logprob)


def entropy(logits: Tensor) -> Tensor:
    """H = -sum p log p in nats of softmax(logits) `[..., V]`: `[...]`, 0 <= H <= log V.

    -inf marks a token that cannot occur. A row with NaN, +inf or nothing but -inf is NaN.
    `divergence_with_stats` gives both sides' entropies at no cost where a loss is computed anyway.
    """
    return _by_rows(_row_entropy, logits)


def entropy_gap_weight(
    student_entropy: Tensor, teacher_entropy: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """sigmoid(H_S - H_T), elementwise: above 1/2 where the student is less sure than the teacher.

    Entropies in nats >= 0 and mask have one shape `[...]`, the result's.
    """
    _float("student_entropy", student_entropy)
    _float("teacher_entropy", teacher_entropy, like=student_entropy)
    counted = _counted(mask, student_entropy)
    h_s = _entropies("student_entropy", student_entropy, counted)
    h_t = _entropies("teacher_entropy", teacher_entropy, counted)
    return _like((h_s - h_t).sigmoid().masked_fill(~counted, 0), student_entropy, teacher_entropy)


def entropy_temperature(
    logits: Tensor,
    *,
    gain: float = 0.5,
    slope: float = 2.0,
    center: float = 1.2,
    low: float = 1.1,
    high: float = 1.5,
    iterations: int = 20,
    mask: Tensor | None = None,
) -> Tensor:
    """The temperature tau of each row at which the entropy of softmax(logits / tau) is
    H + gain sigmoid(slope (H - center)), with H the entropy at temperature 1.

    H(tau) never falls as tau rises (its derivative is Var(z) / tau^3), so bisection finds the one
    solution in [low, high]. A target below H(low) gives exactly `low`; one above H(high), as of a
    uniform or one-hot row, exactly `high`. In between, tau is within (high - low) / 2^(iterations
    + 1), 2e-7 by default, of a root of H as computed, which fp32 gives to about 1e-6.

    Args:
        logits: `[..., V]`, as in `entropy`. gain, slope, center: numbers; gain >= 0, in nats.
        low, high: 0.1 <= low < high <= 10. mask: bool `[...]`.
        iterations: 1 to 60, one pass over the logits each.

    Returns: `[...]`; 1 where the mask is False, NaN where `entropy` is.
    """
    gain, slope = _number("gain", gain, 0), _number("slope", slope)
    center, low = _number("center", center), _number("low", low, 0.1, 10)
    high = _number("high", high, low, 10, open_low=True)
    if type(iterations) is not int or not 1 <= iterations <= 60:
        raise ValueError(f"iterations={iterations!r} is not an int from 1 to 60; pass 20, say.")

    def solve(rows: Tensor) -> Tensor:
        h = _row_entropy(rows)
        target = h + gain * torch.sigmoid(slope * (h - center))
        below, above = torch.full_like(h, low), torch.full_like(h, high)
        under, over = target <= _row_entropy(rows, below), target > _row_entropy(rows, above)
        for _ in range(iterations):
            middle = (below + above) / 2
            rise = _row_entropy(rows, middle) < target
            below, above = torch.where(rise, middle, below), torch.where(rise, above, middle)
        tau = ((below + above) / 2).masked_fill(under, low).masked_fill(over, high)
        return tau.masked_fill(h.isnan(), math.nan)

    tau = _by_rows(solve, logits)
    return tau if mask is None else tau.masked_fill(~_counted(mask, tau), 1)


def opener_mask(entropy: Tensor, *, share: float = 0.1, mask: Tensor | None = None) -> Tensor:
    """The first tokens of a sequence, up to and with the one at which the running sum of entropy
    reaches `share` of the sequence's total.

    A common scale (H / log V) leaves it unchanged. A tie within rounding may fall either way.

    Args:
        entropy: nats >= 0 `[..., T]`. mask: bool `[..., T]`.
        share: in (0, 1]; 1 ends at the last token with entropy.

    Returns: bool `[..., T]`; False in a row with no entropy at all, or a NaN.
    """
    share = _number("share", share, 0, 1, open_low=True)
    counted = _counted(mask, _sequence("entropy", entropy))
    running = _entropies("entropy", entropy, counted).cumsum(-1)
    before = torch.cat([torch.zeros_like(running[..., :1]), running[..., :-1]], -1)
    return counted & (before < share * running[..., -1:])


def top_entropy_mask(
    entropy: Tensor, fraction: float = 0.2, *, mask: Tensor | None = None
) -> Tensor:
    """Tokens whose entropy is at least the (1 - fraction) quantile of their sequence's, linearly
    interpolated as by `torch.quantile` (Beyond the 80/20 Rule, arXiv 2506.01939).

    That keeps floor(fraction (n - 1)) + 1 of n tokens, and all that tie with the last one kept. For
    the quantile of a batch, as in that paper, flatten: `top_entropy_mask(h.flatten(), 0.2,
    mask=m.flatten()).view_as(h)`.

    Entropies in nats >= 0, mask and the bool result are `[..., T]`; fraction is in (0, 1]. A row
    with a NaN is False.
    """
    fraction = _number("fraction", fraction, 0, 1, open_low=True)
    counted = _counted(mask, _sequence("entropy", entropy))
    if entropy.shape[-1] == 0:
        return counted
    h = _entropies("entropy", entropy, counted)
    last = (counted.sum(-1, keepdim=True) - 1).clamp_min(0)
    # No value lies between the quantile and the next one kept, so a rank stands for it; 1e-9 keeps
    # products like 0.29 * 100 = 28.999999999999996 from losing a token.
    kept = (fraction * last.double() + 1e-9).floor().long()
    ranked = h.sort(-1, descending=True).values  # what does not count is 0, so it comes last
    clean = ~h.isnan().any(-1, keepdim=True)
    return counted & clean & (h >= ranked.gather(-1, kept))


def margin_calibrate(
    advantages: Tensor, correct: Tensor, delta: float, *, mask: Tensor | None = None
) -> Tensor:
    """Group advantages shifted so that the mean of the correct samples exceeds the mean of the
    incorrect ones by at least `delta`.

    If the lead g is short by s = delta - g > 0, the n_c correct samples gain s n_i / n and the n_i
    incorrect ones lose s n_c / n: the group's mean and all differences within a kind stay. A group
    that leads by delta already, or has one kind only, is returned as it is.

    Args:
        advantages: `[..., G]`, one group a row. correct, mask: bool `[..., G]`. delta: >= 0.

    Returns: `[..., G]`; 0 where there is no sample, NaN throughout a mixed group with a NaN.
    """
    delta = _number("delta", delta, 0)
    counted = _counted(mask, _sequence("advantages", advantages))
    _tensor("correct", correct, (torch.bool,), "a bool tensor, True where correct", advantages)
    right, wrong = counted & correct, counted & ~correct
    a = advantages.detach().double()
    n_c, n_i = (kind.sum(-1, keepdim=True) for kind in (right, wrong))
    mean_c = a.masked_fill(~right, 0).sum(-1, keepdim=True) / n_c
    mean_i = a.masked_fill(~wrong, 0).sum(-1, keepdim=True) / n_i
    short = (delta - (mean_c - mean_i)).clamp_min(0).masked_fill((n_c == 0) | (n_i == 0), 0)
    shift = short * torch.where(right, n_i, -n_c) / (n_c + n_i)
    return _like((a + shift).masked_fill(~counted, 0), advantages)


def _counts(correct: Tensor, samples: Tensor | int) -> tuple[Tensor, Tensor]:
    """c and n in fp64, checked."""
    _tensor("correct", correct, INTEGERS, "an integer tensor of correct samples")
    if type(samples) is not int:
        _tensor("samples", samples, INTEGERS, "an int or an integer tensor", like=correct)
    c = correct.double()
    n = torch.zeros_like(c) + samples
    n = _checked(n, n < 0, "samples", "pass n >= 0")
    return _checked(c, (c < 0) | (c > n), "correct", "pass 0 <= correct <= samples"), n


def _prior(prior: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(prior, tuple) or len(prior) != 2:
        raise TypeError(f"prior={prior!r} is not a pair; pass (a0, b0), such as (1.0, 1.0).")
    return _number("prior[0]", prior[0], 0), _number("prior[1]", prior[1], 0)


def _pass_rate(c: Tensor, n: Tensor, prior: tuple[float, float]) -> Tensor:
    a0, b0 = _prior(prior)
    total = n + a0 + b0
    return (c + a0) / _checked(total, total == 0, "samples + prior", "sample, or give a prior > 0")


def _log_beta(x: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)


def _log_ratio(
    teacher: Tensor, student: Tensor, segments: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p_T - log p_S in fp64 with 0 where not counted, segment index >= 0, counted."""
    _sequence("teacher_logprob", teacher)
    _float("student_logprob", student, like=teacher)
    _tensor("segments", segments, INTEGERS, "an integer tensor", like=teacher)
    counted = _counted(mask, teacher) & (segments >= 0)
    log_p, log_q = (x.detach().double().masked_fill(~counted, 0) for x in (teacher, student))
    log_p = _checked(log_p, log_p > ROUNDING, "teacher_logprob", "pass log-probabilities, <= 0")
    log_q = _checked(log_q, log_q > ROUNDING, "student_logprob", "pass log-probabilities, <= 0")
    length = segments.shape[-1]
    index = segments.long().masked_fill(~counted, 0)
    beyond = index >= length
    _checked(index.double(), beyond, "segments", f"number them from 0 to {length - 1}, T - 1")
    ratio = (log_p - log_q).masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0)
    # Reached only where values cannot be read: such a token must not be taken for another's.
    ratio = ratio.masked_fill(beyond.any(-1, keepdim=True), math.nan)
    return ratio, index.clamp_max(max(length - 1, 0)), counted


def _segment_mean(values: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted tokens of each token's segment; values are 0 where not counted, and the
    mean there may be anything."""
    total = torch.zeros_like(values).scatter_add_(-1, index, values)
    number = torch.zeros_like(values).scatter_add_(-1, index, counted.to(values.dtype))
    return (total / number).gather(-1, index)


def _by_rows(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """function of the rows of logits `[..., V]`, block by block, in fp32 (fp64 for fp64)."""
    _float("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; pass [..., V] with V >= 1.")
    width = logits.shape[-1]
    flat = logits.detach().reshape(-1, width)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    blocks = flat.split(max(1, BLOCK // width))
    return torch.cat([function(rows.to(dtype)) for rows in blocks]).view(logits.shape[:-1])


def _row_entropy(rows: Tensor, temperature: Tensor | None = None) -> Tensor:
    """log Z - sum z e^z / Z of logits less their maximum: no difference of large numbers."""
    z = rows - rows.amax(-1, keepdim=True)
    if temperature is not None:
        z = z / temperature[:, None]
    z = z.clamp_min(-1e4)  # e^z is 0 in either dtype from here on, and 0 * -inf would be NaN
    e = z.exp()
    total = e.sum(-1)
    return total.log() - (z * e).sum(-1) / total


def _entropies(name: str, value: Tensor, counted: Tensor) -> Tensor:
    """fp64, 0 where not counted, and 0 for a negative entropy within rounding."""
    h = value.detach().double().masked_fill(~counted, 0)
    bad = (h < -ROUNDING) | (h == math.inf)
    return _checked(h, bad, name, "pass entropies in nats, >= 0").clamp_min(0)


def _like(result: Tensor, *inputs: Tensor) -> Tensor:
    return result.to(torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32)


def _checked(value: Tensor, bad: Tensor, name: str, fix: str) -> Tensor:
    """Raises on a bad element where that costs no synchronisation; elsewhere makes it NaN."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return value.masked_fill(bad, math.nan)
    if bad.any():
        raise ValueError(f"{name} holds {value[bad][0].item():g}; {fix}.")
    return value


def _number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number.")
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        left = "(" if open_low or math.isinf(low) else "["
        right = ")" if math.isinf(high) else "]"
        raise ValueError(
            f"{name}={value:g} is outside {left}{low:g}, {high:g}{right}; choose a value inside it."
        )
    return float(value)


def _tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], what: str, like: Tensor | None = None
) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = f"of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {got}; pass {what}.")
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; pass {tuple(like.shape)}.")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; move it to {like.device}.")


def _float(name: str, value: Tensor, like: Tensor | None = None) -> None:
    _tensor(name, value, FLOATS, "an fp64, fp32, bf16 or fp16 tensor", like)


def _sequence(name: str, value: Tensor) -> Tensor:
    _float(name, value)
    if value.ndim == 0:
        raise ValueError(f"{name} is a scalar; pass sequences, [..., T].")
    return value


def _counted(mask: Tensor | None, like: Tensor) -> Tensor:
    """Where elements count, bool."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    _tensor("mask", mask, (torch.bool,), "a bool tensor, True where it counts", like)
    return mask
