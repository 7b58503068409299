// The first sweep over a row pair: normalisers, and both KLs about an estimate of C, one read of
// the two rows. Included inside the anonymous namespace of divergence-inl.h.

constexpr float kHuge = 1e30f;

// What is known of a row pair after its first sweeps.
struct Pair {
  float k;  // 1 / T
  float max_s = -INFINITY, max_t = -INFINITY;
  double z_s = 0, z_t = 0;  // sums of exp(k (x - max))
  double kl_pq = 0, kl_qp = 0;
  float low = INFINITY, high = -INFINITY;  // extremes of t - s: infinite if one side alone is -inf
  bool true_max = true;  // false: max may be up to log(kBlock) / k below the row's maximum

  double LogRatio() const {  // C = lse(k t) - lse(k s)
    return double(k) * (double(max_t) - max_s) + std::log(z_t) - std::log(z_s);
  }
  bool Defined() const { return z_s > 0 && z_t > 0; }  // false for NaN as well
  bool NoQ() const { return high == INFINITY; }
  bool NoP() const { return low == -INFINITY; }
};

// Lifts a running maximum to cover a block, or if it may be a guess and is near enough leaves it;
// returns the factor for sums taken about the old one.
PD_INLINE double Lift(float block_max, float k, bool guess, float& running) {
  if (!(block_max > running) || (guess && k * (block_max - running) < 2.0f)) return 1.0;
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

// The exponentials of a sweep, for what follows at once: each block's about the maximum so far. In
// `divergence_scratch_bytes` of scratch.
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

// Whether a KL summed plainly kept its digits: t - s is off by 6e-8 C, which may be 1e-6 of
// sqrt(2 KL).
inline bool PlainIsExact(double kl, double c) {
  const double rounding = 0.06 * c;
  return kl >= kSmallKl && kl >= 0.5 * rounding * rounding;
}

// What KlSweep adds up over a block: normalisers, and sums of e d0 and e phi(d0) from either side.
struct KlSums {
  float z_s, z_t, plain_pq, fine_pq, plain_qp, fine_qp, low, high;

  bool Finite() const { return std::isfinite(z_s + z_t + plain_pq + fine_pq + plain_qp + fine_qp); }
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
template <KlMode kMode, class At>
PD_INLINE KlSums KlBlock(const Row& s, const Row& t, const At& at_s, const At& at_t, int64_t begin,
                         int64_t padded, float scale, float centre, float top_s, float top_t,
                         float ratio_of_e, const Kept& kept) {
  const V k = Set(scale), c0 = Set(centre), half = Set(0.5f), one = Set(1.0f);
  const V max_s = Set(top_s), max_t = Set(top_t);
  const V ratio = Set(ratio_of_e), inverse = Set(1.0f / ratio_of_e);
  const auto scaled = [&](V x) PD_INLINE_LAMBDA { return kMode.unit ? x : k * x; };
  const auto exponential = [&](V x) PD_INLINE_LAMBDA {
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
      const V xs = at_s(i + u * kLanes), xt = at_t(i + u * kLanes);
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
  const auto sum = [](const V(&v)[2]) PD_INLINE_LAMBDA { return Sum(v[0] + v[1]); };
  return {sum(z_s),      sum(z_t),     sum(plain_pq), sum(fine_pq),
          sum(plain_qp), sum(fine_qp), MinOf(low),    MaxOf(high)};
}

// One sweep for the normalisers and KL(p || q) and, or, KL(q || p), about `centre`, an estimate of
// C. The plain form sums e d0 only; the precise one also sums e phi(d0), with t - s to its last
// bit. Returns false if the results may have lost digits and deserve a precise sweep about the
// right C.
template <bool kPq, bool kQp, bool kPrecise, bool kKeep = false, bool kUnit = false>
bool KlSweep(Row& s, Row& t, int64_t vocab, float centre, Pair& pair, const Kept& kept_exps = {}) {
  using Safe = std::integral_constant<KlMode, KlMode{kPq, kQp, kPrecise, kKeep, kUnit, false}>;
  using Finite = std::integral_constant<KlMode, KlMode{kPq, kQp, kPrecise, kKeep, kUnit, true}>;
  double a_pq = 0, b_pq = 0, a_qp = 0, b_qp = 0;
  bool clamped = false;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const auto block = [&](auto mode, const auto& at_s, const auto& at_t,
                           float ratio) PD_INLINE_LAMBDA {
      return KlBlock<mode()>(s, t, at_s, at_t, begin, padded, pair.k, centre, FiniteMax(pair.max_s),
                             FiniteMax(pair.max_t), ratio, kept_exps);
    };
    KlSums sums;
    bool summed = false;
    // About the maxima so far, the block read once. A sum tells if an element was far above them,
    // where exp loses digits to the rounding of x - max, or not finite.
    if (kTryFinite && !kPrecise && !pair.true_max && n == kBlock && s.dtype == t.dtype &&
        s.dtype != DType::kF16 && std::isfinite(pair.max_s) && std::isfinite(pair.max_t)) {
      if (s.dtype == DType::kF32) {
        sums = block(Finite{}, Fp32At{s.At<float>(begin)}, Fp32At{t.At<float>(begin)}, 1.0f);
      } else {
        sums = block(Finite{}, Bf16At{s.At<uint16_t>(begin)}, Bf16At{t.At<uint16_t>(begin)}, 1.0f);
      }
      summed = sums.Finite() && sums.z_s <= kBlock && sums.z_t <= kBlock;
    }
    if (!summed) {
      float top_s, top_t;
      const Fp32At bs{s.Block(begin, n, top_s)}, bt{t.Block(begin, n, top_t)};
      const double lift_s = Lift(top_s, pair.k, !pair.true_max, pair.max_s);
      const double lift_t = Lift(top_t, pair.k, !pair.true_max, pair.max_t);
      pair.z_s *= lift_s, a_qp *= lift_s, b_qp *= lift_s;
      pair.z_t *= lift_t, a_pq *= lift_t, b_pq *= lift_t;
      float ratio = 1.0f;
      if constexpr (kPrecise) {
        const double gap = double(FiniteMax(pair.max_s)) - FiniteMax(pair.max_t);
        const double log_ratio = pair.k * gap + centre;
        const bool inside = std::fabs(log_ratio) < 60.0;
        clamped |= !inside;
        if (inside) ratio = static_cast<float>(std::exp(log_ratio));
      }
      if (kTryFinite && n == padded) {
        sums = block(Finite{}, bs, bt, ratio);
        summed = sums.Finite();
      }
      if (!summed) sums = block(Safe{}, bs, bt, ratio);
    }
    if constexpr (kKeep) {
      kept_exps.max_s[begin / kBlock] = FiniteMax(pair.max_s);
      kept_exps.max_t[begin / kBlock] = FiniteMax(pair.max_t);
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
      kept &= PlainIsExact(kl, centre);
    }
    return kl > 0 ? kl : (kl <= 0 ? 0.0 : kl);
  };
  if constexpr (kPq) pair.kl_pq = finish(a_pq, b_pq, pair.z_t, off);
  if constexpr (kQp) pair.kl_qp = finish(a_qp, b_qp, pair.z_s, -off);
  return kept;
}

// The normalisers for the other kinds. Returns whether the row may be far from agreement.
inline bool Normalise(Row& s, Row& t, int64_t vocab, Pair& pair) {
  if (pair.k == 1.0f) {
    KlSweep<true, true, false, false, true>(s, t, vocab, 0.0f, pair);
  } else {
    KlSweep<true, true, false>(s, t, vocab, 0.0f, pair);
  }
  return pair.kl_pq >= kFarKl && pair.kl_qp >= kFarKl;
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
  if (!pair.true_max) pair.max_s = guess.max_s, pair.max_t = guess.max_t;
  const bool far = guess.kl_pq >= 2 * kSmallKl && guess.kl_qp >= 2 * kSmallKl;
  const bool kept = !far ? KlSweep<kPq, kQp, true, kKeep>(s, t, vocab, c0, pair, exps)
                    : k != 1.0f
                        ? KlSweep<kPq, kQp, false, kKeep>(s, t, vocab, c0, pair, exps)
                        : KlSweep<kPq, kQp, false, kKeep, true>(s, t, vocab, c0, pair, exps);
  c = pair.LogRatio();
  if (kept || !std::isfinite(c) || (kPq && pair.NoQ()) || (kQp && pair.NoP())) return;
  pair.z_s = pair.z_t = 0;  // the maxima and extremes stand
  KlSweep<kPq, kQp, true, kKeep>(s, t, vocab, static_cast<float>(c), pair, exps);
}
