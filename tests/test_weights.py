"""Token weights against plain loops in double precision: values, masks, extremes and errors."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pydistill import weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (7,), (3, 1), (5, 13), (2, 3, 31), (0, 4), (3, 0))
T, F = True, False
NAN, INF = math.nan, math.inf


def rows(*tensors: Tensor) -> list[tuple[list[Any], ...]]:
    """The tensors' rows side by side, as lists."""
    flat = [t.reshape(-1, t.shape[-1]) if t.numel() else t.new_zeros(0, 1) for t in tensors]
    return list(zip(*[t.tolist() for t in flat], strict=True))


def same(got: Tensor, want: list[list[Any]], like: Tensor, atol: float = 1e-300) -> None:
    """`got` has the rows of `want`, in fp32, or fp64 if `like` is; a bool result exactly."""
    assert got.shape == like.shape
    assert not got.requires_grad
    if got.dtype == torch.bool:
        assert got.reshape(-1).tolist() == [x for row in want for x in row]
        return
    exact = like.dtype == torch.float64
    assert got.dtype == (torch.float64 if exact else torch.float32)
    flat = torch.tensor([x for row in want for x in row], dtype=torch.float64)
    rtol = 1e-12 if exact else 2e-7
    torch.testing.assert_close(got.double().reshape(-1), flat, rtol=rtol, atol=atol)


def some_mask(shape: tuple[int, ...], masked: bool) -> Tensor | None:
    """Padding of random length on either side, an all-padded and a full row among them."""
    if not masked:
        return None
    mask = torch.rand(shape) < 0.7
    flat = mask.view(-1, shape[-1]) if mask.numel() else mask
    if flat.shape[0] > 2:
        flat[0], flat[1] = False, True
    return mask


def poison(x: Tensor, mask: Tensor | None, value: float = NAN) -> Tensor:
    """`value` where the mask is False: what does not count must not be read."""
    x = x.clone() if mask is None else x.masked_fill(~mask, value)
    return x.requires_grad_()


def logprobs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (-5 * torch.rand(shape, dtype=torch.float64) ** 2).to(dtype)


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])


# Pass rates


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]


def counts(n: int) -> Tensor:
    return torch.arange(n + 1)


def integral(f: Callable[[float], float], a: float, b: float) -> float:
    """E f(p) under Beta(a, b), by Gauss-Legendre; exact for integer a, b and polynomial f."""
    x, w = np.polynomial.legendre.leggauss(60)
    p, w = (x + 1) / 2, w / 2
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    return float(sum(w * density * [f(t) for t in p]) / sum(w * density))


@pytest.mark.parametrize("prior", [(0.0, 0.0), (1.0, 1.0), (0.5, 2.0)])
def test_pass_rate(prior: tuple[float, float]) -> None:
    for n in (1, 2, 7, 64):
        got = weights.pass_rate(counts(n), n, prior=prior)
        want = [(c + prior[0]) / (n + prior[0] + prior[1]) for c in range(n + 1)]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor(want))
    assert weights.pass_rate(torch.tensor(1), 4, prior=(0.5, 2.0)).item() == pytest.approx(
        1.5 / 6.5
    )


def test_pass_rate_of_tensors_and_of_no_samples() -> None:
    for dtype in weights.INTEGERS:
        c, n = torch.tensor([[0, 3], [5, 0]], dtype=dtype), torch.tensor([[4, 3], [9, 0]])
        want = torch.tensor([[1 / 6, 4 / 5], [6 / 11, 1 / 2]])
        torch.testing.assert_close(weights.pass_rate(c, n), want)
        torch.testing.assert_close(weights.pass_rate(c, n.to(dtype)), want)


