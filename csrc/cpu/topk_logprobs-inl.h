// The K most likely tokens of a row of logits, their log-probabilities, and the mass of the rest.
// docs/ops/topk_logprobs.md has the maths.
//
// The row is read once. A token above the K-th best so far is a candidate; every other one is
// certain to be in the tail and is summed at once, as are candidates when better ones have pushed
// them out. So the tail is a sum over the complement, and no mass is ever subtracted. The maximum
// is a candidate too: what is summed never exceeds it, and exponentials need no look ahead.
#include "cpu/rows-inl.h"
#include "cpu/topk_logprobs.h"

namespace pd::PD_NAMESPACE {
namespace {

// A token as one number, larger for a larger logit and, of equal logits (0 and -0 are), for a
// smaller id.
inline uint64_t KeyOf(float x, int64_t id) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

inline float LogitOf(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int64_t IdOf(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// What a sweep knows of a row. `tail` is the sum of exp(scale (x - max)) over the tokens that are
// no candidates.
struct Sweep {
  uint64_t* candidates;
  int64_t size = 0, k;
  double scale;                 // 1 / T
  float threshold = -INFINITY;  // candidates are above it
  float max = -INFINITY;        // of all candidates so far
  double tail = 0;
};

inline float FiniteOr0(float x) { return x == -INFINITY ? 0.0f : x; }

// Adds a block's tokens up to the threshold to the tail, and marks the others in `above`, a mask a
// vector.
template <class X>
PD_INLINE void SumBelow(const Row& row, const X& x, int64_t begin, int64_t padded, Sweep& sweep,
                        uint16_t* above) {
  const V about = Set(FiniteOr0(sweep.max)), scale = Set(static_cast<float>(sweep.scale));
  const V threshold = Set(sweep.threshold), zero = Set(0.0f);
  V sum[2] = {zero, zero};
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    row.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const V logit = x(i + u * kLanes);
      const M candidate = Lt(threshold, logit);  // false for NaN, which the sum then shows
      const V e = ExpNormal(scale * (logit - about));
      sum[u] = sum[u] + Select(candidate, zero, e);
      *above++ = static_cast<uint16_t>(Bits(candidate));
    }
  }
  sweep.tail += Sum(sum[0] + sum[1]);
}

inline void RaiseMax(Sweep& sweep, float max) {
  if (!(max > sweep.max)) return;
  sweep.tail *= sweep.max == -INFINITY ? 1.0 : std::exp(sweep.scale * (double(sweep.max) - max));
  sweep.max = max;
}

// Raises the threshold to just below a number that at least k of a whole block's logits reach: the
// smallest of as many maxima of disjoint groups. Does nothing where k is too large for groups.
template <class X>
PD_INLINE void RaiseThreshold(const X& x, Sweep& sweep) {
  constexpr int64_t kVectors = kBlock / kLanes;
  const int64_t groups = (sweep.k + kLanes - 1) / kLanes;
  if (2 * groups > kVectors) return;
  V low = Set(INFINITY), max = Set(-INFINITY);
  for (int64_t g = 0; g < groups; ++g) {
    V top = Set(-INFINITY);
    for (int64_t i = g; i < kVectors; i += groups) top = Max(x(i * kLanes), top);
    low = Min(top, low), max = Max(top, max);
  }
  RaiseMax(sweep, MaxOf(max));  // before anything is summed about it
  // The next float below 0 is none where subnormals count as 0.
  const float reached = MinOf(low);
  sweep.threshold = std::fmin(std::nextafter(reached, -INFINITY), reached - 1e-30f);
}

// Takes in the marked tokens of a block.
template <class X>
PD_INLINE void Collect(const X& x, int64_t begin, int64_t padded, Sweep& sweep,
                       const uint16_t* above) {
  float max = sweep.max;
  uint64_t* out = sweep.candidates + sweep.size;
  for (int64_t i = 0; i < padded / kLanes; i += 4) {
    uint64_t any;
    std::memcpy(&any, above + i, sizeof(any));
    if (any == 0) continue;
    for (int64_t j = i; j < i + 4; ++j) {
      alignas(64) float lanes[kLanes];
      if (above[j]) Store(x(j * kLanes), lanes);
      for (unsigned bits = above[j]; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        max = lanes[lane] > max ? lanes[lane] : max;
        *out++ = KeyOf(lanes[lane], begin + j * kLanes + lane);
      }
    }
  }
  sweep.size = out - sweep.candidates;
  RaiseMax(sweep, max);
}

// Keeps the k best candidates, the last of them at the end, and adds the others to the tail.
inline void Pick(Sweep& sweep) {
  uint64_t* const kept = sweep.candidates + sweep.k;
  std::nth_element(sweep.candidates, kept - 1, sweep.candidates + sweep.size,
                   std::greater<uint64_t>());
  alignas(64) float logits[kBlock];
  const V about = Set(sweep.max), scale = Set(static_cast<float>(sweep.scale));
  for (int64_t begin = sweep.k; begin < sweep.size; begin += kBlock) {
    const int64_t n = sweep.size - begin < kBlock ? sweep.size - begin : kBlock;
    for (int64_t i = 0; i < n; ++i) logits[i] = LogitOf(sweep.candidates[begin + i]);
    for (int64_t i = n; i < Padded(n); ++i) logits[i] = -INFINITY;
    V sum = Set(0.0f);
    for (int64_t i = 0; i < Padded(n); i += kLanes) {
      sum = sum + ExpNormal(scale * (Load(logits + i) - about));
    }
    sweep.tail += Sum(sum);
  }
  sweep.size = sweep.k;
  sweep.threshold = LogitOf(kept[-1]);
}

template <class X>
PD_INLINE void Block(const Row& row, const X& x, int64_t begin, int64_t padded, int64_t limit,
                     Sweep& sweep) {
  alignas(64) uint16_t above[kBlock / kLanes];
  if (begin == 0 && padded == kBlock) RaiseThreshold(x, sweep);
  SumBelow(row, x, begin, padded, sweep, above);
  Collect(x, begin, padded, sweep, above);
  if (sweep.size > limit) Pick(sweep);
}

// log of the sum of exp(scale (x - max)) over the tokens that were not chosen, where about `max`
// those have underflowed: about their own maximum. `last` is the worst chosen token, `equal` how
// many chosen ones have its logit.
inline double FarTail(Row& row, int64_t vocab, const Sweep& sweep, float last, int64_t equal) {
  const V limit = Set(last), none = Set(-INFINITY), zero = Set(0.0f);
  const V scale = Set(static_cast<float>(sweep.scale));
  const auto blocks = [&](const auto& f) PD_INLINE_LAMBDA {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
      const float* x = row.Block(begin, n);
      for (int64_t i = 0; i < Padded(n); i += kLanes) f(Load(x + i));
    }
  };
  V top = none;
  int64_t ties = -equal;
  blocks([&](V x) PD_INLINE_LAMBDA {
    top = Max(Select(Lt(x, limit), x, none), top);
    ties += __builtin_popcount(Bits(Eq(x, limit)));
  });
  const float own = ties > 0 ? last : MaxOf(top);
  if (own == -INFINITY) return -INFINITY;
  double sum = static_cast<double>(ties);
  V part = zero;
  int64_t vectors = 0;
  blocks([&](V x) PD_INLINE_LAMBDA {
    part = part + Select(Lt(x, limit), ExpNormal(scale * (x - Set(own))), zero);
    if (++vectors % (kBlock / kLanes) == 0) sum += Sum(part), part = zero;
  });
  return std::log(sum + Sum(part)) + sweep.scale * (double(own) - sweep.max);
}

inline void Flag(const TopkLogprobsArgs& a, int64_t r) {
  for (int64_t j = r * a.k; j < (r + 1) * a.k; ++j) a.ids[j] = -1, a.logprobs[j] = NAN;
  a.tail[r] = a.lse[r] = NAN;
}

void ForwardRow(const TopkLogprobsArgs& a, int64_t r, Row& row, uint64_t* candidates) {
  const int64_t vocab = a.logits.width, limit = topk_logprobs_limit(a);
  Sweep sweep{.candidates = candidates, .k = a.k, .scale = 1.0 / a.temperature};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    if (n == kBlock && row.dtype == DType::kBf16) {
      Block(row, Bf16At{row.At<uint16_t>(begin)}, begin, n, limit, sweep);
    } else {
      Block(row, Fp32At{row.Block(begin, n)}, begin, Padded(n), limit, sweep);
    }
  }
  if (sweep.size > a.k) Pick(sweep);
  if (sweep.size == 0 || sweep.max == INFINITY || std::isnan(sweep.tail)) return Flag(a, r);
  std::sort(candidates, candidates + sweep.size, std::greater<uint64_t>());

