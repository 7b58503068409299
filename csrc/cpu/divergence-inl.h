// Divergence of two rows of logits: forward (loss and what backward needs), backward, and both at
// once over the student's own memory. docs/ops/divergence.md has the maths.
//
// A row pair is read from memory once. Each step is a sweep over blocks of kBlock columns that stay
// in the second-level cache between sweeps, so a sweep costs arithmetic and not bandwidth:
//
//   KlSweep      normalisers and both KLs about an estimate of C (forward_kl, reverse_kl,
//   adaptive_kl) NormSweep    normalisers (the other kinds), then ValueSweep: sums of value and q h
//   StatsSweep   entropies, acceptance and arg-max agreement, if asked for
//   HeadShare    adaptive_kl's weight
//   GradBlock    the gradient of one block, from the normalisers
//
// Sums are fp32 within a block and fp64 across blocks.
#include "cpu/divergence_terms-inl.h"
#include "cpu/rows-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr float kHuge = 1e30f;

// What is known of a row pair after its first sweeps.
struct Pair {
  float k;  // 1 / T
  float max_s = -INFINITY, max_t = -INFINITY;
  double z_s = 0, z_t = 0;  // sums of exp(k (x - max))
  double kl_pq = 0, kl_qp = 0;
  float low = INFINITY, high = -INFINITY;  // extremes of t - s: infinite if one side alone is -inf

  double LogRatio() const {  // C = lse(k t) - lse(k s)
    return double(k) * (double(max_t) - max_s) + std::log(z_t) - std::log(z_s);
  }
  bool Defined() const { return z_s > 0 && z_t > 0; }  // false for NaN as well
  bool NoQ() const { return high == INFINITY; }
  bool NoP() const { return low == -INFINITY; }
};

// Lifts a running maximum to cover a block; returns the factor for sums taken about the old one.
PD_INLINE double Lift(float block_max, float k, float& running) {
  if (!(block_max > running)) return 1.0;
  const double factor = running == -INFINITY ? 0.0 : std::exp(double(k) * (running - block_max));
  running = block_max;
  return factor;
}

PD_INLINE float FiniteMax(float x) { return x == -INFINITY ? 0.0f : x; }

// t - s - gap exactly, where gap is t - s rounded (Knuth's two-sum); NaN beside infinities.
PD_INLINE V RoundingError(V t, V s, V gap) {
  const V back = gap - t;
  return (t - (gap - back)) - (s + back);
}

// phi(x) = x + e^-x - 1 in fp64, for scalars.
inline double Phi(double x) {
  if (std::fabs(x) > 0.03) return x + std::expm1(-x);
  return x * x * (0.5 - x * (1.0 / 6 - x * (1.0 / 24 - x * (1.0 / 120 - x / 720))));
}

// The exponentials of a sweep, for a gradient that follows at once: each block's about the maximum
// so far. In `divergence_scratch_bytes` of scratch.
struct Kept {
  float *e_s, *e_t, *max_s, *max_t;

  Kept() = default;
  Kept(float* scratch, int64_t vocab)
      : e_s(scratch),
        e_t(e_s + Padded(vocab)),
        max_s(e_t + Padded(vocab)),
        max_t(max_s + (vocab + kBlock - 1) / kBlock) {}
};

// Below this a KL is summed by its Bregman terms; above, the plain sum of p d is as exact.
constexpr double kSmallKl = 0.05;

// What KlSweep adds up over a block: normalisers, and sums of e d0 and e phi(d0) from either side.
struct KlSums {
  float z_s, z_t, plain_pq, fine_pq, plain_qp, fine_qp, low, high;
};

// How a block is summed, see KlSweep. kFinite: no logit is infinite, so nothing needs a bound; a
// sum that is not finite tells that this was wrong. kUnit: the temperature is 1.
struct KlMode {
  bool pq, qp, precise, keep, unit, finite;
};

#if PD_TARGET >= PD_TARGET_AVX512
constexpr bool kTryFinite = true;
PD_INLINE V ExpUnbounded(V x) { return ExpFinite(x); }
#else
constexpr bool kTryFinite = false;
PD_INLINE V ExpUnbounded(V x) { return ExpNonPositive(x); }
#endif

