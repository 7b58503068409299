// Log-probability of one token a row and the row's entropy, forward and backward.
// docs/ops/token_logprob.md has the maths.
//
// One sweep adds up, about the maximum m so far, e = exp(k (x - m)) and e k (m - x). Elements equal
// to m are counted, not summed: where one outweighs all others by 1e8, the sum of the others is
// what both results are made of, and 1 + that sum has lost it. A block is summed about the old
// maximum while its own is being found, and again if that is above.
#include "cpu/rows-inl.h"
#include "cpu/token_logprob.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr float kFloor = -105.0f;  // where exp is 0 in fp32

// 1 / T of a row; NaN if T is out of range.
inline double InverseTemperature(const TokenArgs& a, int64_t r) {
  const double t = a.params ? double(a.params[r]) : a.temperature;
  return t > 0 && !std::isinf(t) ? 1 / t : NAN;
}

// Sums over a block: of e and of e k (x - m), and its maximum. kTies: elements equal to m are
// counted in `ties` and left out of z.
struct BlockSums {
  float z, depth, ties, top;
};

template <bool kTies, class X>
PD_INLINE BlockSums SumBlock(const Row& row, const X& x, int64_t begin, int64_t padded, float k,
                             float max) {
  const V about = Set(max == -INFINITY ? 0.0f : max), scale = Set(k), zero = Set(0.0f);
  V z[2] = {zero, zero}, depth[2] = {zero, zero}, ties = zero;
  V top[2] = {Set(-INFINITY), Set(-INFINITY)};
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    row.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const V value = x(i + u * kLanes);
      top[u] = Max(value, top[u]);
      const V d = Max(Set(kFloor), scale * (value - about));  // in this order NaN stays
      V e = ExpNonPositive(d);
      depth[u] = Fma(e, d, depth[u]);
      if constexpr (kTies) {
        const M tie = Eq(d, zero);
        ties = ties + Where(tie, Set(1.0f));
        e = Select(tie, zero, e);
      }
      z[u] = z[u] + e;
    }
  }
  return {Sum(z[0] + z[1]), Sum(depth[0] + depth[1]), Sum(ties), MaxOf(Max(top[0], top[1]))};
}

// A row's maximum m, how many elements equal it, and the sums of e of the others and of
// e k (m - x).
struct RowSums {
  float max = -INFINITY;
  double ties = 0, rest = 0, depth = 0;

  void Raise(float top, double k) {
    const double all = rest + ties;
    if (all > 0) {
      const double gap = k * (double(top) - max), factor = std::exp(-gap);
      depth = factor > 0 ? factor * (depth + all * gap) : 0;
      rest = factor * all;
    }
    ties = 0;
    max = top;
  }

  void Add(const BlockSums& block) {
    rest += block.z;
    depth -= block.depth;
    ties += block.ties;
  }

  double LogZ() const { return std::log1p(rest + (ties - 1)); }
  double Depth() const { return depth / (rest + ties); }
};

inline RowSums SumRow(Row& row, int64_t vocab, double inverse) {
  const float k = static_cast<float>(inverse);
  RowSums sums;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    if (n == kBlock && row.dtype != DType::kF16 && std::isfinite(sums.max)) {
      const BlockSums block =
          row.dtype == DType::kF32
              ? SumBlock<false>(row, Fp32At{row.At<float>(begin)}, begin, padded, k, sums.max)
              : SumBlock<false>(row, Bf16At{row.At<uint16_t>(begin)}, begin, padded, k, sums.max);
      if (block.top <= sums.max) {
        sums.Add(block);
        continue;
      }
    }
    float top;
    const Fp32At x{row.Block(begin, n, top)};
    if (top > sums.max) sums.Raise(top, inverse);
    sums.Add(top == sums.max ? SumBlock<true>(row, x, begin, padded, k, sums.max)
                             : SumBlock<false>(row, x, begin, padded, k, sums.max));
  }
  return sums;
}

inline const char* RowData(const TokenArgs& a, int64_t r) {
  return static_cast<const char*>(a.logits.data) +
         r * a.logits.stride * ElementSize(a.logits.dtype);
}

// Writes a row block by block; f(begin, n, buffer) fills Padded(n) floats.
template <class F>
PD_INLINE void WriteRow(const TokenArgs& a, char* out, const F& f) {
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < a.logits.width; begin += kBlock) {
    const int64_t n = a.logits.width - begin < kBlock ? a.logits.width - begin : kBlock;
    f(begin, n, buffer);
    StoreBlock(buffer, n, a.logits.dtype, out, begin);
  }
}

