// adaptive_kl's weight: the share of sum abs(p - q) that lies on the teacher's head, without a
// sort. Included inside the anonymous namespace of divergence-inl.h.
//
// The head is a prefix of the tokens ordered by p: all with p > v, and the first few with p = v. v
// is the smallest value for which the mass above it is at most 1/2, found by bisection on the bits
// of p (positive floats order as integers). Each step sums the candidates between the bounds; every
// few steps those are gathered, so that later steps touch only them.

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

// Tokens that may belong to the head: p, abs(p - q), and how many, zero-padded, in their order.
struct Candidates {
  float *p, *error;
  int64_t size = 0;

  PD_INLINE void Add(M which, V x, V e) {  // may overwrite kLanes floats behind the last
    Compress(which, x, p + size);
    size += Compress(which, e, error + size);
  }
  void Pad() {
    for (; size < Padded(size); ++size) p[size] = error[size] = 0.0f;
  }
};

struct Share {
  double mass = 0, error = 0;
};

// Sums over the candidates with p in (low, high].
inline Share Between(const Candidates& c, float low, float high) {
  const V lo = Set(low), hi = Set(high);
  Share share;
  for (int64_t begin = 0; begin < c.size; begin += kBlock) {
    const int64_t end = c.size < begin + kBlock ? c.size : begin + kBlock;
    V mass[2] = {Set(0), Set(0)}, error[2] = {Set(0), Set(0)};
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        const V x = Load(c.p + i + u * kLanes);
        const M inside = And(Lt(lo, x), Le(x, hi));
        mass[u] = mass[u] + Where(inside, x);
        error[u] = error[u] + Where(inside, Load(c.error + i + u * kLanes));
      }
    }
    share.mass += Sum(mass[0] + mass[1]);
    share.error += Sum(error[0] + error[1]);
  }
  return share;
}

// Drops the candidates outside (low, high].
inline void Narrow(Candidates& c, float low, float high) {
  const V lo = Set(low), hi = Set(high);
  const int64_t size = c.size;
  c.size = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    const V x = Load(c.p + i), e = Load(c.error + i);
    c.Add(And(Lt(lo, x), Le(x, hi)), x, e);
  }
  c.Pad();
}

// `kept` has the exponentials of the sweep before, and makes room for the candidates.
double HeadShare(Row& s, Row& t, int64_t vocab, const Pair& pair, const Constants& at,
                 const Kept& kept) {
  // Tokens of this p or less have at most a quarter of the mass: v is larger.
  const float least = 0.25f / static_cast<float>(vocab);
  Candidates candidates{kept.e_t, kept.e_s};
  double total = 0;
  V largest = Set(0);
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    // Equal logits must have equal p: exponentials about another maximum are taken again.
    const auto about = [&](Row& row, float* e, float max, float row_max) {
      if (max == row_max) return;
      const float* x = row.Block(begin, n);
      for (int64_t i = 0; i < padded; i += kLanes) {
        Store(ExpNonPositive(at.k * (Load(x + i) - Set(row_max))), e + begin + i);
      }
    };
    about(s, kept.e_s, kept.max_s[begin / kBlock], pair.max_s);
    about(t, kept.e_t, kept.max_t[begin / kBlock], pair.max_t);
    V sum = Set(0);
    for (int64_t i = begin; i < begin + padded; i += kLanes) {
      const V p = Load(kept.e_t + i) * at.inverse_z_t, q = Load(kept.e_s + i) * at.inverse_z_s;
      const V error = Abs(p - q);
      sum = sum + error;
      largest = Max(p, largest);
      candidates.Add(Lt(Set(least), p), p, error);
    }
    total += Sum(sum);
  }
  if (!(total > 0)) return 0.5;
  candidates.Pad();

  uint32_t low = FloatBits(least), high = FloatBits(MaxOf(largest));
  Share head;  // of the tokens over `high`
  for (int step = 1; low + 1 < high; ++step) {
    const uint32_t middle = low + (high - low) / 2;
    const Share upper = Between(candidates, BitsFloat(middle), BitsFloat(high));
    if (head.mass + upper.mass <= 0.5) {
      head.mass += upper.mass, head.error += upper.error;
      high = middle;
    } else {
      low = middle;
    }
    if (step % 3 == 0 && candidates.size > 256) Narrow(candidates, BitsFloat(low), BitsFloat(high));
  }

  // Of the tokens with p = v, the first ones that still fit; at least the top token.
  const float v = BitsFloat(high);
  auto fit = static_cast<int64_t>((0.5 - head.mass) / v);
  if (fit < 1 && head.mass == 0) fit = 1;
  for (int64_t i = 0; i < candidates.size && fit > 0; ++i) {
    if (candidates.p[i] == v) head.error += candidates.error[i], --fit;
  }
  return head.error / total;
}