// `ratio` is e_t exp(-d0) / e_s. A block ahead of the logits, their cache lines are asked for.
template <KlMode kMode>
PD_INLINE KlSums KlBlock(const Row& s, const Row& t, const float* bs, const float* bt,
                         int64_t begin, int64_t padded, float scale, float centre, float top_s,
                         float top_t, float ratio_of_e, const Kept& kept) {
  const V k = Set(scale), c0 = Set(centre), half = Set(0.5f), one = Set(1.0f);
  const V max_s = Set(top_s), max_t = Set(top_t);
  const V ratio = Set(ratio_of_e), inverse = Set(1.0f / ratio_of_e);
  const auto scaled = [&](V x) __attribute__((always_inline)) { return kMode.unit ? x : k * x; };
  const auto exponential = [&](V x) __attribute__((always_inline)) {
    return kMode.finite ? ExpUnbounded(x) : ExpNonPositive(x);
  };
  V low = Set(INFINITY), high = Set(-INFINITY);
  V z_s[2] = {Set(0), Set(0)}, z_t[2] = {Set(0), Set(0)};
  V plain_pq[2] = {Set(0), Set(0)}, fine_pq[2] = {Set(0), Set(0)};
  V plain_qp[2] = {Set(0), Set(0)}, fine_qp[2] = {Set(0), Set(0)};
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    s.Prefetch(begin + kBlock + i);
    t.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const V xs = Load(bs + i + u * kLanes), xt = Load(bt + i + u * kLanes);
      const V e_s = exponential(scaled(xs - max_s)), e_t = exponential(scaled(xt - max_t));
      z_s[u] = z_s[u] + e_s;
      z_t[u] = z_t[u] + e_t;
      if constexpr (kMode.keep) {
        Store(e_s, kept.e_s + begin + i + u * kLanes);
        Store(e_t, kept.e_t + begin + i + u * kLanes);
      }
      const V gap = xt - xs;
      V d = kMode.unit ? gap - c0 : Fms(k, gap, c0);
      if constexpr (kMode.precise) {
        const V error = RoundingError(xt, xs, gap);
        d = Select(Lt(Abs(error), one), Fma(k, error, d), d);  // NaN beside infinities
      }
      // Where the weight is 0 the infinities of d, and its NaN where both are -inf, must not count.
      // Where it is not, D is infinite, which `low` and `high` tell.
      const V d_p = kMode.finite ? d : Max(d, Set(-kHuge));
      const V d_q = kMode.finite ? d : Min(d, Set(kHuge));
      if constexpr (kMode.pq) {
        if constexpr (!kMode.finite) high = Max(gap, high);
        plain_pq[u] = Fma(e_t, d_p, plain_pq[u]);
      }
      if constexpr (kMode.qp) {
        if constexpr (!kMode.finite) low = Min(gap, low);
        plain_qp[u] = Fnma(e_s, d_q, plain_qp[u]);
      }
      if constexpr (kMode.precise && kMode.pq) {
        const V far = Fma(e_t, d_p - one, e_s * ratio);
        fine_pq[u] = fine_pq[u] + Select(Lt(Abs(d), half), e_t * PhiSmall(d), far);
      }
      if constexpr (kMode.precise && kMode.qp) {
        const V far = Fnma(e_s, d_q + one, e_t * inverse);
        fine_qp[u] = fine_qp[u] + Select(Lt(Abs(d), half), e_s * PhiSmall(Neg(d)), far);
      }
    }
  }
  const auto sum = [](const V(&v)[2]) __attribute__((always_inline)) { return Sum(v[0] + v[1]); };
  return {sum(z_s),      sum(z_t),     sum(plain_pq), sum(fine_pq),
          sum(plain_qp), sum(fine_qp), MinOf(low),    MaxOf(high)};
}

