// A warped row of logits: its maximum, the cut of its filters, and the mass of every block of 1024
// columns. docs/ops/verify.md has the definitions.
//
// Blocks are summed alone and added in order, so a row's numbers do not depend on how its blocks
// were spread over threads.
#if defined(PD_VERIFY_WARP_INL_H) == defined(PD_TOGGLE)
#ifdef PD_VERIFY_WARP_INL_H
#undef PD_VERIFY_WARP_INL_H
#else
#define PD_VERIFY_WARP_INL_H
#endif

#include "cpu/rows-inl.h"
#include "cpu/verify.h"

namespace pd::PD_NAMESPACE {
namespace {

static_assert(kBlock == kVerifyColumns);

// Sums of a block are kept in 64 parts, whatever the width of a vector: few additions each, so that
// a token of probability 1 - 1e-5 keeps the digits of what is beside it.
inline constexpr int kParts = kPad / kLanes;

PD_INLINE double Total(const V* parts, int n) {
  V sum[kParts];
  for (int u = 0; u < n; ++u) sum[u] = parts[u];
  for (int step = n / 2; step > 0; step /= 2) {
    for (int u = 0; u < step; ++u) sum[u] = sum[u] + sum[u + step];
  }
  return Sum(sum[0]);
}

// e^x in fp64, to 2 ulp, for x <= 0; 0 below -700. In plain C++, for loops that compilers
// vectorise.
PD_INLINE double ExpExact(double x) {
  constexpr double kTerms[] = {1.0 / 6227020800,
                               1.0 / 479001600,
                               1.0 / 39916800,
                               1.0 / 3628800,
                               1.0 / 362880,
                               1.0 / 40320,
                               1.0 / 5040,
                               1.0 / 720,
                               1.0 / 120,
                               1.0 / 24,
                               1.0 / 6,
                               0.5,
                               1.0};
  const double kept = x > -700.0 ? x : -700.0, magic = 0x1.8p52;
  const double shifted = kept * 1.4426950408889634 + magic, n = shifted - magic;
  const double r = (kept - n * 0x1.62e42feep-1) - n * 1.9082149292705877e-10;
  double p = kTerms[0];
  for (int i = 1; i < 13; ++i) p = p * r + kTerms[i];
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return x > -700.0 ? (p * r + 1.0) * power : 0.0;
}

// A row in memory, and what is added to it. A row that is known on a few tokens is -inf on all
// others; its tokens lie in `entries`, by block.
struct Place {
  const char* data;
  DType dtype;
  const float* bias;  // or null
  int64_t vocab;
  const int32_t* starts = nullptr;  // [blocks + 1], where a block's entries begin; null: all tokens
  const SupportEntry* entries = nullptr;

  int64_t Blocks() const { return (vocab + kBlock - 1) / kBlock; }
  int64_t Tokens() const { return starts == nullptr ? vocab : starts[Blocks()]; }
};

// Sorts the tokens of a row by block, in O(S + V / 1024); ids below 0 mark empty slots. False where
// an id is outside the vocabulary or comes twice.
inline bool SortSupport(Place& place, const int64_t* ids, int64_t count, int32_t* starts,
                        SupportEntry* entries) {
  const int64_t blocks = place.Blocks();
  std::fill(starts, starts + blocks + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= place.vocab) return false;
    if (ids[i] >= 0) ++starts[ids[i] / kBlock];
  }
  for (int64_t b = 0; b < blocks; ++b) starts[b + 1] += starts[b];  // the ends, of which each is
  const Row row(place.data, place.dtype);                           // lowered to its begin
  for (int64_t i = count - 1; i >= 0; --i) {
    if (ids[i] < 0) continue;
    entries[--starts[ids[i] / kBlock]] = {static_cast<int32_t>(ids[i]), row.Element(i)};
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if (starts[b + 1] - starts[b] < 2) continue;
    uint64_t seen[kBlock / 64] = {};
    for (int64_t i = starts[b]; i < starts[b + 1]; ++i) {
      const int64_t column = entries[i].id - b * kBlock;
      const uint64_t bit = uint64_t{1} << (column % 64);
      if (seen[column / 64] & bit) return false;
      seen[column / 64] |= bit;
    }
  }
  place.starts = starts, place.entries = entries;
  return true;
}

// Opens blocks of a row, -inf behind its end.
class Reader {
 public:
  explicit Reader(const Place& place) : place_(place), row_(place.data, place.dtype) {}

