// Rows of logits in blocks: any dtype in, fp32 in the first-level cache, any dtype out.
//
// A block is at most kBlock columns, padded with -inf to a multiple of kPad, so that kernels have
// no tails: -inf on both sides of a pair adds nothing to any sum. fp32 rows are read in place
// except for their last, ragged block.
#if defined(PD_ROWS_INL_H) == defined(PD_TOGGLE)
#ifdef PD_ROWS_INL_H
#undef PD_ROWS_INL_H
#else
#define PD_ROWS_INL_H
#endif

#include "cpu/math-inl.h"
#include "cpu/rows.h"

namespace pd::PD_NAMESPACE {

inline constexpr int64_t kBlock = 1024;
inline constexpr int64_t kPad = 64;

PD_INLINE int64_t Padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// One row, and room for one block of it.
struct Row {
  Row(const char* first, DType type) : data(first), dtype(type) {}  // the buffer stays as it is

  const char* data;
  DType dtype;
  alignas(64) float buffer[kBlock];

  template <class T>
  const T* At(int64_t begin) const {
    return reinterpret_cast<const T*>(data) + begin;
  }

  // Columns [begin, begin + n), n <= kBlock, as Padded(n) floats.
  const float* Block(int64_t begin, int64_t n) {
    float unused;
    return Block<false>(begin, n, unused);
  }

  float Element(int64_t i) const {
    if (dtype == DType::kF32) return At<float>(0)[i];
    const uint16_t* p = At<uint16_t>(i);
    uint16_t alone[kLanes] = {*p};
    float wide[kLanes];
    Store(dtype == DType::kBf16 ? LoadBf16(alone) : LoadF16(alone), wide);
    return wide[0];
  }

  // Asks for the cache lines of 2 kLanes columns from `begin`, in the row or behind it: a sweep
  // calls this a block ahead, so that memory works while it computes. No branches: of narrow types
  // one line is asked for twice.
  PD_INLINE void Prefetch(int64_t begin) const {
    if constexpr (kLanes > 1) {
      const int64_t size = ElementSize(dtype);
      __builtin_prefetch(data + begin * size);
      __builtin_prefetch(data + (begin + kLanes) * size);
    }
  }

  // Block, and the block's maximum (NaN is passed over).
  const float* Block(int64_t begin, int64_t n, float& max) { return Block<true>(begin, n, max); }

 private:
  template <bool kMax>
  const float* Block(int64_t begin, int64_t n, float& max) {
    const float* block = buffer;
    V top[4] = {Set(-INFINITY), Set(-INFINITY), Set(-INFINITY), Set(-INFINITY)};
    if (dtype == DType::kF32) {
      const float* p = reinterpret_cast<const float*>(data) + begin;
      if (n % kPad == 0) {
        block = p;
      } else {
        std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(float));
        for (int64_t i = n; i < Padded(n); ++i) buffer[i] = -INFINITY;
      }
      if constexpr (kMax) {
        for (int64_t i = 0; i < Padded(n); i += 4 * kLanes) {
          for (int u = 0; u < 4; ++u) top[u] = Max(Load(block + i + u * kLanes), top[u]);
        }
      }
    } else {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + begin;
      if (dtype == DType::kBf16) {
        Widen<kMax>(p, n, [](const uint16_t* x) { return LoadBf16(x); }, top);
      } else {
        Widen<kMax>(p, n, [](const uint16_t* x) { return LoadF16(x); }, top);
      }
    }
    if constexpr (kMax) max = MaxOf(Max(Max(top[0], top[1]), Max(top[2], top[3])));
    return block;
  }

  template <bool kMax, class Convert>
  PD_INLINE void Widen(const uint16_t* p, int64_t n, const Convert& convert, V (&top)[4]) {
    const int64_t step = 4 * kLanes, whole = n / step * step;
    const auto widen = [&](const uint16_t* from, int64_t to) PD_INLINE_LAMBDA {
      for (int u = 0; u < 4; ++u) {
        const V x = convert(from + u * kLanes);
        Store(x, buffer + to + u * kLanes);
        if constexpr (kMax) top[u] = Max(x, top[u]);
      }
    };
    for (int64_t i = 0; i < whole; i += step) widen(p + i, i);
    if (whole == Padded(n)) return;
    uint16_t last[kPad];
    std::memcpy(last, p + whole, static_cast<size_t>(n - whole) * sizeof(uint16_t));
    for (int64_t i = n - whole; i < kPad; ++i) last[i] = MinusInfinity(dtype);
    for (int64_t i = 0; i < Padded(n) - whole; i += step) widen(last + i, whole + i);
  }

  static uint16_t MinusInfinity(DType dtype) { return dtype == DType::kBf16 ? 0xff80 : 0xfc00; }
};

// Where columns are read from: fp32, or bf16 to be widened.
struct Fp32At {
  const float* p;
  PD_INLINE V operator()(int64_t i) const { return Load(p + i); }
};
struct Bf16At {
  const uint16_t* p;
  PD_INLINE V operator()(int64_t i) const { return LoadBf16(p + i); }
};

// Calls f with what reads a block of s and of t, whole blocks of bf16 where they lie.
template <class F>
PD_INLINE void WithColumns(Row& s, Row& t, int64_t begin, int64_t n, const F& f) {
  if (n == kBlock && s.dtype == DType::kBf16 && t.dtype == DType::kBf16) {
    f(Bf16At{s.At<uint16_t>(begin)}, Bf16At{t.At<uint16_t>(begin)});
  } else {
    f(Fp32At{s.Block(begin, n)}, Fp32At{t.Block(begin, n)});
  }
}

// Writes a block of fp32 as `dtype`.
PD_INLINE void StoreBlock(const float* x, int64_t n, DType dtype, char* out, int64_t begin) {
  const int64_t whole = n / kLanes * kLanes;
  if (dtype == DType::kF32) {
    float* p = reinterpret_cast<float*>(out) + begin;
    if (p != x) std::memcpy(p, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* p = reinterpret_cast<uint16_t*>(out) + begin;
  uint16_t last[kLanes];
  if (dtype == DType::kBf16) {
    for (int64_t i = 0; i < whole; i += kLanes) StoreBf16(Load(x + i), p + i);
    if (whole < n) StoreBf16(Load(x + whole), last);
  } else {
    for (int64_t i = 0; i < whole; i += kLanes) StoreF16(Load(x + i), p + i);
    if (whole < n) StoreF16(Load(x + whole), last);
  }
  std::memcpy(p + whole, last, static_cast<size_t>(n - whole) * sizeof(uint16_t));
}

PD_INLINE void ZeroColumns(char* row, DType dtype, int64_t begin, int64_t end) {
  const int64_t size = ElementSize(dtype);
  std::memset(row + begin * size, 0, static_cast<size_t>((end - begin) * size));
}

}  // namespace pd::PD_NAMESPACE
#endif
