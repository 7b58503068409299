// The later sweeps over a row pair, in cache, from its normalisers: values of the kinds that need
// them first, and statistics. Included inside the anonymous namespace of divergence-inl.h.

// The value of a pair, and centre = sum q h. With kFar by FarTokens.
template <Kind kind, bool kFar>
void ValueSweep(Row& s, Row& t, int64_t vocab, const Constants& constants, double log_z_t,
                double& value, double& centre) {
  const Constants at = constants;
  TokenBlock<kind, kFar> tokens;
  value = centre = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    WithColumns(s, t, begin, n, [&](const auto& xs, const auto& xt) PD_INLINE_LAMBDA {
      tokens.Fill(at, xs, xt, padded);
      V sum_value[2] = {Set(0), Set(0)}, sum_qh[2] = {Set(0), Set(0)};
      for (int64_t i = 0; i < padded; i += 2 * kLanes) {
        for (int u = 0; u < 2; ++u) {
          const int64_t j = i + u * kLanes;
          const Term term = TermOf<kind>(at.shape, tokens.At(at, xs(j), xt(j), j));
          sum_value[u] = sum_value[u] + term.value;
          sum_qh[u] = sum_qh[u] + term.qh;
        }
      }
      value += Sum(sum_value[0] + sum_value[1]);
      centre += Sum(sum_qh[0] + sum_qh[1]);
    });
  }
  if constexpr (kFar) {
    const double unit = FarUnit(kind, at.shape, log_z_t);
    value *= unit, centre *= unit;
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
