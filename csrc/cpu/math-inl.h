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

// e^x, 1 ulp where the result is normal; 0 below -104, +inf above 88.73, NaN for NaN.
// x = n ln 2 + r with abs(r) <= ln 2 / 2, and e^r = 1 + r + r^2 P(r).
PD_INLINE V Exp(V x) {
  x = Max(Set(-105.0f), Min(Set(89.0f), x));  // in this order NaN passes through both
  const V n = Round(x * Set(1.44269504f));
  V r = Fnma(n, Set(0.693145752f), x);
  r = Fnma(n, Set(1.42860677e-6f), r);
  V p = Set(0.00138138782f);
  p = Fma(p, r, Set(0.00836906396f));
  p = Fma(p, r, Set(0.0416684225f));
  p = Fma(p, r, Set(0.166665182f));
  p = Fma(p, r, Set(0.49999994f));
  p = Fma(p * r, r, r);
  return Scale2(p + Set(1.0f), n);
}

// log x, 2 ulp for positive x; -inf at 0, NaN below.
// x = 2^e m with m in [0.75, 1.5), and log m = r - r^2/2 + r^3 Q(r) with r = m - 1.
PD_INLINE V Log(V x) {
  V m, e;
  Split2(x, m, e);
  const V r = m - Set(1.0f);
  V q = Set(-0.0450746119f);
  q = Fma(q, r, Set(0.104630068f));
  q = Fma(q, r, Set(-0.131611943f));
  q = Fma(q, r, Set(0.144783974f));
  q = Fma(q, r, Set(-0.16647312f));
  q = Fma(q, r, Set(0.199908614f));
  q = Fma(q, r, Set(-0.250000954f));
  q = Fma(q, r, Set(0.333334506f));
  const V square = r * r;
  V y = Fma(q * square, r, e * Set(1.42860677e-6f));
  y = Fnma(Set(0.5f), square, y);
  y = Fma(e, Set(0.693145752f), r + y);
  y = Select(Eq(x, Set(0.0f)), Set(-INFINITY), y);
  y = Select(Eq(x, Set(INFINITY)), Set(INFINITY), y);
  return Select(Lt(x, Set(0.0f)), Set(NAN), y);
}

// log(1 + w) for w >= -1, with full relative precision for small w: the rounding error of u = 1 + w
// is put back to first order.
PD_INLINE V Log1p(V w) {
  const V u = Set(1.0f) + w;
  const V y = Log(u);
  return Select(Lt(Set(0.0f), u), y + (w - (u - Set(1.0f))) / u, y);
}

// phi(d) = d + e^-d - 1 for abs(d) < 1/2: d^2 (1/2 - d/6 + d^2/24 - ...), relative error 1e-7.
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