// One sweep for the normalisers and KL(p || q) and, or, KL(q || p), about `centre`, an estimate of
// C. The plain form sums e d0 only; the precise one also sums e phi(d0), with t - s to its last
// bit. Returns false if the results may have lost digits and deserve a precise sweep about the
// right C.
template <bool kPq, bool kQp, bool kPrecise, bool kKeep = false, bool kUnit = false>
bool KlSweep(Row& s, Row& t, int64_t vocab, float centre, Pair& pair, const Kept& kept_exps = {}) {
  constexpr KlMode kSafe{kPq, kQp, kPrecise, kKeep, kUnit, false};
  constexpr KlMode kFinite{kPq, kQp, kPrecise, kKeep, kUnit, true};
  double a_pq = 0, b_pq = 0, a_qp = 0, b_qp = 0;
  bool clamped = false;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    float top_s, top_t;
    const float *bs = s.Block(begin, n, top_s), *bt = t.Block(begin, n, top_t);
    const double lift_s = Lift(top_s, pair.k, pair.max_s);
    const double lift_t = Lift(top_t, pair.k, pair.max_t);
    pair.z_s *= lift_s, a_qp *= lift_s, b_qp *= lift_s;
    pair.z_t *= lift_t, a_pq *= lift_t, b_pq *= lift_t;
    const float max_s = FiniteMax(pair.max_s), max_t = FiniteMax(pair.max_t);
    if constexpr (kKeep) {
      kept_exps.max_s[begin / kBlock] = max_s;
      kept_exps.max_t[begin / kBlock] = max_t;
    }
    float ratio = 1.0f;
    if constexpr (kPrecise) {
      const double log_ratio = double(pair.k) * (max_s - double(max_t)) + centre;
      const bool inside = std::fabs(log_ratio) < 60.0;
      clamped |= !inside;
      if (inside) ratio = static_cast<float>(std::exp(log_ratio));
    }
    KlSums sums;
    bool summed = false;
    if (kTryFinite && n == padded) {
      sums = KlBlock<kFinite>(s, t, bs, bt, begin, padded, pair.k, centre, max_s, max_t, ratio,
                              kept_exps);
      summed = std::isfinite(sums.z_s + sums.z_t + sums.plain_pq + sums.fine_pq + sums.plain_qp +
                             sums.fine_qp);
    }
    if (!summed) {
      sums = KlBlock<kSafe>(s, t, bs, bt, begin, padded, pair.k, centre, max_s, max_t, ratio,
                            kept_exps);
    }
    pair.z_s += sums.z_s, pair.z_t += sums.z_t;
    a_pq += sums.fine_pq, b_pq += sums.plain_pq, a_qp += sums.fine_qp, b_qp += sums.plain_qp;
    pair.low = sums.low < pair.low ? sums.low : pair.low;
    pair.high = sums.high > pair.high ? sums.high : pair.high;
  }

  bool kept = true;
  const double off = pair.LogRatio() - centre;  // C - C0
  const auto finish = [&](double a, double b, double z, double shift) {
    a /= z, b /= z;
    double kl = b - shift;
    if constexpr (kPrecise) {
      const double lost = Phi(-std::log1p(a - b)), fine = a - lost;
      const bool usable = !clamped && std::isfinite(fine);
      if (usable) kl = fine;
      kept &= usable && lost <= 8 * kl;
    } else {
      const double rounding = 0.06 * centre;  // t - s is off by 6e-8 centre: 1e-6 of sqrt(2 KL)?
      kept &= kl >= kSmallKl && kl >= 0.5 * rounding * rounding;
    }
    return kl > 0 ? kl : (kl <= 0 ? 0.0 : kl);
  };
  if constexpr (kPq) pair.kl_pq = finish(a_pq, b_pq, pair.z_t, off);
  if constexpr (kQp) pair.kl_qp = finish(a_qp, b_qp, pair.z_s, -off);
  return kept;
}

// The normalisers for the other kinds. Returns whether the row is far from agreement (kFar).
inline bool Normalise(Row& s, Row& t, int64_t vocab, Pair& pair) {
  if (pair.k == 1.0f) {
    KlSweep<true, true, false, false, true>(s, t, vocab, 0.0f, pair);
  } else {
    KlSweep<true, true, false>(s, t, vocab, 0.0f, pair);
  }
  const double rounding = 0.06 * pair.LogRatio();
  const double kl = pair.kl_pq < pair.kl_qp ? pair.kl_pq : pair.kl_qp;
  return kl >= kSmallKl && kl >= 0.5 * rounding * rounding;
}

// The KLs of a row. Its first columns tell where C is and whether the plain form will do; a guess
// that turns out wrong costs a second sweep, in cache.
template <bool kPq, bool kQp, bool kKeep = false>
void Kl(Row& s, Row& t, int64_t vocab, Pair& pair, const Kept& exps = {}) {
  constexpr int64_t kPrefix = 256;
  const float k = pair.k;
  Pair guess{.k = k};
  KlSweep<true, true, false>(s, t, vocab < kPrefix ? vocab : kPrefix, 0.0f, guess);
  double c = guess.LogRatio();
  if (!std::isfinite(c)) c = 0;
  const float c0 = static_cast<float>(c);
  const bool far = guess.kl_pq >= 2 * kSmallKl && guess.kl_qp >= 2 * kSmallKl;
  const bool kept = !far ? KlSweep<kPq, kQp, true, kKeep>(s, t, vocab, c0, pair, exps)
                    : k != 1.0f
                        ? KlSweep<kPq, kQp, false, kKeep>(s, t, vocab, c0, pair, exps)
                        : KlSweep<kPq, kQp, false, kKeep, true>(s, t, vocab, c0, pair, exps);
  c = pair.LogRatio();
  if (kept || !std::isfinite(c) || (kPq && pair.NoQ()) || (kQp && pair.NoP())) return;
  pair = Pair{.k = k};
  KlSweep<kPq, kQp, true, kKeep>(s, t, vocab, static_cast<float>(c), pair, exps);
}

