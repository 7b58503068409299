// The later sweeps over a row pair, in cache, from its normalisers: values of the kinds that need
// them first, and statistics. Included inside the anonymous namespace of divergence-inl.h.

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
