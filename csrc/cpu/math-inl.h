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
// e^x for x in [-105, 88]; above, e^88 or more, infinite of either sign, or NaN (no float above 88
// gives less: a test tries all); infinities and NaN give NaN.
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

// e^x for x <= 0 to ExpNonPositive's error, but e^-87 where it is less: without subnormals the
// power of two is one step. Adding 1.5 2^23 + 127 rounds to integers and leaves the biased exponent
// in the low bits.
PD_INLINE V ExpNormal(V x) {
  x = Max(Set(-87.0f), x);
#if PD_TARGET >= PD_TARGET_AVX512
  return ExpFinite(x);
#else
  const V magic = Set(12583039.0f), shifted = Fma(x, Set(1.44269504f), magic), n = shifted - magic;
  return (Expm1Reduced(Fnma(n, Set(0.693147182f), x)) + Set(1.0f)) * Pow2OfLowBits(shifted);
#endif
}

// ExpNormal less e^-87, which it is given as `least`: 0 from there down. What is taken off is lost
// in rounding above -70. Above 88 it is e^88 or more, infinite of either sign, or NaN.
PD_INLINE V ExpLess(V x, V least) {
#if PD_TARGET >= PD_TARGET_AVX512
  static_cast<void>(least);
  return ExpFinite(Max(Set(-105.0f), x));
#else
  x = Max(Set(-87.0f), Min(Set(88.0f), x));  // in this order NaN passes through both
  const V magic = Set(12583039.0f), shifted = Fma(x, Set(1.44269504f), magic), n = shifted - magic;
  const V mantissa = Expm1Reduced(Fnma(n, Set(0.693147182f), x)) + Set(1.0f);
  return Fma(mantissa, Pow2OfLowBits(shifted), Neg(least));
#endif
}

// e^x to ExpNonPositive's error, for any x: 0 and +inf at the ends.
PD_INLINE V ExpClamped(V x) {
#if PD_TARGET >= PD_TARGET_AVX512
  return ExpFinite(Max(Set(-105.0f), Min(Set(89.0f), x)));
#else
  return Exp(x);
#endif
}

// 1 / x for normal x below 2^126, 1 ulp.
PD_INLINE V Reciprocal(V x) {
#if PD_TARGET >= PD_TARGET_AVX512
  const V y = ReciprocalEstimate(x);
  return Fma(y, Fnma(x, y, Set(1.0f)), y);
#else
  return Set(1.0f) / x;
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

#if PD_TARGET >= PD_TARGET_AVX512
// 1 / c and log c for c in the middle of the sixteenths of [1, 2), 1 / c rounded to 8 bits.
inline constexpr float kLogCentres[2][16] = {
    {0.96875f, 0.9140625f, 0.86328125f, 0.8203125f, 0.78125f, 0.74609375f, 0.7109375f, 0.6796875f,
     0.65234375f, 0.62890625f, 0.60546875f, 0.58203125f, 0.5625f, 0.54296875f, 0.5234375f,
     0.5078125f},
    {0.0317486972f, 0.0898563266f, 0.147014737f, 0.198069915f, 0.246860072f, 0.292904019f,
     0.341170758f, 0.386122137f, 0.427183628f, 0.463773072f, 0.501752317f, 0.541231155f,
     0.575364172f, 0.610703528f, 0.647337615f, 0.677643001f},
};
#endif

// log u for positive, normal u, to 1.25e-7 max(1, abs(log u)).
PD_INLINE V LogNormal(V u) {
#if PD_TARGET >= PD_TARGET_AVX512
  // u = 2^e m, m = c (1 + r) with abs(r) < 1/31: a table's entry and four terms.
  V m, e, sixteenth;
  SplitSixteenths(u, m, e, sixteenth);
  const V r = Fms(m, Lookup16(sixteenth, Load(kLogCentres[0])), Set(1.0f));
  const V base = Fma(e, Set(0.693147182f), Lookup16(sixteenth, Load(kLogCentres[1])));
  const V q = Fma(Fma(Set(-0.25f), r, Set(0.333333333f)), r, Set(-0.5f));
  return base + Fma(q, r * r, r);
#else
  V m, e;
  Split2(u, m, e);
  return LogReduced(m - Set(1.0f), e);
#endif
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
