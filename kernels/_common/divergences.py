"""Divergences of p = softmax(k t) and q = softmax(k s), token by token: D's terms and q dD/dq.

The one place in Triton that knows what a kind is; docs/ops/divergence.md derives each line. Forward
sums the terms, backward evaluates q h again.
"""

import triton
import triton.language as tl

from pydistill.kernels._common.numerics import FAR, INF, expm1, log1p, phi, weighted_phi

# The ids of `pydistill.reference.divergence.KINDS`.
FORWARD_KL, REVERSE_KL, JSD, TVD, SKEW_FORWARD_KL, SKEW_REVERSE_KL = map(tl.constexpr, range(6))
ALPHA_BETA, ADAPTIVE_KL, HELLINGER, CHI2, TODI = map(tl.constexpr, range(6, 11))


@triton.jit
def parameters_valid(KIND: tl.constexpr, temperature, alpha, beta):
    valid = (temperature > 0.0) & (temperature < INF)
    if KIND == JSD:
        valid = valid & (beta > 0.0) & (beta < 1.0)
    elif (KIND == SKEW_FORWARD_KL) or (KIND == SKEW_REVERSE_KL):
        valid = valid & (alpha > 0.0) & (alpha < 1.0)
    else:
        valid = valid & (tl.abs(alpha) < INF) & (tl.abs(beta) < INF)
    return valid


@triton.jit
def log_ratio(s, t, k, offset):
    """d = k (t - s) - offset; 0 where neither side has the token, +-FAR where one has not."""
    d = tl.where((s == -INF) & (t == -INF), 0.0, k * (t - s) - offset)
    return tl.minimum(tl.maximum(d, -FAR), FAR)


@triton.jit
def _to_mixture(d, e, share_of_p):
    """x = log(p / M) and y = log(q / M), M = share p + (1 - share) q; e = expm1(-|d|)."""
    share_of_larger = tl.where(d >= 0.0, share_of_p, 1.0 - share_of_p)
    larger = -log1p((1.0 - share_of_larger) * e)
    smaller = larger - tl.abs(d)
    return tl.where(d >= 0.0, larger, smaller), tl.where(d >= 0.0, smaller, larger)


@triton.jit
def _alpha_beta_terms(log_p, log_q, d, alpha, beta):
    """With the larger of |alpha|, |beta| as divisor, the limits at 0 are terms that vanish."""
    absent = (log_p == -INF) & (log_q == -INF)  # a negative exponent would make it infinite
    log_p, log_q = tl.maximum(log_p, -FAR), tl.maximum(log_q, -FAR)
    total = alpha + beta
    p_s, q_s = tl.exp(total * log_p), tl.exp(total * log_q)
    p_a_q_b = tl.exp(alpha * log_p + beta * log_q)
    by_q = tl.abs(beta) >= tl.abs(alpha)
    large = tl.where(by_q, beta, alpha)
    small = tl.where(by_q, alpha, beta)
    lead = tl.where(by_q, q_s, p_s)
    other = tl.where(by_q, p_s, q_s)
    d_lead = tl.where(by_q, d, -d)
    per_total = tl.where(total == 0.0, 0.0, 1.0 / total)
    per_small = tl.where(small == 0.0, 0.0, 1.0 / small)
    near = weighted_phi(lead, other, -total * d_lead) * per_total
    near = near - weighted_phi(lead, p_a_q_b, -small * d_lead) * per_small
    far = (other - lead) * per_total - (p_a_q_b - lead) * per_small
    is_far = (tl.abs(total * d) >= 0.5) & (tl.abs(small * d) >= 0.5)
    origin = large == 0.0
    term = tl.where(is_far, far, near) / tl.where(origin, 1.0, large)
    term = tl.where(origin, 0.5 * d * d, term)

    x = alpha * d
    per_alpha = tl.where(alpha == 0.0, 0.0, 1.0 / alpha)
    slope = q_s * (d + phi(-x) * per_alpha)  # q^s expm1(x) / alpha
    q_h = -tl.where(tl.abs(x) < 0.5, slope, (p_a_q_b - q_s) * per_alpha)
    return tl.where(absent, 0.0, term), tl.where(absent, 0.0, q_h)


@triton.jit
def terms(KIND: tl.constexpr, log_p, log_q, d, alpha, beta):
    """A block's terms of D, and q h up to what drops out, for rows where D is finite.

    Not for the two KLs and their mixture `adaptive_kl`: they are summed about another constant or
    with weights of the whole row, and their q h is -p and -q d.
    """
    p, q = tl.exp(log_p), tl.exp(log_q)
    a = tl.abs(d)
    larger = tl.maximum(p, q)
    if KIND == JSD:
        x, y = _to_mixture(d, expm1(-a), beta)
        mixture = beta * p + (1.0 - beta) * q
        term = beta * weighted_phi(p, mixture, x) + (1.0 - beta) * weighted_phi(q, mixture, y)
        return term, (1.0 - beta) * q * y
    elif KIND == TVD:
        sign = tl.where(d > 0.0, -0.5, tl.where(d < 0.0, 0.5, 0.0))
        return -0.5 * larger * expm1(-a), q * sign
    elif KIND == SKEW_FORWARD_KL:
        x, _ = _to_mixture(d, expm1(-a), alpha)
        mixture = alpha * p + (1.0 - alpha) * q
        return weighted_phi(p, mixture, x), -(1.0 - alpha) * q * tl.exp(x)
    elif KIND == SKEW_REVERSE_KL:
        _, y = _to_mixture(d, expm1(-a), 1.0 - alpha)
        mixture = (1.0 - alpha) * p + alpha * q
        return weighted_phi(q, mixture, y), q * (y + 1.0 - alpha * tl.exp(y))
    elif KIND == ALPHA_BETA:
        return _alpha_beta_terms(log_p, log_q, d, alpha, beta)
    elif KIND == HELLINGER:
        root = expm1(-0.5 * a)  # -(sqrt larger - sqrt smaller) / sqrt larger
        return larger * root * root, larger * root * tl.where(d >= 0.0, 1.0 + root, -1.0)
    elif KIND == CHI2:
        ratio = tl.where(d >= 0.0, tl.exp(log_p + d), q)  # p^2 / q, or q
        e = expm1(-a)
        return ratio * e * e, tl.where(d >= 0.0, ratio, -ratio) * expm1(-2.0 * a)
    else:
        tl.static_assert(KIND == TODI)
        w = 1.0 / (1.0 + tl.exp(-d))
        return -larger * a * expm1(-a), (1.0 - w) * q * (1.0 - d) - w * p


@triton.jit
def infinite_tokens(KIND: tl.constexpr, s, t, alpha, beta):
    """Tokens that exactly one side lacks and that make D infinite."""
    no_q = (s == -INF) & (t > -INF)
    no_p = (t == -INF) & (s > -INF)
    if KIND == CHI2:
        return no_q
    elif (KIND == ADAPTIVE_KL) or (KIND == TODI):
        return no_q | no_p
    else:
        tl.static_assert(KIND == ALPHA_BETA)
        total = alpha + beta
        power_of_q, power_of_p = tl.minimum(beta, total), tl.minimum(alpha, total)
        return tl.where(no_q, power_of_q, tl.where(no_p, power_of_p, 1.0)) <= 0.0
