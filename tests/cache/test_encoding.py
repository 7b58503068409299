"""Packing and unpacking rows: ids exactly, log-probabilities within their step, mass to one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydistill import cache_decode
from pydistill.cache.encoding import MASS_ERROR, RANGE, encode
from pydistill.reference.cache_decode import CODES, layout


def rows(
    n: int, vocab: int, k: int, scale: float, seed: int, shape: str = "normal"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, fp64 log-probabilities and tails of the top k of random logits, in random order."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    if shape == "peaked":
        logits[:, seed % vocab] += 30
    elif shape == "outlier":
        logits[:, 0] -= 90
    elif shape == "impossible":
        logits[:, : vocab // 2] = -math.inf
    log_p = torch.log_softmax(logits, -1)
    values, ids = log_p.topk(k)
    order = torch.randperm(k, generator=g)
    if k < vocab:
        tail = torch.logsumexp(log_p.scatter(1, ids, -math.inf), 1)
    else:
        tail = torch.full((n,), -math.inf, dtype=torch.float64)
    return ids[:, order].numpy(), values[:, order].numpy(), tail.numpy()


def kl(stored: np.ndarray, stored_tail: np.ndarray, true: np.ndarray, tail: np.ndarray) -> float:
    """The largest KL(stored || true) over K + 1 cells, fp64."""
    a, b = (
        np.concatenate([x, t[:, None]], 1).astype(np.float64)
        for x, t in ((stored, stored_tail), (true, tail))
    )
    with np.errstate(invalid="ignore"):
        terms = np.where(a == -np.inf, 0, np.exp(a) * (a - b))
    return float(terms.sum(1).max())


@settings(max_examples=150, deadline=None)
@given(
    vocab=st.one_of(
        st.integers(1, 300), st.sampled_from([4096, 32000, 65536, 131072, 151936, 262144])
    ),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.0, 0.1, 1.0, 3.0, 8.0]),
    shape=st.sampled_from(["normal", "peaked", "outlier", "impossible"]),
    codes=st.sampled_from(sorted(CODES)),
    empty=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_roundtrip(
    vocab: int, share: float, scale: float, shape: str, codes: str, empty: int, seed: int
) -> None:
    k = max(1, round(min(vocab, 300) * share)) if seed % 10 or vocab > 40000 else vocab
    ids, log_p, tail = rows(2, vocab, k, scale, seed, shape)
    if empty and k > empty:  # their mass goes to the tail
        tail = np.logaddexp(tail, np.logaddexp.reduce(log_p[:, :empty], 1))
        ids[:, :empty], log_p[:, :empty] = -1, -np.inf
    at = layout(vocab, k, codes)
    packed, stored_kl = encode(ids, log_p, tail, vocab, at)
    assert packed.shape == (2, at.stride)
    got = cache_decode(torch.from_numpy(packed), vocab, k, codes=codes)

    order = np.argsort(np.where(ids < 0, vocab, ids), 1, kind="stable")
    want_ids, want = (np.take_along_axis(x, order, 1) for x in (ids, log_p))
    assert np.array_equal(got.topk_ids.numpy(), want_ids)
    found = got.topk_logprobs.double().numpy()
    assert np.array_equal(found == -np.inf, want == -np.inf)
    finite = want > -np.inf
    best = want.max(1, keepdims=True)
    if finite.any():
        clipped = np.maximum(want, best - RANGE)
        spread = np.where(finite, best - clipped, 0).max()
        step = spread / (at.infinite - 1)  # half of the widest, and the shift that keeps the mass
        assert np.abs(np.where(finite, found - np.where(finite, clipped, 0), 0)).max() <= (
            2 * step + 1e-5
        )
    np.testing.assert_allclose(got.tail_logprob.numpy(), tail, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.exp(found).sum(1) + np.exp(tail), 1, atol=3e-6)
    measured = kl(found, got.tail_logprob.numpy(), want, tail)
    assert abs(measured - stored_kl.max()) <= 1e-6
    if k <= 64:
        assert measured <= (5e-4 if codes == "uint8" else 1e-6)


def test_a_row_of_64_of_151936_takes_182_bytes_and_keeps_its_distribution() -> None:
    at = layout(151936, 64)
    assert (at.low_bits, at.low, at.high, at.codes, at.stride) == (11, 88, 18, 64, 182)
    ids, log_p, tail = rows(64, 151936, 64, 3.0, 1)
    _, stored = encode(ids, log_p, tail, 151936, at)
    assert 0 < stored.max() < 5e-5  # a tenth of what is promised


@pytest.mark.parametrize("codes", CODES)
def test_a_whole_large_vocabulary(codes: str) -> None:
    ids, log_p, tail = rows(1, 262144, 262144, 3.0, 2)
    packed, stored = encode(ids, log_p, tail, 262144, layout(262144, 262144, codes))
    got = cache_decode(torch.from_numpy(packed), 262144, 262144, codes=codes)
    assert torch.equal(got.topk_ids[0], torch.arange(262144))
    want = log_p[0][np.argsort(ids[0])]
    step = (want.max() - want.min()) / 254
    assert np.abs(got.topk_logprobs[0].numpy() - want).max() <= 1.5 * step
    assert got.tail_logprob.item() == -math.inf
    assert stored.max() < 1e-3


def test_the_format_is_pinned() -> None:
    """Bytes worked out by hand: ids 3, 10, 37 of 40 in 4 slots, l = 3, one -inf."""
    ids = np.array([[37, 3, -1, 10]])
    log_p = np.array([[math.log(0.25), math.log(0.5), 7.0, -math.inf]])
    at = layout(40, 4)
    packed, _ = encode(ids, log_p, np.log([0.25]), 40, at)
    low = 3 | 2 << 3 | 5 << 6  # 12 bits
    high = 1 << 0 | 1 << (1 + 1) | 1 << (4 + 2)
    head = bytes([low & 255, low >> 8, high, 0, 255, 254, 0])
    scale = np.float32(math.log(2) / 254**2)
    header = np.array([math.log(0.5), scale, math.log(0.25)], "<f4").tobytes()
    assert packed.tobytes() == head + header


@pytest.mark.parametrize(
    ("ids", "log_p", "tail", "words"),
    [
        ([1, 9], [-1.0, -2.0], -0.7, "topk_ids holds 9 in row 1"),
        ([3, 3], [-1.0, -2.0], -0.7, "names token 3 twice in row 1"),
        ([1, 2], [-1.0, math.nan], -0.7, "row 1 is NaN"),
        ([1, 2], [-1.0, -2.0], math.nan, "row 1 is NaN"),
        ([1, 2], [-1.0, -2.0], -5.0, "row 1 and its tail sum to 0.50"),
        ([1, 2], [-1.0, math.inf], -0.7, "sum to inf"),
        ([-1, -1], [0.0, 0.0], -0.7, "sum to 0.49"),
    ],
)
def test_what_is_no_distribution_is_refused(
    ids: list[int], log_p: list[float], tail: float, words: str
) -> None:
    good = [1, 2], [math.log(0.5), math.log(0.25)], math.log(0.25)
    parts = [np.array([a, b]) for a, b in zip(good, (ids, log_p, tail), strict=True)]
    with pytest.raises(ValueError, match=words):
        encode(*parts, 9, layout(9, 2))


def test_mass_that_rounding_lost_is_put_back() -> None:
    off = math.log1p(0.8 * MASS_ERROR)
    ids, log_p, tail = rows(4, 100, 10, 1.0, 0)
    packed, stored = encode(ids, log_p + off, tail + off, 100, layout(100, 10))
    got = cache_decode(torch.from_numpy(packed), 100, 10)
    mass = got.topk_logprobs.double().exp().sum(1) + got.tail_logprob.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    assert stored.max() < 1e-5


def test_a_row_without_tokens() -> None:
    packed, stored = encode(np.full((1, 3), -1), np.zeros((1, 3)), np.zeros(1), 7, layout(7, 3))
    got = cache_decode(torch.from_numpy(packed), 7, 3)
    assert got.topk_ids.tolist() == [[-1, -1, -1]]
    assert got.topk_logprobs.tolist() == [[-math.inf] * 3]
    assert got.tail_logprob.tolist() == [0.0]
    assert stored.tolist() == [0.0]
