"""One token's share of each divergence, and of sum q h, in fp64 from log p and log q: the formulas
of docs/ops/divergence.md, "Kinds" and "Numerics", for normalisers that are known."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e30


def phi(x: Tensor) -> Tensor:
    return x + torch.expm1(-x)


def weighted_phi(w: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """w phi(x), where w exp(-x) = m is known."""
    return torch.where(x.abs() < 0.5, w * phi(x), w * (x - 1) + m)


class Tokens:
    """p, q and d = log p - log q of some tokens, from the larger of p and q and one expm1, so that
    equal rows differ by exactly 0. Where both are 0, d = -1e30."""

    def __init__(self, log_p: Tensor, log_q: Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q
        self.d = torch.nan_to_num(log_p - log_q, nan=-FAR, posinf=FAR, neginf=-FAR)
        self.teacher = self.d >= 0  # is larger
        self.a = self.d.abs()
        self.e = torch.expm1(-self.a)
        self.ratio = 1 + self.e
        self.larger = torch.where(self.teacher, log_p, log_q).exp()
        smaller = self.larger * self.ratio
        self.p = torch.where(self.teacher, self.larger, smaller)
        self.q = torch.where(self.teacher, smaller, self.larger)

    def by_side(self, larger: Tensor, smaller: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the teacher and to the student."""
        return (
            torch.where(self.teacher, larger, smaller),
            torch.where(self.teacher, smaller, larger),
        )

    def mixture(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log(p / M), log(q / M), p / M - 1 and q / M - 1 of M = share p + (1 - share) q."""
        w = torch.where(self.teacher, 1 - share, share) * self.e
        larger = -torch.log1p(w)
        logs = self.by_side(larger, larger - self.a)
        return *logs, *self.by_side(-w / (1 + w), (self.e - w) / (1 + w))


def terms(name: str, t: Tokens, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's share of D and of sum q h, h being 0 where p = q (docs/ops/divergence.md)."""
    p, q, d = t.p, t.q, t.d
    if name == "forward_kl":
        return weighted_phi(p, d, q), q - p
    if name == "reverse_kl":
        return weighted_phi(q, -d, p), -q * d
    if name == "jsd":
        x, y, _, _ = t.mixture(b)
        p, q = b * p, (1 - b) * q
        near = p * phi(x) + q * phi(y)
        return torch.where(t.a < 0.5, near, p * x + q * y), q * y
    if name == "tvd":
        return -0.5 * t.larger * t.e, q * -0.5 * torch.sign(d)
    if name == "skew_forward_kl":
        x, _, p_gain, _ = t.mixture(a)
        return weighted_phi(p, x, a * p + (1 - a) * q), (a - 1) * q * p_gain
    if name == "skew_reverse_kl":
        _, y, _, q_gain = t.mixture(1 - a)
        return weighted_phi(q, y, a * q + (1 - a) * p), q * (y - a * q_gain)
    if name == "hellinger":
        root = t.ratio.sqrt()
        e = t.e / (1 + root)
        return t.larger * e * e, t.larger * e * torch.where(t.teacher, root, -1)
    gap = -t.larger * t.e  # abs(p - q)
    if name == "chi2":
        p_r = (t.log_p + d.clamp(min=0)).exp()  # p^2 / q where p > q
        value = torch.where(t.teacher, p_r, t.larger) * t.e * t.e
        return value, torch.where(t.teacher, t.e * (t.larger + p_r), t.ratio * gap + gap)
    if name == "todi":
        share = torch.where(t.teacher, t.ratio, 1) / (1 + t.ratio)  # q / (p + q)
        return t.a * gap, torch.where(t.teacher, -gap, gap) - share * q * d
    assert name == "alpha_beta"
    return _alpha_beta(t, a, b)


def _alpha_beta(t: Tokens, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    d, s = t.d, a + b
    log_p, log_q = t.log_p.clamp(min=-FAR), t.log_q.clamp(min=-FAR)
    present = (t.log_p > -FAR) | (t.log_q > -FAR)
    value, qh = torch.zeros_like(d), torch.zeros_like(d)

    def origin() -> tuple[Tensor, Tensor]:
        return d * d / 2, -d

    def at_s0() -> tuple[Tensor, Tensor]:
        z = a * d
        return weighted_phi(torch.ones_like(z), -z, z.exp()) / a**2, torch.expm1(z) / -a

    def at_a0() -> tuple[Tensor, Tensor]:
        q_b = (b * log_q).exp()
        return weighted_phi(q_b, -b * d, (b * log_p).exp()) / b**2, -q_b * d

    def at_b0() -> tuple[Tensor, Tensor]:
        p_a, q_a, z = (a * log_p).exp(), (a * log_q).exp(), a * d
        near = z.abs() < 0.5
        return weighted_phi(p_a, z, q_a) / a**2, torch.where(
            near, q_a * torch.expm1(z), p_a - q_a
        ) / -a

    def general() -> tuple[Tensor, Tensor]:
        p_s, q_s, cross = (s * log_p).exp(), (s * log_q).exp(), (a * log_p + b * log_q).exp()
        za, zs = a * d, s * d
        near = q_s * (a / s * phi(-zs) - phi(-za))
        far = a / s * p_s + b / s * q_s - cross
        small = (za.abs() < 0.5) & (zs.abs() < 0.5)
        slope = torch.where(za.abs() < 0.5, q_s * torch.expm1(za), cross - q_s)
        return torch.where(small, near, far) / (a * b), slope / -a

    a0, b0, s0 = a == 0, b == 0, s == 0
    for rows_of, form in (
        (a0 & b0, origin),
        (s0 & ~a0, at_s0),
        (a0 & ~b0, at_a0),
        (b0 & ~a0, at_b0),
        (~a0 & ~b0 & ~s0, general),
    ):
        if bool(rows_of.any()):
            v, g = form()
            value, qh = torch.where(rows_of, v, value), torch.where(rows_of, g, qh)
    return torch.where(present, value, 0), torch.where(present, qh, 0)
