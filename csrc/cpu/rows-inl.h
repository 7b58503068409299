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
  const char* data;
  DType dtype;
  alignas(64) float buffer[kBlock];

  // Columns [begin, begin + n), n <= kBlock, as Padded(n) floats.
  const float* Block(int64_t begin, int64_t n) {
    const int64_t whole = n / kLanes * kLanes;
    if (dtype == DType::kF32) {
      const float* p = reinterpret_cast<const float*>(data) + begin;
      if (n % kPad == 0) return p;
      std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(float));
    } else {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + begin;
      const uint16_t* tail = p + whole;
      uint16_t last[kLanes] = {};
      std::memcpy(last, tail, static_cast<size_t>(n - whole) * sizeof(uint16_t));
      if (dtype == DType::kBf16) {
        for (int64_t i = 0; i < whole; i += kLanes) Store(LoadBf16(p + i), buffer + i);
        if (whole < n) Store(LoadBf16(last), buffer + whole);
      } else {
        for (int64_t i = 0; i < whole; i += kLanes) Store(LoadF16(p + i), buffer + i);
        if (whole < n) Store(LoadF16(last), buffer + whole);
      }
    }
    for (int64_t i = n; i < Padded(n); ++i) buffer[i] = -INFINITY;
    return buffer;
  }
};

PD_INLINE float BlockMax(const float* x, int64_t n) {
  V m[4] = {Set(-INFINITY), Set(-INFINITY), Set(-INFINITY), Set(-INFINITY)};
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) m[u] = Max(Load(x + i + u * kLanes), m[u]);  // NaN is passed over
  }
  return MaxOf(Max(Max(m[0], m[1]), Max(m[2], m[3])));
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

PD_INLINE int64_t ElementSize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

PD_INLINE void ZeroColumns(char* row, DType dtype, int64_t begin, int64_t end) {
  const int64_t size = ElementSize(dtype);
  std::memset(row + begin * size, 0, static_cast<size_t>((end - begin) * size));
}

}  // namespace pd::PD_NAMESPACE
#endif
