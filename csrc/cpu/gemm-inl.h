// Matrix product with fp32 arithmetic: out = a b, operands and result fp32, bf16 or fp16 each.
//
// Panels of kTileRows rows of a and of kTileColumns columns of b are packed depth-major, whatever
// their dtype and order in memory, so there is one inner loop: a tile of the result in registers,
// two vectors of b and kTileRows numbers of a a step. A step of the depth is an fp32 number of each
// line, or, where the target multiplies bf16 (vdpbf16ps) and so are the operands, a pair of bf16,
// which is as wide: twice the products from the same loads. The depth is cut into blocks so that a
// panel of b stays in the first-level cache, the panels of a and b in work in the second. Partial
// sums of a strip of tiles are kept packed too; the last block of the depth writes them out. An
// element's sum is taken in one order, whatever its tile, its strip, or the number of threads.
#if defined(PD_GEMM_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_INL_H
#undef PD_GEMM_INL_H
#else
#define PD_GEMM_INL_H
#endif

#include "cpu/gemm_dots-inl.h"
#include "cpu/gemm_pack-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// The accumulators, a row of b and one broadcast fill the registers: 16 on AVX2, 32 on AVX-512.
#if PD_TARGET >= PD_TARGET_AVX512
constexpr int kTileRows = 12, kTileVectors = 2;
#elif PD_TARGET == PD_TARGET_AVX2
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 4;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int64_t kDepthBlock =
    256;  // in steps: a panel of b and two of a fit the first-level cache
constexpr int64_t kStripA = 192 / kTileRows;    // panels of a in the second-level cache
constexpr int64_t kStripB = 96 / kTileColumns;  // panels of b beside them
constexpr int64_t kPackedBytes = 16 << 20;      // of the shared operand: the third-level cache
constexpr int64_t kSumsBytes = 2 << 20;         // of a strip of tiles

// A tile of kRows rows over one block of the depth, of `depth` steps. `sums` holds the blocks
// before it (`add`) and takes the result, unless `to` is where the tile is finished.
template <int kRows, bool kPairs>
__attribute__((noinline)) void Accumulate(const float* a, const float* b, int64_t depth,
                                          float* sums, bool add, const Corner* to) {
  V sum[kRows][kTileVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) sum[i][j] = Set(0.0f);
    if (add) __builtin_prefetch(sums + i * kTileColumns);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    if (k % 2 == 0) __builtin_prefetch(a + (k + depth) * kTileRows);  // of the next panel
    V row[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) row[j] = Load(b + k * kTileColumns + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const V left = Set(a[k * kTileRows + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j)
        sum[i][j] = AddProducts<kPairs>(left, row[j], sum[i][j]);
    }
  }
  float tile[kRows * kTileColumns];
  const bool whole = to && to->dtype == DType::kF32 && to->columns == kTileColumns;
  float* target = !to ? sums : whole ? reinterpret_cast<float*>(to->data) : tile;
  const int64_t stride = whole ? to->stride : kTileColumns;
  const bool over = whole && to->accumulate;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      V x = sum[i][j];
      if (add) x = x + Load(sums + i * kTileColumns + j * kLanes);
      if (over) x = x + Load(target + i * stride + j * kLanes);
      Store(x, target + i * stride + j * kLanes);
    }
  }
  if (target == tile) WriteTile(tile, kTileColumns, *to);
}

using AccumulateTile = void (*)(const float*, const float*, int64_t, float*, bool, const Corner*);
template <bool kPairs, class>
struct AccumulateRows;
template <bool kPairs, int... kLess>
struct AccumulateRows<kPairs, std::integer_sequence<int, kLess...>> {
  static constexpr AccumulateTile kTable[] = {&Accumulate<kLess + 1, kPairs>...};
};
template <bool kPairs>
constexpr const AccumulateTile* kAccumulate =
    AccumulateRows<kPairs, std::make_integer_sequence<int, kTileRows>>::kTable;

// Panels [begin, end) of an operand, packed over a block of the depth, `data` at panel `begin`.
struct Packed {
  const float* data;
  int64_t begin, end;
};

// All tiles of some panels of a with some of b over one block of the depth. `sums` holds the tile
// of panels (i, j) at tile i * sums_stride + j * sums_step.
inline void AccumulateTiles(const GemmArgs& g, bool pairs, const Packed& a, const Packed& b,
                            int64_t depth, float* sums, int64_t a_stride, int64_t b_stride,
                            bool add, bool last) {
  const AccumulateTile* accumulate =
      kHasPairs && pairs ? kAccumulate<kHasPairs> : kAccumulate<false>;
  for (int64_t j = b.begin; j < b.end; ++j) {
    const float* right = b.data + (j - b.begin) * depth * kTileColumns;
    for (int64_t i = a.begin; i < a.end; ++i) {
      const int64_t row = i * kTileRows, column = j * kTileColumns;
      const int64_t rows = Least(kTileRows, g.a.lines - row);
      const Corner to = CornerAt(g, row, column, rows, Least(kTileColumns, g.b.lines - column));
      const int64_t tile = (i - a.begin) * a_stride + (j - b.begin) * b_stride;
      const int64_t share = Ceil(depth * kTileColumns, a.end - a.begin);  // of the next panel of b
      const float* next = right + depth * kTileColumns + (i - a.begin) * share;
      for (int64_t e = 0; e < share; e += 16) __builtin_prefetch(next + e, 0, 2);
      accumulate[rows - 1](a.data + (i - a.begin) * depth * kTileRows, right, depth,
                           sums + tile * kTileRows * kTileColumns, add, last ? &to : nullptr);
    }
  }
}