// The row constants of a second sweep or a backward.
struct Constants {
  V k, max_s, max_t, inverse_z_s, inverse_z_t, log_z_s, log_z_t, log_ratio, log_ratio_low;
  Shape shape;

  // d = k (t - s) - C within +-kHuge, with the rounding errors of t - s and of C put back.
  template <bool kFar = false>
  PD_INLINE V LogRatio(V s, V t) const {
    const V gap = t - s, d = Fms(k, gap, log_ratio);
    if constexpr (kFar) return Min(Set(kHuge), Max(d, Set(-kHuge)));
    const V rest = Fms(k, RoundingError(t, s, gap), log_ratio_low);
    return Min(Set(kHuge), Max(Select(Lt(Abs(rest), Set(1.0f)), d + rest, d), Set(-kHuge)));
  }

  PD_INLINE V P(V t) const { return ExpNonPositive(k * (t - max_t)) * inverse_z_t; }
  PD_INLINE V Q(V s) const { return ExpNonPositive(k * (s - max_s)) * inverse_z_s; }

  template <bool kFar>
  PD_INLINE Tokens At(V s, V t) const {
    const V xs = k * (s - max_s), xt = k * (t - max_t), d = LogRatio<kFar>(s, t), a = Abs(d);
    const M teacher_larger = Le(Set(0.0f), d);
    const V x = Select(teacher_larger, xt, xs);
    const V inverse_z = Select(teacher_larger, inverse_z_t, inverse_z_s);
    V e, ratio;
    if constexpr (kFar) {
      ratio = ExpNonPositive(Neg(a));
      e = ratio - Set(1.0f);
    } else {
      ratio = ExpNonPositive(Neg(a), e);
    }
    return {
        xt - log_z_t, xs - log_z_s, d, a, teacher_larger, ExpNonPositive(x) * inverse_z, ratio, e};
  }
};

Constants MakeConstants(float k, float max_s, double log_z_s, float max_t, double log_z_t,
                        const Shape& shape) {
  const double c = double(k) * (double(max_t) - max_s) + log_z_t - log_z_s;
  return {Set(k),
          Set(max_s),
          Set(max_t),
          Set(static_cast<float>(std::exp(-log_z_s))),
          Set(static_cast<float>(std::exp(-log_z_t))),
          Set(static_cast<float>(log_z_s)),
          Set(static_cast<float>(log_z_t)),
          Set(static_cast<float>(c)),
          Set(static_cast<float>(c - static_cast<float>(c))),
          shape};
}

template <Kind kind, bool kFar>
void ValueSweep(Row& s, Row& t, int64_t vocab, const Constants& at, double& value, double& centre) {
  value = centre = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const float *bs = s.Block(begin, n), *bt = t.Block(begin, n);
    V sum_value = Set(0), sum_qh = Set(0);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Term term = TermOf<kind, kFar>(at.shape, at.At<kFar>(Load(bs + i), Load(bt + i)));
      sum_value = sum_value + term.value;
      sum_qh = sum_qh + term.qh;
    }
    value += Sum(sum_value);
    centre += Sum(sum_qh);
  }
}

void StatsSweep(Row& s, Row& t, int64_t vocab, const Constants& at, float* stats) {
  double entropy_s = 0, entropy_t = 0, overlap = 0;
  int64_t arg_s = -1, arg_t = -1;
  const V zero = Set(0.0f);
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const float *bs = s.Block(begin, n), *bt = t.Block(begin, n);
    V h_s = zero, h_t = zero, both = zero;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const V xs = Load(bs + i), xt = Load(bt + i);
      const V p = at.P(xt), q = at.Q(xs);
      h_s = Fnma(q, Max(Fms(at.k, xs - at.max_s, at.log_z_s), Set(-kHuge)), h_s);
      h_t = Fnma(p, Max(Fms(at.k, xt - at.max_t, at.log_z_t), Set(-kHuge)), h_t);
      both = both + Min(p, q);
      if (arg_s < 0 && Bits(Eq(xs, at.max_s))) {
        arg_s = begin + i + __builtin_ctz(Bits(Eq(xs, at.max_s)));
      }
      if (arg_t < 0 && Bits(Eq(xt, at.max_t))) {
        arg_t = begin + i + __builtin_ctz(Bits(Eq(xt, at.max_t)));
      }
    }
    entropy_s += Sum(h_s);
    entropy_t += Sum(h_t);
    overlap += Sum(both);
  }
  stats[kEntropyS] = static_cast<float>(entropy_s);
  stats[kEntropyT] = static_cast<float>(entropy_t);
  stats[kAcceptance] = static_cast<float>(overlap);
  stats[kAgree] = arg_s == arg_t ? 1.0f : 0.0f;
}

