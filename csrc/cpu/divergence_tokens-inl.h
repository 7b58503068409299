// From logits and a row pair's normalisers to tokens (divergence_terms-inl.h) or far tokens
// (divergence_far-inl.h). Included inside the anonymous namespace of divergence-inl.h.

// The row constants of a second sweep or a backward.
struct Constants {
  V k, max_s, max_t, inverse_z_s, inverse_z_t, log_z_s, log_z_t;
  V log_ratio, log_ratio_low;  // C = lse(k t) - lse(k s)
  V log_zt_zs;                 // log(Zt / Zs)
  Shape shape;

  // d = k (t - s) - C within +-kHuge, with the rounding errors of t - s and of C put back.
  PD_INLINE V LogRatio(V s, V t) const {
    const V gap = t - s, d = Fms(k, gap, log_ratio);
    const V rest = Fms(k, RoundingError(t, s, gap), log_ratio_low);
    return Min(Set(kHuge), Max(Select(Lt(Abs(rest), Set(1.0f)), d + rest, d), Set(-kHuge)));
  }

  PD_INLINE V P(V t) const { return ExpNonPositive(k * (t - max_t)) * inverse_z_t; }
  PD_INLINE V Q(V s) const { return ExpNonPositive(k * (s - max_s)) * inverse_z_s; }

  PD_INLINE Tokens At(V s, V t) const {
    const V xs = k * (s - max_s), xt = k * (t - max_t), d = LogRatio(s, t), a = Abs(d);
    const M teacher_larger = Le(Set(0.0f), d);
    const V x = Select(teacher_larger, xt, xs);
    const V inverse_z = Select(teacher_larger, inverse_z_t, inverse_z_s);
    V e;
    const V ratio = ExpNonPositive(Neg(a), e);
    return {
        xt - log_z_t, xs - log_z_s, d, a, teacher_larger, ExpNonPositive(x) * inverse_z, ratio, e};
  }

  PD_INLINE FarTokens FarAt(V s, V t) const {
    const V log_p = k * (t - max_t), log_q = Fma(k, s - max_s, log_zt_zs);
    return {ExpNonPositive(log_p), ExpNonPositive(log_q), log_p, log_q};
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
          Set(static_cast<float>(log_z_t - log_z_s)),
          shape};
}

// The tokens of a block. Most kinds' terms are a long chain of dependent instructions, and so are
// the exps before them: one loop over both waits for its results, two loops keep the units busy. So
// Fill takes the exps of the whole block into the first-level cache, and At completes them. Where
// the terms are short, At does it all.
template <Kind kind, bool kFar>
class TokenBlock {
 public:
  template <class S, class T>
  PD_INLINE void Fill(const Constants& at, const S& s, const T& t, int64_t padded) {
    if constexpr (kAhead) {
      for (int64_t i = 0; i < padded; i += 2 * kLanes) {
        for (int u = 0; u < 2; ++u) Keep(at, s(i + u * kLanes), t(i + u * kLanes), i + u * kLanes);
      }
    }
  }

  PD_INLINE auto At(const Constants& at, V s, V t, int64_t i) const {
    if constexpr (kFar) {
      FarTokens x = at.FarAt(s, t);  // what is not used is not computed
      if constexpr (kAhead) x.p = Load(kept_[0] + i), x.q = Load(kept_[1] + i);
      return x;
    } else {
      Tokens x = at.At(s, t);
      if constexpr (kAhead) {
        x.d = Load(kept_[0] + i), x.a = Abs(x.d), x.teacher_larger = Le(Set(0.0f), x.d);
        x.larger = Load(kept_[1] + i), x.ratio = Load(kept_[2] + i), x.e = Load(kept_[3] + i);
      }
      return x;
    }
  }

 private:
  static constexpr bool kAhead = kind != Kind::kAlphaBeta && !(kFar && kind == Kind::kChi2);

  PD_INLINE void Keep(const Constants& at, V s, V t, int64_t i) {
    if constexpr (kFar) {
      const FarTokens x = at.FarAt(s, t);
      Store(x.p, kept_[0] + i);
      Store(x.q, kept_[1] + i);
    } else {
      const Tokens x = at.At(s, t);
      Store(x.d, kept_[0] + i);
      Store(x.larger, kept_[1] + i);
      Store(x.ratio, kept_[2] + i);
      Store(x.e, kept_[3] + i);
    }
  }

  alignas(64) float kept_[kAhead ? (kFar ? 2 : 4) : 1][kAhead ? kBlock : 1];
};
