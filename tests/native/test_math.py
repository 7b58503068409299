"""The vector maths of every instruction set against fp64, to the errors that math-inl.h states.

Inputs are a million bit patterns spread over all floats, and dense ranges where the functions bend.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

_testing = pytest.importorskip(
    "pydistill._testing", reason="pydistill._testing is not built; run `make build-testing`"
)

EPS = 2.0**-23
INF = np.inf
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@pytest.fixture(params=_testing.capabilities())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def points(low: float, high: float) -> Floats:
    """Floats in (low, high): bit patterns at even steps, then values at even steps."""
    bits = np.linspace(0, 2**32 - 1, 1_000_003).astype(np.uint32).view(np.float32)
    dense = np.linspace(max(low, -104), min(high, 89), 200_001).astype(np.float32)
    near = np.linspace(-0.7, 0.7, 100_001).astype(np.float32)
    x = np.concatenate([bits, dense, near])
    return x[(x > low) & (x < high)]


def ulps(got: Floats, exact: Doubles) -> Doubles:
    return np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def relative(got: Floats, exact: Doubles) -> Doubles:
    return np.abs(got - exact) / np.abs(exact)


def phi(d: Floats) -> NDArray[np.longdouble]:
    x = d.astype(np.longdouble)
    series = x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7)))))
    return np.where(np.abs(x) < 0.02, series, x + np.expm1(-x))


def test_exp(isa: str) -> None:
    x = points(-104, 88.7)
    assert ulps(_testing.math(isa, "exp", x), np.exp(x.astype(np.float64))).max() <= 1


@pytest.mark.parametrize("name", ["exp_non_positive", "exp_non_positive_of_two", "exp_normal"])
def test_exp_non_positive(isa: str, name: str) -> None:
    x = points(-87.0 if name == "exp_normal" else -87.3, 1e-45)
    wide = x.astype(np.float64)
    error = ulps(_testing.math(isa, name, x), np.exp(wide))
    assert (error <= 1.5 + 2.7e-9 / (EPS / 2) * np.abs(wide)).all()


def test_exp_normal_stops_above_the_subnormals(isa: str) -> None:
    got = _testing.math(isa, "exp_normal", np.array([-87.001, -104, -3e38, -INF], np.float32))
    np.testing.assert_allclose(got, np.exp(-87.0), rtol=1e-6)


def test_exp_less_is_zero_far_below(isa: str) -> None:
    """0 where exp is below e^-87 on some instruction sets, near 0 on all; and large where it is."""
    x = points(-70.0, 87.9)
    wide = x.astype(np.float64)
    error = ulps(_testing.math(isa, "exp_less", x), np.exp(wide))
    assert (error <= 1.5 + 2.7e-9 / (EPS / 2) * np.abs(wide)).all()
    far = np.array([-87.0, -87.5, -104, -3e38, -INF], np.float32)
    got = _testing.math(isa, "exp_less", far)
    assert (np.abs(got - np.exp(far.astype(np.float64))) < 2e-38).all()
    assert (got[3:] == 0).all()
    assert _testing.math(isa, "exp_less", np.array([88.5], np.float32))[0] >= 1e38


def test_exp_less_of_no_large_number_looks_sound() -> None:
    """All floats from 88.5 on: e^88 or more, or not finite, so that a sum with one is told."""
    isa = _testing.capabilities()[-1]
    first, last = (int(np.float32(x).view(np.uint32)) for x in (88.5, INF))
    for begin in range(first, last, 1 << 24):
        x = np.arange(begin, min(begin + (1 << 24), last), dtype=np.uint32).view(np.float32)
        got = _testing.math(isa, "exp_less", x)
        assert not (np.isfinite(got) & (got < 1e38)).any()
    assert np.isnan(_testing.math(isa, "exp_less", np.array([np.nan], np.float32))).all()


def test_exp_clamped(isa: str) -> None:
    x = points(-87.3, 88.7)
    wide = x.astype(np.float64)
    error = ulps(_testing.math(isa, "exp_clamped", x), np.exp(wide))
    assert (error <= 1.5 + 2.7e-9 / (EPS / 2) * np.abs(wide)).all()


def test_expm1_beside_exp(isa: str) -> None:
    x = points(-INF, 0)
    assert (
        relative(_testing.math(isa, "expm1_non_positive", x), np.expm1(x.astype(float))).max() < EPS
    )


def test_expm1(isa: str) -> None:
    x = points(-INF, 88.7)
    x = x[x != 0]
    tiny = np.abs(x) < 1.2e-38  # a subnormal has fewer digits
    got, exact = _testing.math(isa, "expm1", x), np.expm1(x.astype(float))
    assert relative(got, exact)[~tiny].max() < 2 * EPS
    assert (got[tiny] == x[tiny]).all()


def test_log(isa: str) -> None:
    x = points(0, INF)
    assert ulps(_testing.math(isa, "log", x), np.log(x.astype(float))).max() <= 2


def test_log_normal(isa: str) -> None:
    x = points(1.1754944e-38, INF)
    exact = np.log(x.astype(float))
    error = np.abs(_testing.math(isa, "log_normal", x) - exact)
    assert (error <= 1.25e-7 * np.maximum(1, np.abs(exact))).all()


def test_reciprocal(isa: str) -> None:
    x = points(1.1754944e-38, 2.0**126)
    assert ulps(_testing.math(isa, "reciprocal", x), 1 / x.astype(float)).max() <= 1


def test_log1p(isa: str) -> None:
    x = points(-0.999999, 3e38)
    x = x[x != 0]
    assert relative(_testing.math(isa, "log1p", x), np.log1p(x.astype(float))).max() < 2 * EPS


def test_phi_small(isa: str) -> None:
    x = points(-0.5, 0.5)
    x = x[np.abs(x) > 1e-18]  # below, the square is subnormal
    assert relative(_testing.math(isa, "phi_small", x), phi(x)).max() < 2e-7


TINY = 1e-45  # the smallest subnormal


@pytest.mark.parametrize(
    ("name", "at", "want"),
    [
        ("exp", [-INF, np.nan, 0, -0.0, TINY, 89, INF, -104.5], [0, np.nan, 1, 1, 1, INF, INF, 0]),
        ("exp_clamped", [-INF, np.nan, 0, 89, INF, -104.5], [0, np.nan, 1, INF, INF, 0]),
        ("exp_non_positive", [-INF, np.nan, 0, -TINY, -104.5, -3e38], [0, np.nan, 1, 1, 0, 0]),
        ("exp_normal", [np.nan, 0, -TINY], [np.nan, 1, 1]),
        ("expm1_non_positive", [-INF, np.nan, 0, -TINY, -3e38], [-1, np.nan, 0, -TINY, -1]),
        ("expm1", [-INF, np.nan, 0, TINY, 89, INF], [-1, np.nan, 0, TINY, INF, INF]),
        ("log", [0, -0.0, INF, 1, -1, -INF, np.nan], [-INF, -INF, INF, 0, *[np.nan] * 3]),
        ("log1p", [0, TINY, -TINY, np.nan], [0, TINY, -TINY, None]),
        ("phi_small", [0, TINY, np.nan], [0, 0, np.nan]),
    ],
)
def test_edges(isa: str, name: str, at: list[float], want: list[float | None]) -> None:
    defined = [i for i, value in enumerate(want) if value is not None]
    got = _testing.math(isa, name, np.array(at, np.float32))
    np.testing.assert_array_equal(got[defined], np.array(want)[defined].astype(np.float32))


def test_tails(isa: str) -> None:
    """Every length gives what the whole array gives."""
    x = np.linspace(-20, 0, 1100, dtype=np.float32)
    whole = _testing.math(isa, "exp", x)
    for n in [*range(70), 1023, 1024, 1025, 1100]:
        np.testing.assert_array_equal(_testing.math(isa, "exp", x[:n]), whole[:n])


CODES = np.arange(65536, dtype=np.uint16)


def widened(dtype: str, codes: NDArray[np.uint16]) -> Floats:
    if dtype == "float16":
        return codes.view(np.float16).astype(np.float32)
    return (codes.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_code_survives(isa: str, dtype: str) -> None:
    codes = CODES.view(np.float16) if dtype == "float16" else CODES
    wide, want = _testing.load(isa, codes), widened(dtype, CODES)
    np.testing.assert_array_equal(wide, want)
    back = _testing.store(isa, dtype, wide)
    nan = np.isnan(want)
    subnormal = (dtype == "bfloat16") & (np.abs(want) < 1.17549435e-38)
    # The bfloat16 instruction flushes subnormals to zero.
    kept = ~nan & ~(subnormal if isa in ("avx512_bf16", "amx") else False)
    np.testing.assert_array_equal(back[kept], CODES[kept])
    assert (widened(dtype, back[~kept & ~nan]) == 0).all()
    assert np.isnan(widened(dtype, back[nan])).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ties_go_to_even(isa: str, dtype: str) -> None:
    """Halfway between neighbours, and one bit to either side."""
    last = 0x7BFF if dtype == "float16" else 0x7F7F  # the largest finite number
    first = 0 if dtype == "float16" else 0x80  # normal numbers only: see above
    low = np.arange(first, last, dtype=np.uint16)
    high = low + np.uint16(1)
    middle = (widened(dtype, low) + widened(dtype, high).astype(np.float64)) / 2
    tie = middle.astype(np.float32)
    assert (tie == middle).all()
    even = np.where(low % 2 == 0, low, high)
    for sign, top in ((1, 0), (-1, 0x8000)):
        for x, want in (
            (tie, even),
            (np.nextafter(tie, np.float32(0)), low),
            (np.nextafter(tie, np.float32(INF)), high),
        ):
            got = _testing.store(isa, dtype, np.float32(sign) * x)
            np.testing.assert_array_equal(got, want | np.uint16(top))


def test_overflow_is_infinite(isa: str) -> None:
    x = np.array([65519.996, 65520, 1e38, -65520, INF], np.float32)
    got = _testing.store(isa, "float16", x).view(np.float16)
    np.testing.assert_array_equal(got, np.array([65504, INF, INF, -INF, INF], np.float16))
    top = np.array([3.4028235e38, -3.4028235e38, INF], np.float32)
    want = np.array([INF, -INF, INF], np.float32)
    np.testing.assert_array_equal(widened("bfloat16", _testing.store(isa, "bfloat16", top)), want)


def test_divergence_without_torch(isa: str) -> None:
    """Forward KL, its gradient and the gradient over the student against fp64."""
    random = np.random.default_rng(0)
    s, t = random.standard_normal((2, 3, 67)).astype(np.float32)
    log_q, log_p = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (s.astype(float), t))
    loss, saved, _ = _testing.divergence_forward(isa, s, t, kind=0)
    np.testing.assert_allclose(loss, (np.exp(log_p) * (log_p - log_q)).sum(1), rtol=2e-6)
    ones = np.ones(3, np.float32)
    grad = _testing.divergence_backward(isa, s, t, saved, ones, kind=0)
    np.testing.assert_allclose(grad, np.exp(log_q) - np.exp(log_p), atol=1e-7)
    over = s.copy()
    np.testing.assert_array_equal(_testing.divergence_overwrite(isa, over, t, ones, kind=0), loss)
    np.testing.assert_allclose(over, grad, atol=1e-8)