// log sum exp(s - max s): the normaliser at temperature 1.
double LogZ1(Row& s, int64_t vocab, float max_s) {
  double z = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const float* bs = s.Block(begin, n);
    V sum = Set(0);
    for (int64_t i = 0; i < padded; i += kLanes)
      sum = sum + ExpNonPositive(Load(bs + i) - Set(max_s));
    z += Sum(sum);
  }
  return std::log(z);
}

#include "cpu/divergence_head-inl.h"

inline void Fill(float* x, int n, float value) {
  if (x == nullptr) return;
  for (int i = 0; i < n; ++i) x[i] = value;
}

inline const char* RowAt(const Logits& logits, int64_t row) {
  const int64_t size = logits.dtype == DType::kF32 ? 4 : 2;
  return static_cast<const char*>(logits.data) + row * logits.stride * size;
}

// A pair's parameters; false if they are out of range.
inline bool ReadParams(const DivergenceArgs& a, int64_t pair, float& k, float& t2, Shape& shape) {
  const float* p = a.params == nullptr ? nullptr : a.params + 3 * pair;
  const float temperature = p ? p[0] : a.temperature;
  shape = {p ? p[1] : a.alpha, p ? p[2] : a.beta, 0.0f};
  k = static_cast<float>(1.0 / temperature);
  t2 = a.scale_t2 ? temperature * temperature : 1.0f;
  const auto inside = [](float x) { return x > 0.0f && x < 1.0f; };
  if (!(temperature > 0.0f) || std::isinf(temperature)) return false;
  if (a.kind == Kind::kJsd) return inside(shape.beta);
  if (a.kind == Kind::kSkewForwardKl || a.kind == Kind::kSkewReverseKl) return inside(shape.alpha);
  return std::isfinite(shape.alpha) && std::isfinite(shape.beta);
}

inline bool Infinite(Kind kind, const Pair& pair, const Shape& shape) {
  const float a = shape.alpha, b = shape.beta, s = a + b;
  switch (kind) {
    case Kind::kForwardKl:
    case Kind::kChi2:
      return pair.NoQ();
    case Kind::kReverseKl:
      return pair.NoP();
    case Kind::kAdaptiveKl:
    case Kind::kTodi:
      return pair.NoQ() || pair.NoP();
    case Kind::kAlphaBeta:
      return (pair.NoQ() && (b <= 0 || s <= 0)) || (pair.NoP() && (a <= 0 || s <= 0));
    default:
      return false;
  }
}