  // Whether a block is -inf throughout, because none of its tokens is known.
  bool Empty(int64_t block) const {
    return place_.starts != nullptr && place_.starts[block] == place_.starts[block + 1];
  }

  const float* Block(int64_t block) {
    const int64_t begin = block * kBlock, n = Columns(block);
    if (place_.starts != nullptr) {
      std::fill(sum_, sum_ + Padded(n), -INFINITY);
      for (int32_t i = place_.starts[block]; i < place_.starts[block + 1]; ++i) {
        sum_[place_.entries[i].id - begin] = place_.entries[i].logit;
      }
      return sum_;
    }
    const float* x = row_.Block(begin, n);
    if (place_.bias == nullptr) return x;
    const float* bias = place_.bias + begin;
    for (int64_t i = 0; i < n; ++i) sum_[i] = x[i] + bias[i];
    for (int64_t i = n; i < Padded(n); ++i) sum_[i] = -INFINITY;
    return sum_;
  }

  int64_t Columns(int64_t block) const {
    const int64_t left = place_.vocab - block * kBlock;
    return left < kBlock ? left : kBlock;
  }

  int64_t Width(int64_t block) const { return Padded(Columns(block)); }

  // Asks for kPad columns from `column`, in the row or behind it.
  PD_INLINE void Prefetch(int64_t column) const {
    if (place_.starts != nullptr) return;
    for (int64_t i = 0; i < kPad; i += 2 * kLanes) row_.Prefetch(column + i);
  }

  float Element(int64_t i) const {
    if (place_.starts != nullptr) {
      const SupportEntry* end = place_.entries + place_.starts[i / kBlock + 1];
      const SupportEntry* found =
          std::find_if(place_.entries + place_.starts[i / kBlock], end,
                       [i](const SupportEntry& entry) { return entry.id == i; });
      return found == end ? -INFINITY : found->logit;
    }
    return row_.Element(i) + (place_.bias == nullptr ? 0.0f : place_.bias[i]);
  }

 private:
  Place place_;
  Row row_;
  alignas(64) float sum_[kBlock];
};

// Blocks over threads, where there are enough of them to be worth it.
template <class F>
PD_INLINE void Spread(VerifySpread spread, int64_t blocks, const F& f) {
  if (spread == nullptr || blocks < 32) return f(0, blocks);
  spread(
      blocks,
      [](void* state, int64_t begin, int64_t end) { (*static_cast<const F*>(state))(begin, end); },
      const_cast<F*>(&f));
}

// A token of logit x has probability exp(scale (x - max)) / total where x >= cut, else 0; or all of
// it is at `point`.
struct Warped {
  Place place;
  double* masses;  // exp(scale (x - max)), summed over each block
  double scale = 1, total = 0;
  float max = -INFINITY, cut = -INFINITY;
  int64_t point = -1;
  bool sound = true;

