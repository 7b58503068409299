// A tile of a matrix product in vector registers: two vectors of b and a number of each row of a a
// step, which are fp32 or pairs of bf16 (vdpbf16ps), from panels packed step after step.
#if defined(PD_GEMM_VECTOR_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_VECTOR_INL_H
#undef PD_GEMM_VECTOR_INL_H
#else
#define PD_GEMM_VECTOR_INL_H
#endif

#include "cpu/gemm_pack-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

template <bool kPairs>
struct VectorTile {
  // The accumulators, a row of b and one broadcast fill the registers: 16 on AVX2, 32 on AVX-512.
#if PD_TARGET >= PD_TARGET_AVX512
  static constexpr int kRows = 12, kVectors = 2;
#elif PD_TARGET == PD_TARGET_AVX2
  static constexpr int kRows = 6, kVectors = 2;
#else
  static constexpr int kRows = 4, kVectors = 4;
#endif
  static constexpr bool kTransposes = false;  // the result
  static constexpr bool kFetchesB = true;     // needs the next panel of b prefetched
  static constexpr int kColumns = kVectors * kLanes;
  static constexpr int64_t kUnit = 1;  // of steps
  struct Registers {};

  static bool InPlace(const Lines&, int64_t, int64_t, int64_t) { return false; }
  static const float* LeftInPlace(const Lines&, int64_t, int64_t) { return nullptr; }
  static const float* Left(const float* packed) { return packed; }

  static void PackA(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                    float* to) {
    PackPanels<kRows>(x, kPairs, panel, panels, k0, steps, to);
  }
  static void PackB(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                    float* to) {
    PackPanels<kColumns>(x, kPairs, panel, panels, k0, steps, to);
  }

  // Over one block of the depth, of `depth` steps. `sums` holds the blocks before it (`add`) and
  // takes the result, unless `to` is where the tile is finished.
  static void Accumulate(const float* a, const float* b, int64_t depth, float* sums, bool add,
                         const float*, const Ahead&, int64_t rows, const Corner* to) {
    kByRows<std::make_integer_sequence<int, kRows>>[rows - 1](a, b, depth, sums, add, to);
  }

 private:
  template <int kHeight>
  static __attribute__((noinline)) void AccumulateRows(const float* a, const float* b,
                                                       int64_t depth, float* sums, bool add,
                                                       const Corner* to) {
    V sum[kHeight][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Set(0.0f);
      if (add) __builtin_prefetch(sums + i * kColumns);
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      if (k % 2 == 0) __builtin_prefetch(a + (k + depth) * kRows);  // of the next panel
      V row[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) row[j] = Load(b + k * kColumns + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        const V left = Set(a[k * kRows + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = AddProducts<kPairs>(left, row[j], sum[i][j]);
      }
    }
    float tile[kHeight * kColumns];
    const bool whole = to && to->dtype == DType::kF32 && to->columns == kColumns;
    float* target = !to ? sums : whole ? reinterpret_cast<float*>(to->data) : tile;
    const int64_t stride = whole ? to->stride : kColumns;
    const bool over = whole && to->accumulate;
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        V x = sum[i][j];
        if (add) x = x + Load(sums + i * kColumns + j * kLanes);
        if (over) x = x + Load(target + i * stride + j * kLanes);
        Store(x, target + i * stride + j * kLanes);
      }
    }
    if (target == tile) WriteTile(tile, kColumns, *to);
  }

  using ForRows = void (*)(const float*, const float*, int64_t, float*, bool, const Corner*);
  template <class>
  struct ByRows;
  template <int... kLess>
  struct ByRows<std::integer_sequence<int, kLess...>> {
    static constexpr ForRows kTable[] = {&AccumulateRows<kLess + 1>...};
  };
  template <class Heights>
  static constexpr const ForRows* kByRows = ByRows<Heights>::kTable;
};

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