@pytest.mark.parametrize("p", [0.0, 0.13, 0.5, 0.9, 1.0])
def test_what_is_unbiased_at_one_p(p: float) -> None:
    n = 9
    weight = torch.tensor(binomial(n, p))

    def mean(x: Tensor) -> float:
        return (x.double() * weight).sum().item()

    assert mean(weights.pass_rate(counts(n), n, prior=(0, 0))) == pytest.approx(p, abs=1e-7)
    bias = (0.5 - 2.5 * p) / (n + 2.5)
    smoothed = weights.pass_rate(counts(n), n, prior=(0.5, 2.0))
    assert mean(smoothed) - p == pytest.approx(bias, abs=1e-7)
    plain = weights.pass_rate_weight(counts(n), n, prior=(0, 0))
    assert mean(plain) == pytest.approx(p * (1 - p) * (1 - 1 / n), abs=1e-7)
    for a, b in product((0, 1, 2, 3), (0, 1, 2, 6)):
        got = weights.pass_rate_weight(counts(n), n, a, b, estimator="unbiased")
        assert mean(got) == pytest.approx(p**a * (1 - p) ** b, abs=1e-7)


@pytest.mark.parametrize("prior", [(1, 1), (2, 5)])
def test_what_is_unbiased_over_the_prior(prior: tuple[int, int]) -> None:
    n = 5
    cases: list[tuple[Tensor, Callable[[float], float]]] = [
        (weights.pass_rate(counts(n), n, prior=prior), lambda p: p),
        (
            weights.pass_rate_weight(counts(n), n, 2, 1, prior=prior, estimator="posterior"),
            lambda p: p**2 * (1 - p),
        ),
    ]
    for estimate, truth in cases:
        values = estimate.tolist()

        def mean(p: float, values: list[float] = values) -> float:
            return sum(w * v for w, v in zip(binomial(n, p), values, strict=True))

        assert integral(mean, *prior) == pytest.approx(integral(truth, *prior), rel=1e-6)


def test_pass_rate_weight_formulas() -> None:
    n, prior = 8, (0.7, 1.6)
    for a, b in [(0.0, 0.0), (1.0, 1.0), (0.5, 2.3), (3.0, 0.0)]:
        p = [(c + 0.7) / (n + 2.3) for c in range(n + 1)]
        got = weights.pass_rate_weight(counts(n), n, a, b, prior=prior)
        torch.testing.assert_close(got, torch.tensor([x**a * (1 - x) ** b for x in p]))
        got = weights.pass_rate_weight(counts(n), n, a, b, prior=prior, estimator="posterior")
        assert got.dtype == torch.float32
        want = [
            math.exp(
                sum(math.lgamma(x) for x in (c + 0.7 + a, n - c + 1.6 + b, n + 2.3))
                - sum(math.lgamma(x) for x in (n + 2.3 + a + b, c + 0.7, n - c + 1.6))
            )
            for c in range(n + 1)
        ]
        torch.testing.assert_close(got, torch.tensor(want))
    # Under the default prior and exponents: (c + 1)(n - c + 1) / ((n + 2)(n + 3)).
    got = weights.pass_rate_weight(counts(n), n, estimator="posterior")
    want = [(c + 1) * (n - c + 1) / ((n + 2) * (n + 3)) for c in range(n + 1)]
    torch.testing.assert_close(got, torch.tensor(want))
    assert weights.pass_rate_weight(counts(n), n, prior=(0, 0))[[0, n]].tolist() == [0, 0]
    ends = weights.pass_rate_weight(counts(n), n, 0, 0, prior=(0, 0))
    assert ends.tolist() == [1.0] * (n + 1)


def test_unbiased_pass_rate_weight_is_never_negative() -> None:
    for n in (4, 5):
        got = weights.pass_rate_weight(counts(n), n, 2, 2, estimator="unbiased")
        fall = [c * (c - 1) * (n - c) * (n - c - 1) for c in range(n + 1)]
        total = n * (n - 1) * (n - 2) * (n - 3)
        torch.testing.assert_close(got, torch.tensor([x / total for x in fall]))
        assert not got.signbit().any()


def test_pass_rates_of_many_samples_keep_their_digits() -> None:
    c, n = torch.tensor([30_000, 0, 100_000]), 100_000
    got = weights.pass_rate_weight(c, n, estimator="posterior").double()
    want = (c + 1).double() * (n - c + 1) / ((n + 2) * (n + 3))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


# Segments


def log_ratio(p: float, q: float) -> float:
    return 0.0 if p == q == -INF else p - q