  double Probability(float x) const { return x >= cut ? Weight(x) / total : 0.0; }
  double Weight(float x) const { return std::exp(scale * (double(x) - max)); }
  double LogNormaliser() const { return scale * max + std::log(total); }
};

// The probability of a token, and its logarithm.
inline double ProbabilityOf(const Warped& w, int64_t id) {
  if (w.point >= 0) return id == w.point;
  return w.Probability(Reader(w.place).Element(id));
}

inline double LogProbabilityOf(const Warped& w, int64_t id) {
  if (w.point >= 0) return id == w.point ? 0.0 : -INFINITY;
  const float x = Reader(w.place).Element(id);
  return x >= w.cut ? w.scale * (double(x) - w.max) - std::log(w.total) : -INFINITY;
}

// 1 / T as two floats: in one it would bend every mass the same way.
struct Scale {
  explicit Scale(double scale)
      : high(Set(static_cast<float>(scale))),
        low(Set(static_cast<float>(scale - static_cast<float>(scale)))) {}
  PD_INLINE V operator*(V x) const { return Fma(x, high, Max(x, Set(-1e30f)) * low); }
  V high, low;
};

// exp(scale (x - max)) of what is kept.
struct WeightAt {
  explicit WeightAt(const Warped& w) : scale(w.scale), max(Set(w.max)), cut(Set(w.cut)) {}
  PD_INLINE V Distance(V x) const { return scale * (x - max); }
  PD_INLINE V operator()(V x) const { return Where(Le(cut, x), ExpNonPositive(Distance(x))); }
  Scale scale;
  V max, cut;
};

inline double SumOf(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// What kernels keep of a row while they look for its cut.
struct Search {
  double* counts;     // [blocks, kVerifyPivots]
  double* masses;     // the same
  float* candidates;  // [kVerifyCandidates + a block]
};

// The one read of memory: maximum and mass of a row without filters.
inline void ReadRow(Warped& w, VerifySpread spread, double* maxima) {
  const int64_t blocks = w.place.Blocks();
  const Scale scale(w.scale);
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader reader(w.place);
    for (int64_t b = begin; b < end; ++b) {
      maxima[b] = -INFINITY, w.masses[b] = 0;
      if (reader.Empty(b)) continue;
      const float* x = reader.Block(b);
      const int64_t width = reader.Width(b);
      V top[kParts], sum[kParts];
      for (int u = 0; u < kParts; ++u) top[u] = Set(-INFINITY), sum[u] = Set(0.0f);
      for (int64_t i = 0; i < width; i += kPad) {
        for (int u = 0; u < kParts; ++u) top[u] = Max(Load(x + i + u * kLanes), top[u]);
      }
      for (int u = 1; u < kParts; ++u) top[0] = Max(top[u], top[0]);
      const float max = MaxOf(top[0]);
      const V about = Set(max == -INFINITY ? 0.0f : max);  // NaN passes Max and shows in the sum
      for (int64_t i = 0; i < width; i += kPad) {
        reader.Prefetch((b + 1) * kBlock + i);
        for (int u = 0; u < kParts; ++u) {
          sum[u] = sum[u] + ExpNonPositive(scale * (Load(x + i + u * kLanes) - about));
        }
      }
      maxima[b] = max;
      w.masses[b] = Total(sum, kParts);
    }
  });
  double max = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) {
    max = maxima[b] > max ? maxima[b] : max;
    w.sound = w.sound && !std::isnan(w.masses[b]);
  }
  w.sound = w.sound && std::isfinite(max);
  if (!w.sound) return;
  w.max = static_cast<float>(max);
  for (int64_t b = 0; b < blocks; ++b) {
    w.masses[b] *= maxima[b] == -INFINITY ? 0.0 : std::exp(w.scale * (maxima[b] - max));
  }
  w.total = SumOf(w.masses, blocks);
}

// Masses of the blocks once the cut is known.
inline void SumKept(Warped& w, VerifySpread spread) {
  const int64_t blocks = w.place.Blocks();
  const WeightAt weight(w);
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader reader(w.place);
    for (int64_t b = begin; b < end; ++b) {
      w.masses[b] = 0;
      if (reader.Empty(b)) continue;
      const float* x = reader.Block(b);
      const int64_t width = reader.Width(b);
      V sum[kParts];
      for (int u = 0; u < kParts; ++u) sum[u] = Set(0.0f);
      for (int64_t i = 0; i < width; i += kPad) {
        for (int u = 0; u < kParts; ++u) sum[u] = sum[u] + weight(Load(x + i + u * kLanes));
      }
      w.masses[b] = Total(sum, kParts);
    }
  });
  w.total = SumOf(w.masses, blocks);
}

// Floats in their order as integers, and back.
inline int64_t OrderOf(float x) {
  int32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return bits >= 0 ? bits : -int64_t(bits & 0x7fffffff);
}

inline float FloatAt(int64_t order) {
  const uint32_t bits =
      order >= 0 ? static_cast<uint32_t>(order) : static_cast<uint32_t>(-order) | 0x80000000u;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Counts and masses above each pivot, pivots rising, of what the row keeps; sums over all blocks.
inline void PassPivots(const Warped& w, VerifySpread spread, const float* pivots, const Search& s,
                       double* count, double* mass) {
  constexpr int64_t kP = kVerifyPivots;
  const int64_t blocks = w.place.Blocks();
  const WeightAt weight(w);
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader reader(w.place);
    const V one = Set(1.0f);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t j = 0; j < kP; ++j) s.counts[b * kP + j] = s.masses[b * kP + j] = 0;
      if (reader.Empty(b)) continue;
      const float* at = reader.Block(b);
      V counts[kP], masses[kP], bounds[kP];
      for (int64_t j = 0; j < kP; ++j) {
        counts[j] = masses[j] = Set(0.0f), bounds[j] = Set(pivots[j]);
      }
      for (int64_t i = 0; i < reader.Width(b); i += kLanes) {
        const V x = Load(at + i), e = weight(x);
        for (int64_t j = 0; j < kP; ++j) {
          const M above = Lt(bounds[j], x);
          counts[j] = counts[j] + Where(above, one);
          masses[j] = masses[j] + Where(above, e);
        }
      }
      for (int64_t j = 0; j < kP; ++j) {
        s.counts[b * kP + j] = Sum(counts[j]), s.masses[b * kP + j] = Sum(masses[j]);
      }
    }
  });
  for (int64_t j = 0; j < kP; ++j) {
    count[j] = mass[j] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      count[j] += s.counts[b * kP + j], mass[j] += s.masses[b * kP + j];
    }
  }
}