// One pair: `saved` is always written. With `kKeep` (forward_kl) the exponentials stay in
// `scratch`.
template <Kind kind, bool kKeep = false>
void ForwardPair(const DivergenceArgs& a, int64_t r, float* saved, float* scratch) {
  float* stats = a.stats == nullptr ? nullptr : a.stats + r * kStats;
  if (a.counted != nullptr && !a.counted[r]) {
    a.loss[r] = 0.0f;
    Fill(saved, kSaved, 0.0f);
    Fill(stats, kStats, NAN);
    return;
  }
  a.loss[r] = NAN;
  Fill(saved, kSaved, NAN);
  Fill(stats, kStats, NAN);
  const int64_t row_s = a.student_rows ? a.student_rows[r] : r;
  const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
  const int64_t label = a.labels ? a.labels[r] : 0;
  float t2;
  Shape shape;
  Pair pair{};
  if (row_s < 0 || row_s >= a.student.rows || row_t < 0 || row_t >= a.teacher.rows || label < 0 ||
      label >= a.vocab || !ReadParams(a, r, pair.k, t2, shape)) {
    return;
  }
  Row s(RowAt(a.student, row_s), a.student.dtype), t(RowAt(a.teacher, row_t), a.teacher.dtype);
  constexpr bool kPq = kind == Kind::kForwardKl || kind == Kind::kAdaptiveKl;
  constexpr bool kQp = kind == Kind::kReverseKl || kind == Kind::kAdaptiveKl;
  bool far = false;
  if constexpr (kKeep) {
    Kl<kPq, kQp, true>(s, t, a.vocab, pair, Kept(scratch, a.vocab));
  } else if constexpr (kPq || kQp) {
    Kl<kPq, kQp>(s, t, a.vocab, pair);
  } else {
    far = Normalise(s, t, a.vocab, pair);
  }
  if (!pair.Defined()) return;

  const double log_z_s = std::log(pair.z_s), log_z_t = std::log(pair.z_t);
  const Constants at = MakeConstants(pair.k, pair.max_s, log_z_s, pair.max_t, log_z_t, shape);
  double value, centre = 0, head = 0;
  if constexpr (kind == Kind::kForwardKl) {
    value = pair.kl_pq;
  } else if constexpr (kind == Kind::kReverseKl) {
    value = centre = pair.kl_qp;
  } else if constexpr (kind == Kind::kAdaptiveKl) {
    head = HeadShare(s, t, a.vocab, at, scratch);
    value = head * pair.kl_pq + (1 - head) * pair.kl_qp;
    centre = pair.kl_qp;
  } else {
    if (far) {
      ValueSweep<kind, true>(s, t, a.vocab, at, value, centre);
    } else {
      ValueSweep<kind, false>(s, t, a.vocab, at, value, centre);
    }
    head = far ? 1 : 0;
  }
  if (Infinite(kind, pair, shape)) {
    value = INFINITY;
    centre = NAN;
  }

  double loss = value * t2, log_z_1 = 0;
  if (a.labels != nullptr || a.z_loss != 0.0f) {
    log_z_1 = pair.k == 1.0f ? log_z_s : LogZ1(s, a.vocab, pair.max_s);
    const double lse = double(pair.max_s) + log_z_1;
    double hard = 0;
    if (a.labels != nullptr) {
      const int64_t begin = label / kBlock * kBlock;
      const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock;
      hard = log_z_1 - (double(s.Block(begin, n)[label - begin]) - pair.max_s);
    }
    loss = (1 - double(a.label_weight)) * loss + a.label_weight * hard + a.z_loss * lse * lse;
  }
  a.loss[r] = static_cast<float>(loss);
  const double kept[kSaved] = {pair.max_s, log_z_s, pair.max_t, log_z_t,
                               value,      centre,  log_z_1,    head};
  for (int i = 0; i < kSaved; ++i) saved[i] = static_cast<float>(kept[i]);
  if (stats != nullptr) {
    stats[kLseS] = static_cast<float>(double(pair.k) * pair.max_s + log_z_s);
    stats[kLseT] = static_cast<float>(double(pair.k) * pair.max_t + log_z_t);
    StatsSweep(s, t, a.vocab, at, stats);
  }
}

// What backward needs of a pair: gradient = soft * (q h - q c) + hard * softmax(s) - [label]
// one_hot.
struct Upstream {
  Constants at;
  float k, soft, centre, hard, one_hot, max_s, inverse_z_1;
  int64_t label;
};

inline Upstream MakeUpstream(const DivergenceArgs& a, int64_t r, const float* saved, float grad) {
  Upstream u;
  float k, t2;
  Shape shape;
  if (!ReadParams(a, r, k, t2, shape)) grad = NAN;
  shape.head = saved[kHead];
  u.at = MakeConstants(k, saved[kMaxS], saved[kLogZS], saved[kMaxT], saved[kLogZT], shape);
  u.k = k;
  u.soft = grad * (1.0f - a.label_weight) * t2 * k;
  u.centre = saved[kCentre];
  u.max_s = saved[kMaxS];
  u.inverse_z_1 = static_cast<float>(std::exp(-double(saved[kLogZ1])));
  u.label = a.labels ? a.labels[r] : -1;
  u.one_hot = a.labels ? grad * a.label_weight : 0.0f;
  u.hard = u.one_hot + grad * 2.0f * a.z_loss * (saved[kMaxS] + saved[kLogZ1]);
  return u;
}

// Writes, or adds to `out`, the gradient of Padded(n) columns from `begin`. `out` may be the
// student's own block.
template <Kind kind, bool kAdd, bool kFar>
PD_INLINE void GradBlock(const Upstream& up, Row& s_row, Row& t_row, int64_t begin, int64_t n,
                         float* out) {
  const int64_t padded = Padded(n);
  const float *bs = s_row.Block(begin, n), *bt = t_row.Block(begin, n);
  const Constants at = up.at;
  const V soft = Set(up.soft), centre = Set(up.centre);
  const V soft_p = soft * at.inverse_z_t, soft_q = soft * at.inverse_z_s;
  const V head = Set(at.shape.head), tail = Set(1.0f - at.shape.head);
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    s_row.Prefetch(begin + kBlock + i);
    t_row.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const V s = Load(bs + i + u * kLanes), t = Load(bt + i + u * kLanes);
      V g;
      if constexpr (kind == Kind::kForwardKl) {
        g = ExpNonPositive(at.k * (s - at.max_s)) * soft_q -
            ExpNonPositive(at.k * (t - at.max_t)) * soft_p;
      } else if constexpr (kind == Kind::kReverseKl) {
        g = ExpNonPositive(at.k * (s - at.max_s)) * soft_q * (Neg(at.LogRatio(s, t)) - centre);
      } else if constexpr (kind == Kind::kAdaptiveKl) {
        const V q = at.Q(s);
        g = soft * Fma(head, q - at.P(t), tail * q * (Neg(at.LogRatio(s, t)) - centre));
      } else {
        const Tokens x = at.At<kFar>(s, t);
        g = soft * Fnma(x.Q(), centre, TermOf<kind, kFar>(at.shape, x).qh);
      }
      if (up.hard != 0.0f) {
        g = Fma(ExpNonPositive(s - Set(up.max_s)) * Set(up.inverse_z_1), Set(up.hard), g);
      }
      if constexpr (kAdd) g = g + Load(out + i + u * kLanes);
      Store(g, out + i + u * kLanes);
    }
  }
  if (up.label >= begin && up.label < begin + padded) out[up.label - begin] -= up.one_hot;
}