// q (c + slope d) over the row, with d = k (x - m).
template <bool kEntropy>
void WriteGradient(const TokenArgs& a, Row& row, float k, float max, float c, float slope,
                   char* out) {
  const V scale = Set(k), about = Set(max), constant = Set(c), by = Set(slope);
  WriteRow(a, out, [&](int64_t begin, int64_t n, float* buffer) PD_INLINE_LAMBDA {
    WithColumns(row, row, begin, n, [&](const auto& x, const auto&) PD_INLINE_LAMBDA {
      for (int64_t i = 0; i < Padded(n); i += 2 * kLanes) {
        row.Prefetch(begin + kBlock + i);
        for (int u = 0; u < 2; ++u) {
          const int64_t j = i + u * kLanes;
          const V d = Max(Set(kFloor), scale * (x(j) - about)), e = ExpNonPositive(d);
          Store(e * (kEntropy ? Fma(by, d, constant) : constant), buffer + j);
        }
      }
    });
  });
}

inline void BackwardRow(const TokenArgs& a, int64_t r, char* out) {
  const float* saved = a.saved + r * kTokenSaved;
  const double k = InverseTemperature(a, r), log_z = saved[kTokenLogZ];
  if (saved[kTokenStatus] != 0.0f) {
    WriteRow(a, out, [](int64_t, int64_t, float* buffer) {
      for (int64_t i = 0; i < kBlock; ++i) buffer[i] = NAN;
    });
    return;
  }
  Row row(RowData(a, r), a.logits.dtype);
  const float max = saved[kTokenMax];
  const double up = k * a.grad_logprob[r], up_entropy = k * a.grad_entropy[r];
  const double depth = saved[kTokenDepth], inverse_z = std::exp(-log_z);
  const int64_t id = a.ids[r];
  const bool here = id >= 0 && id < a.logits.width;
  const double d = here ? k * (double(row.Element(id)) - max) : 0;  // `out` may be the row itself
  const auto c = static_cast<float>(-inverse_z * (up + up_entropy * depth));
  if (up_entropy == 0) {
    WriteGradient<false>(a, row, static_cast<float>(k), max, c, 0.0f, out);
  } else {
    const auto slope = static_cast<float>(-inverse_z * up_entropy);
    WriteGradient<true>(a, row, static_cast<float>(k), max, c, slope, out);
  }
  if (!here) return;
  const double q = std::exp(double(saved[kTokenLogprob]));
  const double soft = q > 0 ? q * (d + depth) : 0;
  alignas(64) float alone[kLanes] = {
      static_cast<float>(-up * std::expm1(double(saved[kTokenLogprob])) - up_entropy * soft)};
  StoreBlock(alone, 1, a.logits.dtype, out, id);
}

}  // namespace

inline void token_logprob_forward(const TokenArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    float* saved = a.saved + r * kTokenSaved;
    if (a.counted != nullptr && !a.counted[r]) {
      a.logprob[r] = a.entropy[r] = 0.0f;
      for (int i = 0; i < kTokenSaved; ++i) saved[i] = 0.0f;
      continue;
    }
    Row row(RowData(a, r), a.logits.dtype);
    const double k = InverseTemperature(a, r);
    const RowSums sums = SumRow(row, a.logits.width, k);
    const bool inside = a.ids[r] >= 0 && a.ids[r] < a.logits.width;
    const double log_z = std::isfinite(sums.max) ? sums.LogZ() : NAN, depth = sums.Depth();
    const double token = inside ? k * (double(row.Element(a.ids[r])) - sums.max) - log_z : NAN;
    a.logprob[r] = static_cast<float>(token);
    a.entropy[r] = static_cast<float>(inside ? log_z + depth : NAN);
    saved[kTokenMax] = sums.max;
    saved[kTokenLogZ] = static_cast<float>(log_z);
    saved[kTokenDepth] = static_cast<float>(depth);
    saved[kTokenLogprob] = a.logprob[r];
    saved[kTokenStatus] = static_cast<float>(inside ? kTokenSound : kTokenIdOutOfRange);
  }
}

inline void token_logprob_backward(const TokenArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    char* out = static_cast<char*>(a.grad) + r * a.grad_stride * ElementSize(a.logits.dtype);
    if (a.grad_logprob[r] == 0.0f && a.grad_entropy[r] == 0.0f) {
      ZeroColumns(out, a.logits.dtype, 0, a.logits.width);
    } else {
      BackwardRow(a, r, out);
    }
  }
}

}  // namespace pd::PD_NAMESPACE