// exp(scale (x - max)) of what is kept, in fp64; no vector type, see ExpExact.
struct WeightExactly {
  explicit WeightExactly(const Warped& w) : scale(w.scale), max(w.max), cut(w.cut) {}
  PD_INLINE double operator()(float x) const {
    const double e = ExpExact(scale * (double(x) - max));
    return x >= cut ? e : 0.0;
  }
  double scale, max;
  float cut;
};

// The row's mass in fp64, and the masses above `count` of the pivots.
inline double PassExactly(const Warped& w, VerifySpread spread, const float* pivots, int64_t count,
                          const Search& s, double* mass) {
  constexpr int64_t kP = kVerifyPivots, kSide = 8;
  const int64_t blocks = w.place.Blocks();
  const WeightExactly weight(w);
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader reader(w.place);
    double e[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      s.counts[b] = 0;
      for (int64_t j = 0; j < count; ++j) s.masses[b * kP + j] = 0;
      if (reader.Empty(b)) continue;
      const float* x = reader.Block(b);
      const int64_t width = reader.Width(b);
      for (int64_t i = 0; i < width; ++i) e[i] = weight(x[i]);
      double whole[kSide] = {};
      for (int64_t i = 0; i < width; i += kSide) {
        for (int u = 0; u < kSide; ++u) whole[u] += e[i + u];
      }
      s.counts[b] = SumOf(whole, kSide);
      for (int64_t j = 0; j < count; ++j) {
        double above[kSide] = {};
        for (int64_t i = 0; i < width; i += kSide) {
          for (int u = 0; u < kSide; ++u) above[u] += x[i + u] > pivots[j] ? e[i + u] : 0.0;
        }
        s.masses[b * kP + j] = SumOf(above, kSide);
      }
    }
  });
  for (int64_t j = 0; j < count; ++j) {
    mass[j] = 0;
    for (int64_t b = 0; b < blocks; ++b) mass[j] += s.masses[b * kP + j];
  }
  return SumOf(s.counts, blocks);
}

// What a search for a cut asks of the weight above a logit: less than `limit`, in tokens (top-k) or
// in mass (top-p). Masses of fp32 terms decide where they are further than `doubt` from the limit.
struct Bound {
  bool by_mass;
  double limit, doubt;
};

// The smallest of the falling candidates with less than the limit above it; `above` is the weight
// above all of them, `top` what is returned for none. `sure`: no comparison was in doubt.
inline float Walk(const Warped& w, const float* candidates, int64_t size, double above, float top,
                  const Bound& bound, bool& sure) {
  sure = true;
  for (int64_t i = 0; i < size;) {
    sure = sure && !(std::fabs(above - bound.limit) <= bound.doubt);
    if (!(above < bound.limit)) break;
    top = candidates[i];
    for (; i < size && candidates[i] == top; ++i) above += bound.by_mass ? w.Weight(top) : 1.0;
  }
  sure = sure && !(std::fabs(above - bound.limit) <= bound.doubt);
  return top;
}