def segment_loop(p: Any, q: Any, s: Any, m: Any) -> dict[int, list[float]]:
    """Log-ratios of the counted tokens, segment by segment in order of number."""
    counted = [i for i, ok in enumerate(m) if ok and s[i] >= 0]
    return {
        k: [log_ratio(p[i], q[i]) for i in counted if s[i] == k]
        for k in sorted({s[i] for i in counted})
    }


def step_loop(p: Any, q: Any, s: Any, m: Any, delta: float, eps: float) -> list[float]:
    parts = segment_loop(p, q, s, m)
    d = {k: sum(map(abs, part)) / len(part) for k, part in parts.items()}
    first = next(iter(d.values()), 0.0)
    w = {
        k: 1.0 if x == first else 0.0 if x == INF else min((first + eps) / (x + eps), 1 + delta)
        for k, x in d.items()
    }
    return [w[k] if ok and k >= 0 else 0.0 for k, ok in zip(s, m, strict=True)]


def ratio_loop(p: Any, q: Any, s: Any, m: Any) -> list[float]:
    w = {k: math.exp(sum(x) / len(x)) for k, x in segment_loop(p, q, s, m).items()}
    return [w[k] if ok and k >= 0 else 0.0 for k, ok in zip(s, m, strict=True)]


@every_shape
@every_dtype
@masked_or_not
def test_segments(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    p, q, mask = logprobs(shape, dtype), logprobs(shape, dtype), some_mask(shape, masked)
    segments = torch.randint(-1, min(4, max(shape[-1], 1)), shape)
    full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    every = rows(p, q, segments, full)
    masked_segments = segments if mask is None else segments.masked_fill(~mask, 10**9)
    arguments = (poison(p, mask), poison(q, mask, INF), masked_segments)
    for delta, eps in [(0.2, 1e-6), (0.0, 0.1), (5.0, 1e-3)]:
        got = weights.step_weight(*arguments, delta=delta, eps=eps, mask=mask)
        same(got, [step_loop(*row, delta, eps) for row in every], p)
    same(weights.segment_ratio(*arguments, mask=mask), [ratio_loop(*row) for row in every], p)


def test_segment_integers_and_mixed_dtypes() -> None:
    p, q = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -0.5, -2.5]).double()
    for dtype in weights.INTEGERS:
        got = weights.step_weight(p, q, torch.tensor([0, 2, 1], dtype=dtype), delta=0.5, eps=0.5)
        assert got.tolist() == [1.0, 0.75, 0.6] and got.dtype == torch.float64
    got = weights.segment_ratio(p, q, torch.tensor([0, 2, 1]))
    assert got.tolist() == pytest.approx([math.exp(x) for x in (1, -1.5, 2)])
    assert got.dtype == torch.float64
    assert weights.segment_ratio(q, p, torch.tensor([0, 2, 1])).dtype == torch.float64


def test_first_segment_is_the_lowest_with_a_counted_token() -> None:
    p = torch.tensor([[-9.0, -1.0, -2.0, -4.0]])
    q, s = torch.zeros_like(p), torch.tensor([[0, 3, 3, 1]])
    mask = torch.tensor([[F, T, T, T]])
    got = weights.step_weight(p, q, s, delta=9.0, eps=1e-9, mask=mask)
    torch.testing.assert_close(got, torch.tensor([[0, 4 / 1.5, 4 / 1.5, 1]]))
    assert weights.step_weight(p, q, s, delta=0.25, mask=mask).tolist() == [[0, 1.25, 1.25, 1]]
    default = weights.step_weight(
        torch.zeros(2), torch.tensor([-1.0, 0.0]), torch.tensor([0, 1]), delta=1e9
    )
    assert default[1].item() == pytest.approx((1 + 1e-6) / 1e-6)


