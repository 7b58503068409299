// What one token adds to a divergence and to its gradient, for every kind.
//
// With d = log p - log q, a token's `value` is its term of D and `pull` its q h, h = dD/dq up to a
// constant, so that the gradient of D is k (pull - q sum(pull)). Forward sums both and backward
// recomputes `pull`, from this one function. Two things keep digits where p is close to q:
//
//   value   is the Bregman form w phi(x), phi(x) = x + exp(-x) - 1, never negative, insensitive to
//           first order to an error in the normalisers (docs/ops/divergence.md);
//   pull    uses the constant that makes it 0 at p = q. Since it is then a multiple of p - q or d,
//           an error e that all d of a row share enters the gradient as e times the gradient.
//
// All arithmetic is fp32. exp2f, expm1f and log1pf are the accurate ones: __expf's error grows with
// its argument. __fdividef is within 2 ulp for the denominators that occur and costs a tenth of
// the IEEE division.
#pragma once

#include "cuda/common.cuh"

namespace pydistill {

enum Kind : int {
  kForwardKl,
  kReverseKl,
  kJsd,
  kTvd,
  kSkewForwardKl,
  kSkewReverseKl,
  kAlphaBeta,
  kAdaptiveKl,
  kHellinger,
  kChi2,
  kTodi,
  kKinds
};

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kSmall = 0.5f;  // |x| below which phi is a polynomial

// p and q of a token, their base-2 logarithms, d, and p - q without cancellation.
struct Token {
  float p, q, log2_p, log2_q;
  float d;
  float gap;
};

// A row's parameters; `share` is adaptive_kl's weight of the forward KL.
struct KindParams {
  float alpha, beta, share;
};

struct Term {
  float value, pull;
};

// d^2 (1/2 - d/6 + ... + d^6/8!): exact to fp32 for |d| < 1/2.
__device__ __forceinline__ float phi_small(float d) {
  float series = fmaf(d, 1.0f / 40320, -1.0f / 5040);
  series = fmaf(d, series, 1.0f / 720);
  series = fmaf(d, series, -1.0f / 120);
  series = fmaf(d, series, 1.0f / 24);
  series = fmaf(d, series, -1.0f / 6);
  series = fmaf(d, series, 0.5f);
  return d * d * series;
}

// weight phi(x), where other = weight exp(-x): a weight of 0 leaves `other`, whatever x is.
__device__ __forceinline__ float bregman(float weight, float x, float other) {
  if (fabsf(x) < kSmall) return weight * phi_small(x);
  return (weight > 0.0f ? weight * x : 0.0f) - weight + other;
}

// exp(-a) - 1 for a >= 0.
__device__ __forceinline__ float expm1_below(float a) {
  return a < kSmall ? phi_small(a) - a : exp2f(-kLog2E * a) - 1.0f;
}

// p - q; for close p and q from d, which knows more digits than p and q do.
__device__ __forceinline__ float probability_gap(float p, float q, float d) {
  const float a = fabsf(d);
  if (!(a < kSmall)) return p - q;
  const float e = phi_small(a) - a;
  return d > 0.0f ? -p * e : q * e;
}

// weight * x with 0 * infinity = 0.
__device__ __forceinline__ float times(float weight, float x) {
  return weight == 0.0f ? 0.0f : weight * x;
}

// a / b where b is a positive mixture that bounds a, 0 where it has (nearly) underflowed.
__device__ __forceinline__ float ratio(float a, float b) {
  return b > 1e-30f ? __fdividef(a, b) : 0.0f;
}

// log(p / M) and log(q / M) for M = share p + (1 - share) q.
struct ToMixture {
  float p, q;
};

__device__ __forceinline__ ToMixture to_mixture(float d, float share) {
  const float a = fabsf(d);
  const float share_of_smaller = d > 0.0f ? 1.0f - share : share;
  const float larger = -log1pf(share_of_smaller * expm1_below(a));
  return d > 0.0f ? ToMixture{larger, larger - a} : ToMixture{larger - a, larger};
}

// exp2(power * log2_x), with x^0 = 1 at x = 0 too.
__device__ __forceinline__ float power_of(float log2_x, float power) {
  return power == 0.0f ? 1.0f : exp2f(power * log2_x);
}

__device__ __forceinline__ float phi(float x) { return bregman(1.0f, x, exp2f(-kLog2E * x)); }

__device__ __forceinline__ Term alpha_beta_term(const Token& x, float a, float b) {
  // Neither side has the token: 0, also for powers of which 0 is the zeroth.
  if (x.log2_p == -INFINITY && x.log2_q == -INFINITY) return {0.0f, 0.0f};
  const float s = a + b;
  const float q_s = power_of(x.log2_q, s);
  const float p_a_q_b =
      exp2f((a == 0.0f ? 0.0f : a * x.log2_p) + (b == 0.0f ? 0.0f : b * x.log2_q));
  const float step = a * x.d;
  const bool small = fabsf(step) < kSmall && fabsf(s * x.d) < kSmall;

  Term term;
  if (a == 0.0f) {
    term.pull = -times(q_s, x.d);
  } else {
    const float above = small ? q_s * (step + phi_small(-step)) : p_a_q_b - q_s;
    term.pull = -above / a;
  }
  if (s == 0.0f) {
    term.value = a == 0.0f ? 0.5f * x.d * x.d : phi(-step) / (a * a);
  } else if (a == 0.0f) {
    term.value = bregman(q_s, -b * x.d, power_of(x.log2_p, b)) / (b * b);
  } else if (b == 0.0f) {
    term.value = bregman(power_of(x.log2_p, a), step, q_s) / (a * a);
  } else if (small) {
    term.value = q_s * (a / s * phi_small(-s * x.d) - phi_small(-step)) / (a * b);
  } else {
    term.value = (a / s * power_of(x.log2_p, s) + b / s * q_s - p_a_q_b) / (a * b);
  }
  return term;
}

template <int kKind>
__device__ __forceinline__ Term term_of(const Token& x, const KindParams& params) {
  if constexpr (kKind == kForwardKl) {
    return {bregman(x.p, x.d, x.q), -x.gap};
  } else if constexpr (kKind == kReverseKl) {
    return {bregman(x.q, -x.d, x.p), -times(x.q, x.d)};
  } else if constexpr (kKind == kAdaptiveKl) {
    const Term forward = term_of<kForwardKl>(x, params);
    const Term reverse = term_of<kReverseKl>(x, params);
    const float w = params.share;
    return {w * forward.value + (1.0f - w) * reverse.value,
            w * forward.pull + (1.0f - w) * reverse.pull};
  } else if constexpr (kKind == kJsd) {
    const float b = params.beta;
    const float mixture = b * x.p + (1.0f - b) * x.q;
    const ToMixture to = to_mixture(x.d, b);
    return {b * bregman(x.p, to.p, mixture) + (1.0f - b) * bregman(x.q, to.q, mixture),
            (1.0f - b) * times(x.q, to.q)};
  } else if constexpr (kKind == kTvd) {
    const float sign = x.gap == 0.0f ? 0.0f : copysignf(1.0f, -x.gap);
    return {0.5f * fabsf(x.gap), 0.5f * x.q * sign};
  } else if constexpr (kKind == kSkewForwardKl) {
    const float a = params.alpha;
    const float mixture = a * x.p + (1.0f - a) * x.q;
    const float outside = (1.0f - a) * (1.0f - a);
    return {bregman(x.p, to_mixture(x.d, a).p, mixture), -outside * x.q * ratio(x.gap, mixture)};
  } else if constexpr (kKind == kSkewReverseKl) {
    const float a = params.alpha;
    const float mixture = (1.0f - a) * x.p + a * x.q;
    const float to_q = to_mixture(x.d, 1.0f - a).q;
    return {bregman(x.q, to_q, mixture),
            times(x.q, to_q) + a * (1.0f - a) * x.q * ratio(x.gap, mixture)};
  } else if constexpr (kKind == kAlphaBeta) {
    return alpha_beta_term(x, params.alpha, params.beta);
  } else if constexpr (kKind == kHellinger) {
    const float e = expm1_below(0.5f * fabsf(x.d));
    const bool p_larger = x.d > 0.0f;
    const float larger = p_larger ? x.p : x.q;
    return {larger * e * e, larger * (p_larger ? (1.0f + e) * e : -e)};
  } else if constexpr (kKind == kChi2) {
    float value;
    if (fabsf(x.d) < kSmall) {
      value = x.gap * (x.d + phi_small(-x.d));
    } else {
      const float p_squared_over_q = exp2f(x.log2_p + kLog2E * x.d);
      value = p_squared_over_q - 2.0f * x.p + x.q;
    }
    return {value, -(value + 2.0f * x.gap)};
  } else {
    static_assert(kKind == kTodi);
    const float e = 1.0f + expm1_below(fabsf(x.d));
    const float share_of_reverse = __fdividef(x.d > 0.0f ? e : 1.0f, 1.0f + e);
    return {times(x.gap, x.d), -x.gap - share_of_reverse * times(x.q, x.d)};
  }
}

// Whether D is +inf because a token has p but no q (`no_q`), or q but no p (`no_p`).
template <int kKind>
__device__ __forceinline__ bool is_infinite(bool no_q, bool no_p, const KindParams& params) {
  if constexpr (kKind == kForwardKl || kKind == kChi2) {
    return no_q;
  } else if constexpr (kKind == kReverseKl) {
    return no_p;
  } else if constexpr (kKind == kAdaptiveKl || kKind == kTodi) {
    return no_q || no_p;
  } else if constexpr (kKind == kAlphaBeta) {
    const float a = params.alpha, b = params.beta;
    return (no_q && (b <= 0.0f || a + b <= 0.0f)) || (no_p && (a <= 0.0f || a + b <= 0.0f));
  } else {
    return false;
  }
}

template <int kKind>
__device__ __forceinline__ bool are_valid(float temperature, const KindParams& params) {
  const float a = params.alpha, b = params.beta;
  if (!(temperature > 0.0f && temperature < INFINITY)) return false;
  if constexpr (kKind == kJsd) return b > 0.0f && b < 1.0f;
  if constexpr (kKind == kSkewForwardKl || kKind == kSkewReverseKl) return a > 0.0f && a < 1.0f;
  return fabsf(a) < INFINITY && fabsf(b) < INFINITY;
}

}  // namespace pydistill