// The gradient of one pair, written to `out` (which may be the student's row itself).
template <Kind kind, bool kFar>
void GradRow(const DivergenceArgs& a, Row& s, Row& t, const Upstream& up, char* out) {
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    const bool in_place = a.student.dtype == DType::kF32 && n == padded;
    float* to = in_place ? reinterpret_cast<float*>(out) + begin : buffer;
    GradBlock<kind, false, kFar>(up, s, t, begin, n, to);
    StoreBlock(to, n, a.student.dtype, out, begin);
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

template <Kind kind>
void GradRow(const DivergenceArgs& a, Row& s, Row& t, const Upstream& up, char* out) {
  constexpr bool kOwnSweep =
      kind == Kind::kForwardKl || kind == Kind::kReverseKl || kind == Kind::kAdaptiveKl;
  if constexpr (!kOwnSweep) {
    if (up.at.shape.head == 1.0f) return GradRow<kind, true>(a, s, t, up, out);
  }
  GradRow<kind, false>(a, s, t, up, out);
}

// The gradient of forward_kl from the exponentials that ForwardPair kept: two products a token.
void GradRowKept(const DivergenceArgs& a, const Kept& kept, const float* saved, const Upstream& up,
                 char* out) {
  alignas(64) float buffer[kBlock];
  const auto weight = [&](float max, float row_max, float log_z) {
    return Set(static_cast<float>(up.soft * std::exp(double(up.k) * (max - row_max) - log_z)));
  };
  V of_q = Set(0.0f), of_p = Set(0.0f);
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    const bool in_place = a.student.dtype == DType::kF32 && n == padded;
    float* to = in_place ? reinterpret_cast<float*>(out) + begin : buffer;
    // Most blocks share the row's maximum, and with it the weights.
    if (begin == 0 || kept.max_s[begin / kBlock] != kept.max_s[begin / kBlock - 1] ||
        kept.max_t[begin / kBlock] != kept.max_t[begin / kBlock - 1]) {
      of_q = weight(kept.max_s[begin / kBlock], saved[kMaxS], saved[kLogZS]);
      of_p = weight(kept.max_t[begin / kBlock], saved[kMaxT], saved[kLogZT]);
    }
    const auto grad = [&](int64_t i) __attribute__((always_inline)) {
      return Load(kept.e_s + begin + i) * of_q - Load(kept.e_t + begin + i) * of_p;
    };
    const bool labelled = up.label >= begin && up.label < begin + n;
    if (a.student.dtype == DType::kBf16 && n == padded && !labelled) {
      uint16_t* narrow = reinterpret_cast<uint16_t*>(out) + begin;
      for (int64_t i = 0; i < padded; i += kLanes) StoreBf16(grad(i), narrow + i);
      continue;
    }
    for (int64_t i = 0; i < padded; i += kLanes) Store(grad(i), to + i);
    if (labelled) to[up.label - begin] -= up.one_hot;
    StoreBlock(to, n, a.student.dtype, out, begin);
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

// The summed gradients of the pairs of one student row, rounded once.
template <Kind kind>
void GradRows(const DivergenceArgs& a, int64_t row, const int64_t* pairs, int64_t count,
              char* out) {
  alignas(64) float buffer[kBlock];
  Row s(RowAt(a.student, row), a.student.dtype);
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    for (int64_t i = 0; i < padded; ++i) buffer[i] = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = pairs[j], row_t = a.teacher_rows ? a.teacher_rows[r] : r;
      const float grad = a.grad_rows[r];
      if (grad == 0.0f) continue;
      const bool known = row_t >= 0 && row_t < a.teacher.rows;
      const Upstream up = MakeUpstream(a, r, a.saved + r * kSaved, known ? grad : NAN);
      Row t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
      GradBlock<kind, true, false>(up, s, t, begin, n, buffer);
    }
    StoreBlock(buffer, n, a.student.dtype, out, begin);
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

template <Kind kind>
void Forward(const DivergenceArgs& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; ++r) ForwardPair<kind>(a, r, a.saved + r * kSaved, scratch);
}

template <Kind kind>
void Backward(const DivergenceArgs& a, int64_t begin, int64_t end, float*) {
  const int64_t size = ElementSize(a.student.dtype);
  for (int64_t row = begin; row < end; ++row) {
    char* out = static_cast<char*>(a.grad) + row * a.grad_stride * size;
    const int64_t first = a.row_start ? a.row_start[row] : row;
    const int64_t count = a.row_start ? a.row_start[row + 1] - first : 1;
    const int64_t r = a.pair_of && count ? a.pair_of[first] : first;
    if (count > 1) {
      GradRows<kind>(a, row, a.pair_of + first, count, out);
      continue;
    }
    if (count == 0 || a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
    const bool known = row_t >= 0 && row_t < a.teacher.rows;
    Row s(RowAt(a.student, row), a.student.dtype);
    Row t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
    const float grad = known ? a.grad_rows[r] : NAN;
    GradRow<kind>(a, s, t, MakeUpstream(a, r, a.saved + r * kSaved, grad), out);
  }
}

template <Kind kind>
void Overwrite(const DivergenceArgs& a, int64_t begin, int64_t end, float* scratch) {
  float saved[kSaved];
  for (int64_t r = begin; r < end; ++r) {
    constexpr bool kKeep = kind == Kind::kForwardKl;
    ForwardPair<kind, kKeep>(a, r, saved, scratch);
    const int64_t row = a.student_rows ? a.student_rows[r] : r;
    const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
    if (row < 0 || row >= a.student.rows) continue;  // flagged by its loss
    char* out = const_cast<char*>(RowAt(a.student, row));
    if (a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    const bool known = row_t >= 0 && row_t < a.teacher.rows;
    Row s(out, a.student.dtype), t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
    const Upstream up = MakeUpstream(a, r, saved, known ? a.grad_rows[r] : NAN);
    if (kKeep && up.hard == 0.0f && !std::isnan(saved[kLogZS])) {
      GradRowKept(a, Kept(scratch, a.vocab), saved, up, out);
    } else {
      GradRow<kind>(a, s, t, up, out);
    }
  }
}

// Turns the kind into a template argument once a call.
#define PD_FOR_KIND(FUNCTION)                                        \
  switch (a.kind) {                                                  \
    case Kind::kForwardKl:                                           \
      return FUNCTION<Kind::kForwardKl>(a, begin, end, scratch);     \
    case Kind::kReverseKl:                                           \
      return FUNCTION<Kind::kReverseKl>(a, begin, end, scratch);     \
    case Kind::kJsd:                                                 \
      return FUNCTION<Kind::kJsd>(a, begin, end, scratch);           \
    case Kind::kTvd:                                                 \
      return FUNCTION<Kind::kTvd>(a, begin, end, scratch);           \
    case Kind::kSkewForwardKl:                                       \
      return FUNCTION<Kind::kSkewForwardKl>(a, begin, end, scratch); \
    case Kind::kSkewReverseKl:                                       \
      return FUNCTION<Kind::kSkewReverseKl>(a, begin, end, scratch); \
    case Kind::kAlphaBeta:                                           \
      return FUNCTION<Kind::kAlphaBeta>(a, begin, end, scratch);     \
    case Kind::kAdaptiveKl:                                          \
      return FUNCTION<Kind::kAdaptiveKl>(a, begin, end, scratch);    \
    case Kind::kHellinger:                                           \
      return FUNCTION<Kind::kHellinger>(a, begin, end, scratch);     \
    case Kind::kChi2:                                                \
      return FUNCTION<Kind::kChi2>(a, begin, end, scratch);          \
    case Kind::kTodi:                                                \
      return FUNCTION<Kind::kTodi>(a, begin, end, scratch);          \
  }

}  // namespace

inline void divergence_forward(const DivergenceArgs& a, int64_t begin, int64_t end,
                               float* scratch) {
  PD_FOR_KIND(Forward)
}

inline void divergence_backward(const DivergenceArgs& a, int64_t begin, int64_t end,
                                float* scratch) {
  PD_FOR_KIND(Backward)
}

inline void divergence_overwrite(const DivergenceArgs& a, int64_t begin, int64_t end,
                                 float* scratch) {
  PD_FOR_KIND(Overwrite)
}

#undef PD_FOR_KIND

}  // namespace pd::PD_NAMESPACE