def test_segments_with_excluded_tokens() -> None:
    p = torch.tensor([[-1.0, -INF, -2.0], [-INF, -1.0, -2.0], [-INF, -1.0, -INF]])
    q = torch.tensor([[-2.0, -1.0, -2.0], [-1.0, -1.0, -INF], [-INF, -2.0, -INF]])
    s = torch.tensor([[0, 1, 2]] * 3)
    got = weights.step_weight(p, q, s, delta=0.5)
    assert got.tolist() == [[1, 0, 1.5], [1, 1.5, 1], [1, pytest.approx(1e-6, rel=1e-3), 1]]
    ratio = weights.segment_ratio(p, q, s)
    assert ratio[0].tolist() == [pytest.approx(math.e), 0, 1]
    assert ratio[1].tolist() == [0, 1, INF]
    assert ratio[2].tolist() == [1, pytest.approx(math.e), 1]
    both = weights.segment_ratio(p[1:2], q[1:2], torch.tensor([[0, 1, 0]]))
    assert both.isnan().tolist() == [[T, F, T]]
    huge = weights.segment_ratio(torch.tensor([0.0, -1.0]), torch.tensor([-90.0, -1.0]), s[0, :2])
    assert huge.tolist() == [INF, 1]
    # A log-probability a rounding above zero is allowed.
    over = weights.segment_ratio(torch.tensor([9e-4]), torch.tensor([9e-4]), s[0, :1])
    assert over.tolist() == [1]


def test_nan_stays_in_its_sequence() -> None:
    p, q = logprobs((3, 6), torch.float32), logprobs((3, 6), torch.float32)
    s = torch.tensor([[0, 0, 1, 1, 2, 2]] * 3)
    clean = weights.step_weight(p, q, s, delta=0.2), weights.segment_ratio(p, q, s)
    p[1, 2] = NAN
    step, ratio = weights.step_weight(p, q, s, delta=0.2), weights.segment_ratio(p, q, s)
    for got, want in zip((step, ratio), clean, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])
        assert got[1].isnan().tolist() == [F, F, T, T, F, F]
        assert torch.equal(got[1, [0, 1, 4, 5]], want[1, [0, 1, 4, 5]])
    p[1, 0] = NAN
    assert weights.step_weight(p, q, s, delta=0.2)[1].isnan().all()


# Entropy


def entropy_loop(row: list[float], tau: float = 1.0) -> float:
    top = max(row)
    e = np.exp((np.array(row) - top) / tau)
    p = e[e > 0] / e.sum()
    return float(-(p * np.log(p)).sum())