// The smallest logit v, at least the row's cut, for which less than the limit of what the row keeps
// lies above v; `share` is the limit over the row's mass, for top-p.
//
// v is bracketed between orders (low, high]: less than the limit lies above high, not so above low.
// A pass gives the weights above seven pivots between them, the first time spaced as logits are,
// then evenly. What is left between them is sorted once it is little. A pivot whose mass is in
// doubt moves neither end; where that stops the search, or leaves its end in doubt, masses are
// summed again in fp64. So the kept set is the one of exact sums.
inline float FindCut(const Warped& w, VerifySpread spread, bool by_mass, double share,
                     const Search& s) {
  constexpr int64_t kP = kVerifyPivots;
  constexpr double kFirst[kP] = {INFINITY, 16, 11, 7.5, 5, 3, 1.5};
  Bound bound{by_mass, by_mass ? share * w.total : share, by_mass ? 5e-7 * w.total : 0.0};
  int64_t low = OrderOf(w.cut) - 1, high = OrderOf(w.max);
  double above_high = 0, tokens_above_high = 0, tokens_above_low = INFINITY;
  float pivots[kP];
  double count[kP], mass[kP];
  for (bool first = true;
       high - low > 1 && tokens_above_low - tokens_above_high > kVerifyCandidates; first = false) {
    int64_t orders[kP];
    for (int64_t j = 0; j < kP; ++j) {
      orders[j] = low + (high - low) * (j + 1) / (kP + 1);
      if (first) orders[j] = OrderOf(static_cast<float>(w.max - kFirst[j] / w.scale));
      orders[j] = orders[j] <= low ? low + 1 : (orders[j] > high ? high : orders[j]);
      pivots[j] = FloatAt(orders[j]);
    }
    PassPivots(w, spread, pivots, s, count, mass);
    if (by_mass && bound.doubt == 0) PassExactly(w, spread, pivots, kP, s, mass);
    const double* weights = by_mass ? mass : count;
    const int64_t before = high - low;
    int64_t j = kP - 1;
    for (; j >= 0 && weights[j] < bound.limit - bound.doubt; --j) {
      high = orders[j], above_high = weights[j], tokens_above_high = count[j];
    }
    for (; j >= 0 && !(weights[j] > bound.limit + bound.doubt) && bound.doubt > 0; --j) {
    }
    if (j >= 0) low = orders[j], tokens_above_low = count[j];
    if (high - low == before && bound.doubt > 0) {
      bound = {true, share * PassExactly(w, spread, pivots, 0, s, mass), 0.0};
      low = OrderOf(w.cut) - 1, high = OrderOf(w.max);
      above_high = tokens_above_high = 0, tokens_above_low = INFINITY;
    }
  }
  const float top = FloatAt(high);
  if (high - low <= 1) return top;

  Reader reader(w.place);
  const int64_t blocks = w.place.Blocks();
  const V bottom = Set(FloatAt(low + 1)), highest = Set(top);
  int64_t size = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (reader.Empty(b)) continue;
    const float* at = reader.Block(b);
    for (int64_t i = 0; i < reader.Width(b); i += kLanes) {
      const V x = Load(at + i);
      const M between = And(Le(bottom, x), Le(x, highest));
      if (Bits(between)) size += Compress(between, x, s.candidates + size);
    }
  }
  std::sort(s.candidates, s.candidates + size, std::greater<float>());
  bool sure;
  const float cut = Walk(w, s.candidates, size, above_high, top, bound, sure);
  if (sure || bound.doubt == 0) return cut;
  bound = {true, share * PassExactly(w, spread, &top, 1, s, mass), 0.0};
  return Walk(w, s.candidates, size, mass[0], top, bound, sure);
}

// Everything about a row from its place and its warpers; `maxima` has a number a block.
inline Warped Warp(const Place& place, const double* warpers, VerifySpread spread, double* masses,
                   const Search& s) {
  Warped w{.place = place, .masses = masses};
  const bool greedy = warpers[kTemperature] == 0;
  w.scale = greedy ? 1.0 : 1.0 / warpers[kTemperature];
  ReadRow(w, spread, s.counts);
  if (!w.sound) return w;
  if (greedy) {
    const int64_t blocks = place.Blocks();
    Reader reader(place);
    for (int64_t b = 0; b < blocks && w.point < 0; ++b) {
      if (s.counts[b] != w.max) continue;
      const float* x = reader.Block(b);
      for (int64_t i = 0; i < reader.Columns(b) && w.point < 0; ++i) {
        if (x[i] == w.max) w.point = b * kBlock + i;
      }
    }
    return w;
  }
  const double top_k = warpers[kTopK], top_p = warpers[kTopP], log_min_p = warpers[kLogMinP];
  if (top_k > 0 && top_k < static_cast<double>(place.Tokens())) {
    w.cut = FindCut(w, spread, false, top_k, s);
    if (top_p < 1) SumKept(w, spread);
  }
  if (top_p < 1) w.cut = FindCut(w, spread, true, top_p, s);
  // The smallest float that min_p keeps: the bound itself is fp64.
  const double bound = w.max + warpers[kTemperature] * log_min_p;
  auto least = static_cast<float>(bound);
  if (least < bound) least = std::nextafter(least, INFINITY);
  w.cut = least > w.cut ? least : w.cut;
  if (w.cut > -INFINITY) SumKept(w, spread);
  return w;
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
