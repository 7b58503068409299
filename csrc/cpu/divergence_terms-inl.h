// One token's share of each divergence, and of sum q h: the only place where a kind is spelled out.
// Formulas and their sources: docs/ops/divergence.md, "Kinds".
#if defined(PD_DIVERGENCE_TERMS_INL_H) == defined(PD_TOGGLE)
#ifdef PD_DIVERGENCE_TERMS_INL_H
#undef PD_DIVERGENCE_TERMS_INL_H
#else
#define PD_DIVERGENCE_TERMS_INL_H
#endif

#include "cpu/divergence.h"
#include "cpu/math-inl.h"

namespace pd::PD_NAMESPACE {

// A row's parameters, as kinds use them.
struct Shape {
  float alpha, beta, head;
};

// Lanes of tokens: probabilities, their logs, and d = log p - log q within +-1e30. Where both
// logits are -inf, p = q = 0 and d = -1e30, and every formula below gives 0.
struct Tokens {
  V p, q, log_p, log_q, d;
};

// h is taken with the additive constant that makes it 0 where p = q, so that equal rows have a
// gradient of exactly 0.
struct Term {
  V value, qh;
};

// w phi(x), where w e^-x = m is known.
PD_INLINE V WeightedPhi(V w, V x, V m) {
  return Select(Lt(Abs(x), Set(0.5f)), w * PhiSmall(x), Fma(w, x - Set(1.0f), m));
}

// log(p / M) and log(q / M) for M = share_p p + (1 - share_p) q.
PD_INLINE void MixtureRatios(V d, float share_p, V& x, V& y) {
  const V a = Abs(d);
  const M teacher_larger = Le(Set(0.0f), d);
  const V other = Select(teacher_larger, Set(1.0f - share_p), Set(share_p));
  const V larger = Neg(Log1p(other * Expm1(Neg(a))));
  const V smaller = larger - a;
  x = Select(teacher_larger, larger, smaller);
  y = Select(teacher_larger, smaller, larger);
}

PD_INLINE Term AlphaBeta(const Shape& r, const Tokens& t) {
  const float a = r.alpha, b = r.beta, s = a + b;
  const V floor = Set(-1e30f);
  const V log_p = Max(t.log_p, floor), log_q = Max(t.log_q, floor);
  Term out;
  if (a == 0.0f && b == 0.0f) {
    out = {Set(0.5f) * t.d * t.d, Neg(t.d)};
  } else if (s == 0.0f) {
    const V z = Set(a) * t.d;
    out = {WeightedPhi(Set(1.0f), Neg(z), Exp(z)) * Set(1.0f / (a * a)), Expm1(z) * Set(-1.0f / a)};
  } else if (a == 0.0f) {
    const V q_b = Exp(Set(b) * log_q), p_b = Exp(Set(b) * log_p);
    const V value = WeightedPhi(q_b, Set(-b) * t.d, p_b);
    out = {value * Set(1.0f / (b * b)), Neg(q_b * t.d)};
  } else if (b == 0.0f) {
    const V p_a = Exp(Set(a) * log_p), q_a = Exp(Set(a) * log_q);
    const V z = Set(a) * t.d;
    const V rise = Select(Lt(Abs(z), Set(0.5f)), q_a * (PhiSmall(Neg(z)) + z), p_a - q_a);
    out = {WeightedPhi(p_a, z, q_a) * Set(1.0f / (a * a)), rise * Set(-1.0f / a)};
  } else {
    const V p_s = Exp(Set(s) * log_p), q_s = Exp(Set(s) * log_q);
    const V cross = Exp(Fma(Set(a), log_p, Set(b) * log_q));
    const V za = Set(a) * t.d, zs = Set(s) * t.d;
    const V phi_a = PhiSmall(Neg(za));
    const M small = And(Lt(Abs(za), Set(0.5f)), Lt(Abs(zs), Set(0.5f)));
    const V near = q_s * Fms(Set(a / s), PhiSmall(Neg(zs)), phi_a);
    const V far = Fma(Set(a / s), p_s, Set(b / s) * q_s) - cross;
    const V rise = Select(Lt(Abs(za), Set(0.5f)), q_s * (phi_a + za), cross - q_s);
    out = {Select(small, near, far) * Set(1.0f / (a * b)), rise * Set(-1.0f / a)};
  }
  const M present = Or(Lt(floor, t.log_p), Lt(floor, t.log_q));
  return {Where(present, out.value), Where(present, out.qh)};
}

template <Kind kind>
PD_INLINE Term TermOf(const Shape& r, const Tokens& t) {
  const V one = Set(1.0f), zero = Set(0.0f);
  if constexpr (kind == Kind::kJsd) {
    V x, y;
    MixtureRatios(t.d, r.beta, x, y);
    const V b = Set(r.beta), rest = Set(1.0f - r.beta);
    const V m = Fma(b, t.p, rest * t.q);
    return {Fma(b, WeightedPhi(t.p, x, m), rest * WeightedPhi(t.q, y, m)), rest * t.q * y};
  } else if constexpr (kind == Kind::kSkewForwardKl) {
    V x, y;
    MixtureRatios(t.d, r.alpha, x, y);
    const V m = Fma(Set(r.alpha), t.p, Set(1.0f - r.alpha) * t.q);
    return {WeightedPhi(t.p, x, m), Set(r.alpha - 1.0f) * t.q * Expm1(x)};  // p / M = e^x
  } else if constexpr (kind == Kind::kSkewReverseKl) {
    V x, y;
    MixtureRatios(t.d, 1.0f - r.alpha, x, y);
    const V m = Fma(Set(r.alpha), t.q, Set(1.0f - r.alpha) * t.p);
    return {WeightedPhi(t.q, y, m), t.q * Fnma(Set(r.alpha), Expm1(y), y)};
  } else if constexpr (kind == Kind::kAlphaBeta) {
    return AlphaBeta(r, t);
  } else {
    const V a = Abs(t.d);
    const M teacher_larger = Le(zero, t.d);
    const V larger = Select(teacher_larger, t.p, t.q);
    if constexpr (kind == Kind::kTvd) {
      const V half_sign = Select(teacher_larger, Set(-0.5f), Set(0.5f));
      return {Set(-0.5f) * larger * Expm1(Neg(a)), t.q * Select(Eq(t.d, zero), zero, half_sign)};
    } else if constexpr (kind == Kind::kHellinger) {
      const V e = Expm1(Set(-0.5f) * a);
      const V qh = Select(teacher_larger, t.p * (one + e) * e, Neg(t.q * e));
      return {larger * e * e, qh};
    } else {
      const V e = Expm1(Neg(a));
      const V gap = Neg(larger * e);  // abs(p - q)
      if constexpr (kind == Kind::kChi2) {
        const V p_r = Exp(t.log_p + Max(t.d, zero));  // p^2 / q where p > q
        const V value = Select(teacher_larger, e * e * p_r, t.q * e * e);
        const V qh = Select(teacher_larger, e * (t.p + p_r), Fma(one + e, gap, gap));
        return {value, qh};
      } else {
        static_assert(kind == Kind::kTodi);
        const V larger_share = one / (Set(2.0f) + e);  // of p + q
        const V share_q = Select(teacher_larger, one - larger_share, larger_share);
        const V q_minus_p = Select(teacher_larger, Neg(gap), gap);  // -w p + (1 - w) q
        return {a * gap, Fnma(share_q * t.q, t.d, q_minus_p)};
      }
    }
  }
}

}  // namespace pd::PD_NAMESPACE
#endif
