// adaptive_kl's weight: the share of sum abs(p - q) that lies on the teacher's head, without a
// sort. Included inside the anonymous namespace of divergence-inl.h.
//
// The head is a prefix of the tokens ordered by p: all with p > v, and the first few with p = v. v
// is the smallest value for which the mass above it is at most 1/2, found by bisection on the bits
// of p (positive floats order as integers). Each step sums the candidates between the bounds; after
// a few steps the candidates are gathered, so that later steps touch only them.

inline uint32_t FloatBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float BitsFloat(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The mass of p[0, n) in (low, high]; n is a multiple of kPad.
inline double MassBetween(const float* p, int64_t n, float low, float high) {
  const V lo = Set(low), hi = Set(high);
  double mass = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n < begin + kBlock ? n : begin + kBlock;
    V sum[2] = {Set(0), Set(0)};
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        const V x = Load(p + i + u * kLanes);
        sum[u] = sum[u] + Where(And(Lt(lo, x), Le(x, hi)), x);
      }
    }
    mass += Sum(sum[0] + sum[1]);
  }
  return mass;
}

// Moves the elements of p[0, n) in (low, high] to `to` (which may be p), zero-padded.
inline int64_t Gather(const float* p, int64_t n, float low, float high, float* to) {
  const V lo = Set(low), hi = Set(high);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const V x = Load(p + i);
    for (unsigned bits = Bits(And(Lt(lo, x), Le(x, hi))); bits; bits &= bits - 1) {
      to[kept++] = p[i + __builtin_ctz(bits)];
    }
  }
  const int64_t padded = Padded(kept);
  for (int64_t i = kept; i < padded; ++i) to[i] = 0.0f;
  return padded;
}

double HeadShare(Row& s, Row& t, int64_t vocab, const Constants& at, float* scratch) {
  const int64_t padded_vocab = Padded(vocab);
  float *p = scratch, *candidates = scratch + padded_vocab;
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const float *bs = s.Block(begin, n), *bt = t.Block(begin, n);
    V error = Set(0);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const V x = at.P(Load(bt + i));
      Store(x, p + begin + i);
      error = error + Abs(x - at.Q(Load(bs + i)));
    }
    total += Sum(error);
  }
  if (!(total > 0)) return 0.5;

  const float top = MaxOf(at.inverse_z_t);  // the largest p
  uint32_t low = FloatBits(0.25f / static_cast<float>(vocab)), high = FloatBits(top);
  double above = 0;  // the mass over `high`
  const float* list = p;
  int64_t size = padded_vocab;
  for (int step = 0; low + 1 < high; ++step) {
    if (step == 4 || (step > 4 && step % 3 == 0 && size > 256)) {
      size = Gather(list, size, BitsFloat(low), BitsFloat(high), candidates);
      list = candidates;
    }
    const uint32_t middle = low + (high - low) / 2;
    const double mass = MassBetween(list, size, BitsFloat(middle), BitsFloat(high));
    if (above + mass <= 0.5) {
      above += mass;
      high = middle;
    } else {
      low = middle;
    }
  }
  const float edge = BitsFloat(high);  // the smallest v with at most 1/2 above it

  // The head's error; of the tokens at the edge, the first ones that still fit (at least the top
  // one).
  double head = 0;
  int64_t fit = top == edge && above == 0 ? 1 : 0;
  const auto more = static_cast<int64_t>((0.5 - above) / edge);
  fit = more > fit ? more : fit;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    const float* bs = nullptr;
    V sum = Set(0);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const V x = Load(p + begin + i);
      const M over = Lt(Set(edge), x);
      const unsigned on_edge = Bits(Eq(x, Set(edge)));
      if (Bits(over) == 0 && on_edge == 0) continue;  // the head is a few tokens
      if (bs == nullptr) bs = s.Block(begin, n);
      const V error = Abs(x - at.Q(Load(bs + i)));
      sum = sum + Where(over, error);
      for (unsigned bits = on_edge; bits && fit > 0; bits &= bits - 1, --fit) {
        float lanes[kLanes];
        Store(error, lanes);
        head += lanes[__builtin_ctz(bits)];
      }
    }
    head += Sum(sum);
  }
  return head / total;
}