inline GemmPlan PlanGemm(const GemmArgs& g) {
  const int64_t m = g.a.lines, n = g.b.lines;
  GemmPlan p{};
  p.split_b = n >= m;
  p.pairs = Pairs(g);
  if (DotsServe(g, p.split_b)) return PlanDots(g, p);
  const int64_t depth = Steps(g, p);
  const int64_t a_panels = Ceil(m, kTileRows), b_panels = Ceil(n, kTileColumns);
  p.split_panels = p.split_b ? b_panels : a_panels;
  p.shared_panels = p.split_b ? a_panels : b_panels;
  const int64_t width = p.split_b ? kTileRows : kTileColumns;
  const int64_t split_width = p.split_b ? kTileColumns : kTileRows;
  const int64_t blocks = depth > kDepthBlock ? Ceil(depth, kDepthBlock) : 1;
  p.depth_block = Ceil(Ceil(depth, blocks), 16) * 16;
  const int64_t strip = p.split_b ? kStripB : kStripA;
  const int64_t by_packed = kPackedBytes / (width * depth * 4 + 1);
  const int64_t by_sums = kSumsBytes / (strip * kTileRows * kTileColumns * 4);
  const int64_t least = p.split_b ? kStripA : kStripB;
  p.shared_block = Least(by_packed, by_sums);
  if (p.shared_block < least) p.shared_block = least;
  p.shared_block = Least(p.shared_block, p.shared_panels);
  p.packed_bytes = p.shared_block * width * depth * 4;
  p.scratch_bytes =
      4 * strip *
      (split_width * p.depth_block + (blocks > 1 ? p.shared_block * kTileRows * kTileColumns : 0));
  const int64_t shared_lines = p.split_b ? m : n;
  p.pack_grain = Ceil(kElementsWorthAThread, width * depth + 1);
  p.split_grain = Ceil(kProductsWorthAThread, split_width * shared_lines * depth + 1);
  return p;
}

// Packs shared panels [first + begin, first + end) into the memory of the block that begins at
// `first` and has `count` of them: depth blocks one after the other, each with all panels.
inline void PackShared(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                       int64_t begin, int64_t end, float* packed) {
  if (p.dots) return PackDots(g, p, begin, end, packed);
  const int64_t depth = Steps(g, p);
  for (int64_t k = 0; k < depth; k += p.depth_block) {
    const int64_t steps = Least(p.depth_block, depth - k);
    if (p.split_b) {
      float* to = packed + kTileRows * (k * count + begin * steps);
      PackPanels<kTileRows>(g.a, p.pairs, first + begin, end - begin, k, steps, to);
    } else {
      float* to = packed + kTileColumns * (k * count + begin * steps);
      PackPanels<kTileColumns>(g.b, p.pairs, first + begin, end - begin, k, steps, to);
    }
  }
}

// The columns [begin, end) of panels of b with a block of shared panels of a.
inline void MultiplySplitB(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                           int64_t begin, int64_t end, const float* packed, float* scratch) {
  const int64_t depth = Steps(g, p);
  float* sums = scratch + kStripB * kTileColumns * p.depth_block;
  for (int64_t j = begin; j < end; j += kStripB) {
    const int64_t stop = Least(j + kStripB, end);
    int64_t k = 0;
    do {
      const int64_t steps = Least(p.depth_block, depth - k);
      const bool add = k > 0, last = k + steps == depth;
      for (int64_t i = 0; i < count; i += kStripA) {
        const Packed a{packed + kTileRows * (k * count + i * steps), first + i,
                       first + Least(i + kStripA, count)};
        float* tiles = sums + i * kStripB * kTileRows * kTileColumns;
        for (int64_t jj = j; jj < stop; ++jj) {  // a panel is packed where it is used first
          float* panel = scratch + (jj - j) * kTileColumns * steps;
          if (i == 0) PackPanels<kTileColumns>(g.b, p.pairs, jj, 1, k, steps, panel);
          AccumulateTiles(g, p.pairs, a, {panel, jj, jj + 1}, steps,
                          tiles + (jj - j) * kTileRows * kTileColumns, kStripB, 0, add, last);
        }
      }
      k += steps;
    } while (k < depth);
  }
}

// The rows of panels [begin, end) of a with a block of shared panels of b.
inline void MultiplySplitA(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                           int64_t begin, int64_t end, const float* packed, float* scratch) {
  const int64_t depth = Steps(g, p);
  float* sums = scratch + kStripA * kTileRows * p.depth_block;
  for (int64_t i = begin; i < end; i += kStripA) {
    const int64_t stop = Least(i + kStripA, end);
    int64_t k = 0;
    do {
      const int64_t steps = Least(p.depth_block, depth - k);
      PackPanels<kTileRows>(g.a, p.pairs, i, stop - i, k, steps, scratch);
      AccumulateTiles(g, p.pairs, {scratch, i, stop},
                      {packed + kTileColumns * k * count, first, first + count}, steps, sums, 1,
                      kStripA, k > 0, k + steps == depth);
      k += steps;
    } while (k < depth);
  }
}

// Split panels [begin, end) with the `count` shared panels from `first` on, which are in `packed`.
inline void MultiplyStrips(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                           int64_t begin, int64_t end, const float* packed, float* scratch) {
  if (p.dots) {
    MultiplyDots(g, p, begin, end, packed, scratch);
  } else if (p.split_b) {
    MultiplySplitB(g, p, first, count, begin, end, packed, scratch);
  } else {
    MultiplySplitA(g, p, first, count, begin, end, packed, scratch);
  }
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
