// The terms of divergence_terms-inl.h for rows far from agreement. Their sums are not small, and
// the digits that small differences need (polynomials, compensated logs) would be lost in them
// anyway: p, q and plain formulas are as exact there, in half the time.
#if defined(PD_DIVERGENCE_FAR_INL_H) == defined(PD_TOGGLE)
#ifdef PD_DIVERGENCE_FAR_INL_H
#undef PD_DIVERGENCE_FAR_INL_H
#else
#define PD_DIVERGENCE_FAR_INL_H
#endif

#include <algorithm>
#include <cmath>

#include "cpu/divergence_terms-inl.h"

namespace pd::PD_NAMESPACE {

// Lanes of tokens in a unit of 1 / Zt, so that log(p / q) needs no rounded normaliser. The logs are
// -inf, and p and q 0, where a logit is -inf.
struct FarTokens {
  V p, q, log_p, log_q;

  // log p - log q within +-1e30; -1e30 where both are 0.
  PD_INLINE V LogRatio() const { return Min(Set(1e30f), Max(log_p - log_q, Set(-1e30f))); }
};

// Whether the kind has plain forms with these parameters: alpha_beta divides by alpha and beta, and
// small powers make many small terms.
inline bool HasFarTerms(Kind kind, const Shape& r) {
  if (kind != Kind::kAlphaBeta) return true;
  const float s = r.alpha + r.beta;
  return std::min(r.alpha, r.beta) >= 0.1f && s >= 0.5f && s <= 2.0f;
}

// Plain forms are tried where both KLs are at least kFarKl, and kept where the value they give is
// at least this: it is off by up to 1e-7, alpha_beta's by 1e-7 / (alpha beta). No form of tvd or
// todi cancels.
inline constexpr double kFarKl = 0.1;
inline double SmallestFarValue(Kind kind, const Shape& r) {
  if (kind == Kind::kTvd || kind == Kind::kTodi) return 0.0;
  return kind == Kind::kAlphaBeta ? 0.05 / (double(r.alpha) * r.beta) : 0.025;
}

// The factor that brings sums of terms back to a unit of 1.
inline double FarUnit(Kind kind, const Shape& r, double log_z_t) {
  return std::exp(-log_z_t * (kind == Kind::kAlphaBeta ? double(r.alpha) + r.beta : 1.0));
}

template <Kind kind>
PD_INLINE Term TermOf(const Shape& r, const FarTokens& t) {
  [[maybe_unused]] const V zero = Set(0.0f), half = Set(0.5f);
  [[maybe_unused]] const V floor = Set(-105.0f);         // of a log whose exp is 0
  [[maybe_unused]] const V tiny = Set(1.17549435e-38f);  // what a mixture of zeros is divided by
  if constexpr (kind == Kind::kAlphaBeta) {
    const float a = r.alpha, b = r.beta, s = a + b;
    const V p_s = ExpNonPositive(Set(s) * t.log_p), q_s = ExpNonPositive(Set(s) * t.log_q);
    const V cross = ExpNonPositive(Fma(Set(a), t.log_p, Set(b) * t.log_q));
    const V rest = Fma(Set(1.0f / (s * a)), q_s, Set(-1.0f / (a * b)) * cross);
    return {Fma(Set(1.0f / (s * b)), p_s, rest), Set(1.0f / a) * (q_s - cross)};
  } else if constexpr (kind == Kind::kJsd) {
    const V p = Set(r.beta) * t.p, q = Set(1.0f - r.beta) * t.q;
    const V log_m = LogNormal(Max(p + q, tiny)), qh = q * (Max(floor, t.log_q) - log_m);
    return {Fma(p, Max(floor, t.log_p) - log_m, qh), qh};
  } else if constexpr (kind == Kind::kSkewForwardKl) {
    const float rest = 1.0f - r.alpha;
    const V m = Max(Fma(Set(r.alpha), t.p, Set(rest) * t.q), tiny);
    const V value = Fma(t.p, Max(floor, t.log_p) - LogNormal(m), m - t.p);
    return {value, Set(rest * rest) * t.q * ((t.q - t.p) * Reciprocal(m))};
  } else if constexpr (kind == Kind::kSkewReverseKl) {
    const float rest = 1.0f - r.alpha;
    const V m = Max(Fma(Set(r.alpha), t.q, Set(rest) * t.p), tiny);
    const V gain = (t.p - t.q) * Reciprocal(m), plain = t.q * (Max(floor, t.log_q) - LogNormal(m));
    return {plain + (m - t.q), Fma(Set(r.alpha * rest) * t.q, gain, plain)};
  } else if constexpr (kind == Kind::kTvd) {
    const V gap = t.p - t.q;
    const V minus_half_sign = Select(Lt(zero, gap), Neg(half), Select(Lt(gap, zero), half, zero));
    return {half * Abs(gap), t.q * minus_half_sign};
  } else if constexpr (kind == Kind::kHellinger) {
    const V qh = t.q - Sqrt(t.p * t.q);
    return {t.p - t.q + (qh + qh), qh};
  } else if constexpr (kind == Kind::kChi2) {
    const V p_r = ExpClamped(Max(t.log_p, Set(-1e30f)) + t.LogRatio());  // p^2 / q
    const V qh = t.q - p_r;
    return {t.q - t.p - t.p + p_r, qh};
  } else {
    static_assert(kind == Kind::kTodi);
    const V gap = t.p - t.q, d = t.LogRatio();
    const V share_q = t.q * Reciprocal(Max(t.p + t.q, tiny));
    return {d * gap, Neg(Fma(share_q * t.q, d, gap))};
  }
}

}  // namespace pd::PD_NAMESPACE
#endif
