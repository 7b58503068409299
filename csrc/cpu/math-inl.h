// exp, log, log1p and phi on vectors, to a stated error. Errors are checked over the whole range
// against fp64 by tests/native/test_math.py.
#if defined(PD_MATH_INL_H) == defined(PD_TOGGLE)
#ifdef PD_MATH_INL_H
#undef PD_MATH_INL_H
#else
#define PD_MATH_INL_H
#endif

#include "cpu/vec-inl.h"

namespace pd::PD_NAMESPACE {

// e^r - 1 for abs(r) <= ln 2 / 2, as r + r^2 P(r): error 3e-9 before rounding.
PD_INLINE V Expm1Reduced(V r) {
  V p = Set(0.00138138782f);
  p = Fma(p, r, Set(0.00836906396f));
  p = Fma(p, r, Set(0.0416684225f));
  p = Fma(p, r, Set(0.166665182f));
  p = Fma(p, r, Set(0.49999994f));
  return Fma(p * r, r, r);
}

// e^x, 1 ulp where the result is normal; 0 below -104, +inf above 88.73, NaN for NaN.
PD_INLINE V Exp(V x) {
  x = Max(Set(-105.0f), Min(Set(89.0f), x));  // in this order NaN passes through both
  const V n = Round(x * Set(1.44269504f));
  const V r = Fnma(n, Set(1.42860677e-6f), Fnma(n, Set(0.693145752f), x));
  return Scale2(Expm1Reduced(r) + Set(1.0f), n);
}

#if PD_TARGET >= PD_TARGET_AVX512
inline constexpr float kPowersOf2[16] = {
    // 2^(j/16)
    1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
    1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
    1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f,
};
#endif

#if PD_TARGET >= PD_TARGET_AVX512
// e^x for finite x <= 88; infinities and NaN give NaN.
// x = n ln 2 + r with n a multiple of 1/16: 2^n is a power of two and a table's entry, and abs(r)
// <= ln 2 / 32 needs three terms. Adding 1.5 2^19 rounds to sixteenths and leaves n's in the low
// bits.
PD_INLINE V ExpFinite(V x) {
  const V magic = Set(786432.0f), shifted = Fma(x, Set(1.44269504f), magic), n = shifted - magic;
  const V r = Fnma(n, Set(0.693147182f), x);
  const V fraction = Lookup16(shifted, Load(kPowersOf2));
  const V q = Fma(Fma(r, Set(0.166666667f), Set(0.5f)), r * r, r);
  return Scale2(Fma(fraction, q, fraction), n);
}
#endif

// e^x for x <= 0, the inner loop of every softmax: ln 2 in one piece, so that the relative error is
// 1.5 ulp + 2.7e-9 abs(x), a quarter ulp more at -11.
PD_INLINE V ExpNonPositive(V x) {
  x = Max(Set(-105.0f), x);
#if PD_TARGET >= PD_TARGET_AVX512
  return ExpFinite(x);
#else
  const V n = Round(x * Set(1.44269504f));
  return Scale2(Expm1Reduced(Fnma(n, Set(0.693147182f), x)) + Set(1.0f), n);
#endif
}

// ExpNonPositive, and e^x - 1 with full relative precision for small x.
PD_INLINE V ExpNonPositive(V x, V& minus_one) {
  x = Max(Set(-105.0f), x);
  const V n = Round(x * Set(1.44269504f)), one = Set(1.0f);
  const V r = Expm1Reduced(Fnma(n, Set(0.693147182f), x));
  minus_one = Scale2(r, n) + (Scale2(one, n) - one);
  return Scale2(r + one, n);
}

// log(2^e (1 + r)) for r in [-0.25, 0.5), as r - r^2/2 + r^3 Q(r).
PD_INLINE V LogReduced(V r, V e) {
  V q = Set(-0.0450746119f);
  q = Fma(q, r, Set(0.104630068f));
  q = Fma(q, r, Set(-0.131611943f));
  q = Fma(q, r, Set(0.144783974f));
  q = Fma(q, r, Set(-0.16647312f));
  q = Fma(q, r, Set(0.199908614f));
  q = Fma(q, r, Set(-0.250000954f));
  q = Fma(q, r, Set(0.333334506f));
  const V square = r * r;
  const V y = Fnma(Set(0.5f), square, Fma(q * square, r, e * Set(1.42860677e-6f)));
  return Fma(e, Set(0.693145752f), r + y);
}

// log x, 2 ulp for positive x; -inf at 0, NaN below.
PD_INLINE V Log(V x) {
  V m, e;
  Split2(x, m, e);
  V y = LogReduced(m - Set(1.0f), e);
  y = Select(Eq(x, Set(0.0f)), Set(-INFINITY), y);
  y = Select(Eq(x, Set(INFINITY)), Set(INFINITY), y);
  return Select(Le(Set(0.0f), x), y, Set(NAN));  // in this order NaN stays NaN
}

// log u for positive, normal u.
PD_INLINE V LogNormal(V u) {
  V m, e;
  Split2(u, m, e);
  return LogReduced(m - Set(1.0f), e);
}

// log u for u = 1 + w > 0 (normal), with full relative precision for small w: where u needs no
// scaling, w itself is the reduced argument and the rounding of 1 + w does not matter.
PD_INLINE V Log1p(V w, V u) {
  V m, e;
  Split2(u, m, e);
  return LogReduced(Select(Eq(e, Set(0.0f)), w, m - Set(1.0f)), e);
}

// phi(d) = d + e^-d - 1 for abs(d) < 1/2: d^2 (1/2 - d/6 + d^2/24 - ...), relative error 2e-7.
PD_INLINE V PhiSmall(V d) {
  V p = Set(2.48015873e-5f);
  p = Fma(p, d, Set(-1.98412698e-4f));
  p = Fma(p, d, Set(1.38888889e-3f));
  p = Fma(p, d, Set(-8.33333333e-3f));
  p = Fma(p, d, Set(4.16666667e-2f));
  p = Fma(p, d, Set(-0.166666667f));
  p = Fma(p, d, Set(0.5f));
  return p * (d * d);
}

// e^x - 1 with full relative precision for small x.
PD_INLINE V Expm1(V x) {
  return Select(Lt(Abs(x), Set(0.5f)), PhiSmall(Neg(x)) + x, Exp(x) - Set(1.0f));
}

}  // namespace pd::PD_NAMESPACE
#endif
