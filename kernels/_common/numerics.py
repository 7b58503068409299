"""Elementary functions and loads that keep the digits of small differences, in fp32.

Written in plain Triton (no libdevice), so that the interpreter and every target compute the same.
"""

import triton
import triton.language as tl

# Stands for an infinite log-ratio: finite, so that 0 * FAR is 0, and exp(-FAR) is 0.
FAR = tl.constexpr(1e30)
INF = tl.constexpr(float("inf"))


@triton.jit
def load_fp32(pointers, mask):
    """Logits as fp32; -inf where masked, a token that both sides lack."""
    return tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def partial_sums(x, LANES: tl.constexpr):
    """A block's sums in groups of as many elements as a thread holds: no data crosses threads."""
    return tl.sum(tl.reshape(x, (LANES, x.shape[0] // LANES)), 1)


@triton.jit
def partial_mins(x, LANES: tl.constexpr):
    """A block's minima in the same groups."""
    return tl.min(tl.reshape(x, (LANES, x.shape[0] // LANES)), 1)


@triton.jit
def _phi_series(x):
    """exp(-x) - 1 + x for abs(x) < 1/2."""
    tail = 1.0 / 5040 - x * (1.0 / 40320)
    tail = 1.0 / 720 - x * tail
    tail = 1.0 / 120 - x * tail
    tail = 1.0 / 24 - x * tail
    tail = 1.0 / 6 - x * tail
    return x * x * (0.5 - x * tail)


@triton.jit
def phi(x):
    """exp(-x) - 1 + x, which is x^2 / 2 near 0."""
    return tl.where(tl.abs(x) < 0.5, _phi_series(x), tl.exp(-x) - 1.0 + x)


@triton.jit
def weighted_phi(p, q, d):
    """p phi(d), where q = p exp(-d) is at hand: finite and exact wherever p or q underflows."""
    return tl.where(tl.abs(d) < 0.5, p * _phi_series(d), p * (d - 1.0) + q)


@triton.jit
def expm1(x):
    """exp(x) - 1."""
    return tl.where(tl.abs(x) < 0.5, _phi_series(-x) + x, tl.exp(x) - 1.0)


@triton.jit
def log1p(w):
    """log(1 + w): the rounding of 1 + w is undone to first order."""
    u = 1.0 + w
    return tl.log(u) + (w - (u - 1.0)) / u


@triton.jit
def ordered_key(x):
    """int32 keys in the order of the fp32 numbers x, with one key for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_key(key):
    """The fp32 number of an int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