def some_logits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Peaked, flat and everything between, with tokens that cannot occur."""
    x = torch.randn(shape, dtype=torch.float64) * torch.logspace(-2, 1.5, shape[0])[:, None]
    keep = torch.rand(shape) < 0.8
    keep[..., 0] = True
    return x.masked_fill(~keep, -INF).to(dtype)


@every_dtype
@pytest.mark.parametrize("vocabulary", [1, 2, 17, 1031])
def test_entropy(dtype: torch.dtype, vocabulary: int) -> None:
    z = some_logits((12, vocabulary), dtype)
    want = [entropy_loop(row) for row in z.double().tolist()]
    got = weights.entropy(z.clone().requires_grad_())
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad and (got >= 0).all()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(
        got.double(), torch.tensor(want, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(weights.entropy(z.view(2, 3, 2, -1)), got.view(2, 3, 2))


def test_entropy_extremes() -> None:
    z = torch.tensor([
        [0.0, 0, 0, 0], [5e4, 0, 0, 0], [-INF, -3e38, -INF, -INF], [3e38, -3e38, 3e38, -INF],
        [NAN, 0, 0, 0], [INF, 0, 0, 0], [-INF, -INF, -INF, -INF], [1.0, 1, 1, 1],
    ])  # fmt: skip
    got = weights.entropy(z)
    assert got.tolist()[:4] == pytest.approx([math.log(4), 0, 0, math.log(2)])
    assert got[2] == 0 and got[4:7].isnan().all() and got[7].item() == pytest.approx(math.log(4))
    assert weights.entropy(torch.randn(0, 3, 5)).shape == (0, 3)
    assert weights.entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    # A common offset costs no digits.
    z = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(weights.entropy(z + 2.0**20), weights.entropy(z), rtol=1e-8, atol=0)


def test_rows_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z = some_logits((11, 33), torch.float32)
    want = weights.entropy(z), weights.entropy_temperature(z)
    for block in (1, 33 * 4):
        monkeypatch.setattr(weights, "BLOCK", block)
        assert torch.equal(weights.entropy(z), want[0])
        assert torch.equal(weights.entropy_temperature(z), want[1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@every_shape
@every_dtype
@masked_or_not
def test_entropy_gap_weight(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    h_s, h_t = (6 * torch.rand(shape).to(dtype) for _ in "st")
    mask = some_mask(shape, masked)
    full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    got = weights.entropy_gap_weight(poison(h_s, mask), poison(h_t, mask, -INF), mask=mask)
    want = [
        [sigmoid(s - t) if ok else 0.0 for s, t, ok in zip(*row, strict=True)]
        for row in rows(h_s, h_t, full)
    ]
    same(got, want, h_s)


def test_entropy_gap_weight_extremes() -> None:
    got = weights.entropy_gap_weight(
        torch.tensor([0.0, 800, 0, NAN]), torch.tensor([0.0, 0, 800, 1])
    )
    assert got[:3].tolist() == [0.5, 1, 0] and got[3].isnan()
    # Entropies a rounding below zero are zero.
    assert weights.entropy_gap_weight(torch.tensor(-9e-4), torch.tensor(0.0)).item() == 0.5
    mixed = weights.entropy_gap_weight(torch.tensor(2.0).double(), torch.tensor(1.0))
    assert mixed.dtype == torch.float64 and mixed.item() == pytest.approx(sigmoid(1), rel=1e-12)


def target_of(row: list[float], gain: float, slope: float, center: float) -> float:
    h = entropy_loop(row)
    return h + gain * sigmoid(slope * (h - center))


@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gain": 0.1, "slope": -1.0, "center": 3.0, "low": 0.7, "high": 4.0, "iterations": 40},
        {"gain": 0.05, "low": 1.0, "high": 1.2, "iterations": 30},
    ],
)
def test_entropy_temperature(dtype: torch.dtype, options: dict[str, Any]) -> None:
    z = some_logits((30, 301), dtype)
    got = weights.entropy_temperature(z.clone().requires_grad_(), **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad
    low, high = options.get("low", 1.1), options.get("high", 1.5)
    # fp32: the entropy is good to 3e-6, and the default stops within 2e-7 of tau.
    exact = dtype == torch.float64 and "iterations" in options
    tolerance = 1e-9 if exact else 6e-6
    ends = [0, 0, 0]
    for row, tau in zip(z.double().tolist(), got.tolist(), strict=True):
        target = target_of(
            row, options.get("gain", 0.5), options.get("slope", 2.0), options.get("center", 1.2)
        )
        if entropy_loop(row, low) > target + tolerance:
            assert tau == pytest.approx(low, abs=0 if exact else 1e-7)
            ends[0] += 1
        elif entropy_loop(row, high) < target - tolerance:
            assert tau == pytest.approx(high, abs=0 if exact else 1e-7)
            ends[2] += 1
        else:
            assert low - 1e-7 <= tau <= high + 1e-7
            assert entropy_loop(row, tau) == pytest.approx(target, abs=tolerance)
            ends[1] += 1
    assert ends[1] > 0 and (options != {} or min(ends[1:]) > 0)


def test_entropy_temperature_is_within_its_bound() -> None:
    z = some_logits((30, 301), torch.float64)
    best = weights.entropy_temperature(z, iterations=60)
    inside = (best > 1.1) & (best < 1.5)
    assert inside.sum() > 3
    for n in (1, 5, 20):
        error = (weights.entropy_temperature(z, iterations=n) - best)[inside].abs().max().item()
        assert 0.4 / 2 ** (n + 4) < error <= 0.4 / 2 ** (n + 1) * (1 + 1e-6)
    default = weights.entropy_temperature(z)
    assert torch.equal(default, weights.entropy_temperature(z, iterations=20))


def test_entropy_temperature_ends_and_masks() -> None:
    z = torch.zeros(6, 9)
    z[1, 0] = 1e4  # one-hot
    z[2, 0] = NAN
    z[3] = -INF
    z[4, 1] = 2.0
    z[5, 1:] = -INF
    mask = torch.tensor([T, T, T, T, F, T])
    assert weights.entropy_temperature(z, mask=mask).nan_to_num(-1).tolist() == pytest.approx(
        [1.5, 1.5, -1, -1, 1, 1.5]
    )
    # Without gain the target is H itself, below H(1.1).
    got = weights.entropy_temperature(torch.randn(4, 50).double(), gain=0.0)
    assert got.tolist() == [1.1] * 4
    for z_0 in (torch.randn(4, 50), torch.zeros(4, 50)):
        assert weights.entropy_temperature(z_0, gain=0.0, low=1.0).tolist() == [1.0] * 4
    assert weights.entropy_temperature(z[:2].double()).tolist() == [1.5] * 2
    masked_nan = weights.entropy_temperature(z, mask=torch.tensor([T, T, F, F, T, T]))
    assert masked_nan[2:4].tolist() == [1, 1]
    assert weights.entropy_temperature(torch.randn(2, 0, 4)).shape == (2, 0)
    assert weights.entropy_temperature(torch.zeros(4).double()).item() == 1.5


# Masks over a sequence


def opener_loop(h: list[float], m: list[bool], share: float) -> list[bool]:
    total = sum(x for x, ok in zip(h, m, strict=True) if ok)
    out, running = [], 0.0
    for x, ok in zip(h, m, strict=True):
        out.append(ok and running < share * total)
        running += x if ok else 0.0
    return out


def top_loop(h: list[float], m: list[bool], fraction: float) -> list[bool]:
    counted = [x for x, ok in zip(h, m, strict=True) if ok]
    if not counted:
        return [False] * len(h)
    quantile = float(np.quantile(counted, 1 - fraction))
    return [ok and x >= quantile - 1e-12 for x, ok in zip(h, m, strict=True)]


@every_shape
@every_dtype
@masked_or_not
def test_sequence_masks(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    h, mask = (3 * torch.rand(shape)).to(dtype), some_mask(shape, masked)
    full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    every = rows(h, full)
    for share in (1e-6, 0.1, 0.37, 1.0):
        opener = weights.opener_mask(poison(h, mask), share=share, mask=mask)
        same(opener, [opener_loop(*row, share) for row in every], h)
        top = weights.top_entropy_mask(poison(h, mask), share, mask=mask)
        same(top, [top_loop(*row, share) for row in every], h)
    assert torch.equal(
        weights.opener_mask(h, mask=mask), weights.opener_mask(h, share=0.1, mask=mask)
    )
    assert torch.equal(
        weights.top_entropy_mask(h, mask=mask), weights.top_entropy_mask(h, 0.2, mask=mask)
    )


def test_opener_mask_by_hand() -> None:
    h = torch.tensor(
        [[0.0, 1, 0, 1, 2, 4, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [2, NAN, 1, 1, 1, 1, 1, 1]]
    )
    for share, length in [(0.125, 2), (0.126, 4), (0.5, 5), (0.51, 6), (1.0, 6)]:
        got = weights.opener_mask(h, share=share)
        assert got[0].tolist() == [i < length for i in range(8)]
        assert not got[1:].any()
    ok = torch.tensor([[F, F, F, T, T, T, F, T]])  # padding on the left and a hole
    assert weights.opener_mask(h[:1], share=0.3, mask=ok).tolist() == [[F, F, F, T, T, F, F, F]]
    # A common scale changes nothing, so H / log V needs no vocabulary.
    x = torch.rand(6, 40).double()
    assert torch.equal(weights.opener_mask(x), weights.opener_mask(x / math.log(2**17)))


def test_top_entropy_mask_by_hand() -> None:
    h = torch.tensor([[3.0, 1, 2, 2, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 7], [1, NAN, 2, 3, 4]])
    assert weights.top_entropy_mask(h, 0.5).tolist() == [[T, F, T, T, F], [T] * 5, [T] * 5, [F] * 5]
    assert weights.top_entropy_mask(h, 0.2).tolist()[::2] == [[T, F, F, F, F], [F, F, F, F, T]]
    ok = torch.tensor([[F, T, T, T, T], [F] * 5, [T, F, F, F, F], [T, F, T, T, T]])
    got = weights.top_entropy_mask(h, 0.4, mask=ok).tolist()
    assert got == [[F, F, T, T, F], [F] * 5, [T, F, F, F, F], [F, F, F, T, T]]


@pytest.mark.parametrize(
    ("n", "fraction", "kept"),
    [
        (101, 0.29, 30),
        (11, 0.7, 8),
        (11, 0.3, 4),
        (100_001, 0.2, 20_001),
        (7, 1.0, 7),
        (7, 1e-9, 1),
    ],
)
def test_top_entropy_mask_keeps_whole_ranks(n: int, fraction: float, kept: int) -> None:
    assert weights.top_entropy_mask(torch.randperm(n).double(), fraction).sum() == kept


def test_top_entropy_mask_over_a_batch() -> None:
    h = torch.rand(4, 25)
    got = weights.top_entropy_mask(h.flatten(), 0.2).view_as(h)
    assert torch.equal(got, h >= torch.quantile(h, 0.8))


# Margins


def margin_loop(a: list[float], c: list[bool], m: list[bool], delta: float) -> list[float]:
    right = [x for x, yes, ok in zip(a, c, m, strict=True) if ok and yes]
    wrong = [x for x, yes, ok in zip(a, c, m, strict=True) if ok and not yes]
    up = down = 0.0
    if right and wrong:
        short = max(0.0, delta - (sum(right) / len(right) - sum(wrong) / len(wrong)))
        n = len(right) + len(wrong)
        up, down = short * len(wrong) / n, short * len(right) / n
    return [
        (x + up if yes else x - down) if ok else 0.0 for x, yes, ok in zip(a, c, m, strict=True)
    ]


@every_shape
@every_dtype
@masked_or_not
@pytest.mark.parametrize("delta", [0.0, 0.3, 4.0])
def test_margin_calibrate(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool, delta: float
) -> None:
    a, correct, mask = (
        torch.randn(shape).to(dtype),
        torch.rand(shape) < 0.5,
        some_mask(shape, masked),
    )
    full = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    got = weights.margin_calibrate(poison(a, mask), correct, delta, mask=mask)
    want = [margin_loop(*row, delta) for row in rows(a, correct, full)]
    same(got, want, a, atol=1e-13 if dtype == torch.float64 else 3e-7)


def test_margin_calibrate_properties() -> None:
    a = torch.randn(200, 9, dtype=torch.float64)
    correct = torch.rand(200, 9) < 0.4
    correct[:3], correct[3:6] = True, False
    got = weights.margin_calibrate(a, correct, 0.5)

    def mean(x: Tensor, kind: Tensor) -> Tensor:
        return (x * kind).sum(-1) / kind.sum(-1)

    lead, after = (mean(x, correct) - mean(x, ~correct) for x in (a, got))
    mixed = correct.any(-1) & ~correct.all(-1)
    assert mixed.sum() > 100 and (lead[mixed] > 0.5).any()
    torch.testing.assert_close(after[mixed], lead[mixed].clamp_min(0.5))
    torch.testing.assert_close(got.mean(-1), a.mean(-1))
    untouched = ~mixed | (lead >= 0.5)
    assert torch.equal(got[untouched], a[untouched])
    torch.testing.assert_close(weights.margin_calibrate(got, correct, 0.5), got)


def test_margin_calibrate_nan_stays_in_its_group() -> None:
    a = torch.tensor([[0.0, 1, 2], [NAN, 1, 2], [NAN, 1, 2]])
    correct = torch.tensor([[T, F, F], [T, F, F], [T, T, T]])
    got = weights.margin_calibrate(a, correct, 1.0)
    torch.testing.assert_close(got[0], torch.tensor([5 / 3, 1 / 6, 7 / 6]))
    assert got[1].isnan().all()
    assert got[2].isnan().tolist() == [T, F, F] and got[2, 1:].tolist() == [1, 2]
