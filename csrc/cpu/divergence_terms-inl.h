// One token's share of each divergence, and of sum q h, exact however close the two rows are.
// divergence_far-inl.h has the shorter forms for rows that differ. Formulas and their sources:
// docs/ops/divergence.md, "Kinds".
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

// Lanes of tokens: d = log p - log q within +-1e30, and from one exp each the larger of p and q and
// the ratio of the smaller to it. Where both logits are -inf, d = -1e30 and larger = 0, and every
// formula below gives 0.
struct Tokens {
  V log_p, log_q, d, a;  // a = abs(d)
  M teacher_larger;      // d >= 0
  V larger, ratio, e;    // ratio = exp(-a), e = ratio - 1, each to its own last digit

  PD_INLINE V P() const { return Select(teacher_larger, larger, Smaller()); }
  PD_INLINE V Q() const { return Select(teacher_larger, Smaller(), larger); }
  PD_INLINE V Smaller() const { return larger * ratio; }
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

// A mixture M = share_p p + (1 - share_p) q seen from the larger side, whose ratio to M is 1 / u.
struct Mixture {
  V x, y;            // log(p / M) and log(q / M)
  V p_gain, q_gain;  // p / M - 1 and q / M - 1
};

PD_INLINE Mixture MixtureOf(const Tokens& t, float share_p) {
  const V one = Set(1.0f);
  const V other = Select(t.teacher_larger, Set(1.0f - share_p), Set(share_p));
  const V w = other * t.e, u = one + w;  // M / larger
  const V larger = Neg(Log1p(w, u)), smaller = larger - t.a;
  const V gain_larger = Neg(w) / u, gain_smaller = (t.e - w) / u;
  return {Select(t.teacher_larger, larger, smaller), Select(t.teacher_larger, smaller, larger),
          Select(t.teacher_larger, gain_larger, gain_smaller),
          Select(t.teacher_larger, gain_smaller, gain_larger)};
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
  if constexpr (kind == Kind::kAlphaBeta) {
    return AlphaBeta(r, t);
  } else if constexpr (kind == Kind::kJsd) {
    const Mixture m = MixtureOf(t, r.beta);
    const V p = Set(r.beta) * t.P(), q = Set(1.0f - r.beta) * t.Q();
    // Where d is large the Bregman terms -p + M and -q + M are not needed: they cancel in the sum.
    const V far = Fma(p, m.x, q * m.y), qh = q * m.y;
    const V near = Fma(p, PhiSmall(m.x), q * PhiSmall(m.y));
    return {Select(Lt(t.a, Set(0.5f)), near, far), qh};
  } else if constexpr (kind == Kind::kSkewForwardKl) {
    const Mixture m = MixtureOf(t, r.alpha);
    const V p = t.P(), q = t.Q();
    const V mixed = Fma(Set(r.alpha), p, Set(1.0f - r.alpha) * q);
    return {WeightedPhi(p, m.x, mixed), Set(r.alpha - 1.0f) * q * m.p_gain};
  } else if constexpr (kind == Kind::kSkewReverseKl) {
    const Mixture m = MixtureOf(t, 1.0f - r.alpha);
    const V p = t.P(), q = t.Q();
    const V mixed = Fma(Set(r.alpha), q, Set(1.0f - r.alpha) * p);
    return {WeightedPhi(q, m.y, mixed), q * Fnma(Set(r.alpha), m.q_gain, m.y)};
  } else if constexpr (kind == Kind::kTvd) {
    const V half_sign = Select(t.teacher_larger, Set(-0.5f), Set(0.5f));
    return {Set(-0.5f) * t.larger * t.e, t.Q() * Select(Eq(t.d, zero), zero, half_sign)};
  } else if constexpr (kind == Kind::kHellinger) {
    const V root = Sqrt(t.ratio), e = t.e / (one + root);  // exp(-a/2) and exp(-a/2) - 1
    return {t.larger * e * e, t.larger * e * Select(t.teacher_larger, root, Set(-1.0f))};
  } else {
    const V gap = Neg(t.larger * t.e);  // abs(p - q)
    if constexpr (kind == Kind::kChi2) {
      const V p_r = Exp(t.log_p + Max(t.d, zero));  // p^2 / q where p > q
      const V value = Select(t.teacher_larger, p_r, t.larger) * t.e * t.e;
      const V qh = Select(t.teacher_larger, t.e * (t.larger + p_r), Fma(t.ratio, gap, gap));
      return {value, qh};
    } else {
      static_assert(kind == Kind::kTodi);
      const V larger_share = one / (one + t.ratio);  // of p + q
      const V share_q = Select(t.teacher_larger, one - larger_share, larger_share);
      const V q_minus_p = Select(t.teacher_larger, Neg(gap), gap);  // -w p + (1 - w) q
      return {t.a * gap, Fnma(share_q * t.Q(), t.d, q_minus_p)};
    }
  }
}

}  // namespace pd::PD_NAMESPACE
#endif