  const double max = sweep.max;
  double rest = 0;  // of the chosen, but for the first
  for (int64_t j = sweep.size - 1; j > 0; --j) {
    rest += std::exp(sweep.scale * (LogitOf(candidates[j]) - max));
  }
  double log_tail = std::log(sweep.tail);
  if (!(sweep.tail > 1e-20)) {
    const float last = LogitOf(candidates[sweep.size - 1]);
    int64_t equal = 0;
    while (equal < sweep.size && LogitOf(candidates[sweep.size - 1 - equal]) == last) ++equal;
    log_tail = a.k < vocab ? FarTail(row, vocab, sweep, last, equal) : -INFINITY;
  }
  const double log_z = std::log1p(rest + std::exp(log_tail));  // about the maximum
  int64_t* ids = a.ids + r * a.k;
  float* logprobs = a.logprobs + r * a.k;
  for (int64_t j = 0; j < a.k; ++j) {
    const bool empty = j >= sweep.size;
    ids[j] = empty ? -1 : IdOf(candidates[j]);
    const double x = empty ? -INFINITY : sweep.scale * (LogitOf(candidates[j]) - max);
    logprobs[j] = static_cast<float>(x - log_z);
  }
  a.tail[r] = static_cast<float>(log_tail - log_z);
  a.lse[r] = static_cast<float>(sweep.scale * max + log_z);
}

}  // namespace

void topk_logprobs_forward(const TopkLogprobsArgs& a, int64_t begin, int64_t end, float* scratch) {
  const bool valid = a.temperature > 0 && std::isfinite(a.temperature);
  const int64_t bytes = a.logits.stride * ElementSize(a.logits.dtype);
  for (int64_t r = begin; r < end; ++r) {
    Row row(static_cast<const char*>(a.logits.data) + r * bytes, a.logits.dtype);
    if (valid) {
      ForwardRow(a, r, row, reinterpret_cast<uint64_t*>(scratch));
    } else {
      Flag(a, r);
    }
  }
}

}  // namespace pd::PD_NAMESPACE
