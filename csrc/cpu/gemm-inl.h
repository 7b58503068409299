// Matrix product with fp32 sums: out = a b, operands and result fp32, bf16 or fp16 each.
//
// Panels of rows of a and of columns of b are packed depth-major, whatever their dtype and order in
// memory, so that a micro-kernel (gemm_vector-inl.h, gemm_amx-inl.h) reads one after the other: a
// tile of the result in registers, a panel of each operand. A step of the depth is an fp32 number
// of each line, or, where the target multiplies bf16 and so are the operands, a pair of bf16, which
// is as wide. The depth is cut into blocks so that a panel of b stays in the first-level cache, the
// panels of a and b in work in the second. Partial sums of a strip of tiles are kept packed too;
// the last block of the depth writes them out. An element's sum is taken in one order, whatever its
// tile, its strip, or the number of threads.
#if defined(PD_GEMM_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_INL_H
#undef PD_GEMM_INL_H
#else
#define PD_GEMM_INL_H
#endif

#include "cpu/gemm_amx-inl.h"
#include "cpu/gemm_dots-inl.h"
#include "cpu/gemm_pack-inl.h"
#include "cpu/gemm_vector-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

#if PD_TARGET >= PD_TARGET_AMX
constexpr int64_t kColumnsInWork = 192;
#else
constexpr int64_t kColumnsInWork = 96;
#endif
constexpr int64_t kRowsInWork = 192;  // of a, in the second-level cache beside those columns of b
constexpr int64_t kPackedBytes = 16 << 20;  // of the shared operand: the third-level cache
constexpr int64_t kSumsBytes = 2 << 20;     // of a strip of tiles

// Steps of the depth: a panel of b fits the first-level cache, unless it is lines of a matrix where
// they lie, which are used once: then whole lines, as far as two panels fit the second-level one.
template <class Tile>
constexpr int64_t kDepthBlock = Tile::kTransposes ? 1024 : PD_TARGET >= PD_TARGET_AMX ? 288 : 256;

// Panels in work. One of a, where each is used up before the next.
template <class Tile>
constexpr int64_t kStripA = Tile::kTransposes ? 1 : kRowsInWork / Tile::kRows;
template <class Tile>
constexpr int64_t kStripB = kColumnsInWork / Tile::kColumns;

// Calls `body` with the micro-kernel of a plan and the operands in its order.
template <class Body>
PD_INLINE auto WithTile(const GemmArgs& g, const GemmPlan& p, const Body& body) {
#if PD_TARGET >= PD_TARGET_AMX
  if (p.exchanged) {
    GemmArgs exchanged = g;
    std::swap(exchanged.a, exchanged.b);
    return body(AmxTile<true>{}, exchanged);
  }
  return p.pairs ? body(AmxTile<false>{}, g) : body(VectorTile<false>{}, g);
#else
  return kHasPairs && p.pairs ? body(VectorTile<kHasPairs>{}, g) : body(VectorTile<false>{}, g);
#endif
}

// Panels [begin, end) of an operand over a block of the depth: packed ones, `data` at panel
// `begin`, or, for a micro-kernel that loads lines where they lie, those of `lines` from step `k`
// on.
struct Panels {
  const float* data;
  int64_t begin, end;
  const Lines* lines = nullptr;
  int64_t k = 0;
};

// All tiles of some panels of a with some of b over one block of the depth, of `steps` steps.
// `sums` holds the tile of panels (i, j) at tile i * a_stride + j * b_stride.
template <class Tile>
inline void AccumulateTiles(const GemmArgs& g, const Panels& a, const Panels& b, int64_t steps,
                            float* sums, int64_t a_stride, int64_t b_stride, bool add, bool last,
                            const Ahead& ahead) {
  constexpr int64_t kSize = Tile::kRows * Tile::kColumns;
  const int64_t tiles = (a.end - a.begin) * (b.end - b.begin);
  int64_t done = 0;
  for (int64_t j = b.begin; j < b.end; ++j) {
    const float* right = b.data + (j - b.begin) * steps * Tile::kColumns;
    for (int64_t i = a.begin; i < a.end; ++i) {
      const int64_t row = i * Tile::kRows, column = j * Tile::kColumns;
      const int64_t rows = Least(Tile::kRows, g.a.lines - row);
      const int64_t columns = Least(Tile::kColumns, g.b.lines - column);
      const Corner to = Tile::kTransposes ? CornerAt(g, column, row, columns, rows)
                                          : CornerAt(g, row, column, rows, columns);
      const int64_t tile = (i - a.begin) * a_stride + (j - b.begin) * b_stride;
      if (Tile::kFetchesB) {
        const int64_t share = Ceil(steps * Tile::kColumns, a.end - a.begin);  // of the next panel
        const float* next = right + steps * Tile::kColumns + (i - a.begin) * share;
        for (int64_t e = 0; e < share; e += 16) __builtin_prefetch(next + e, 0, 2);
      }
      const auto left = a.lines ? Tile::LeftInPlace(*a.lines, row, a.k)
                                : Tile::Left(a.data + (i - a.begin) * steps * Tile::kRows);
      Tile::Accumulate(left, right, steps, sums + tile * kSize, add,
                       sums + (tile + a_stride) * kSize, Share(ahead, done++, tiles), rows,
                       last ? &to : nullptr);
    }
  }
}

template <class Tile>
inline GemmPlan PlanTiles(const GemmArgs& g, GemmPlan p) {
  const int64_t m = g.a.lines, n = g.b.lines;
  constexpr int64_t kSize = Tile::kRows * Tile::kColumns;
  p.steps = Ceil(g.a.depth, p.pairs ? 2 * Tile::kUnit : 1) * Tile::kUnit;
  const int64_t a_panels = Ceil(m, Tile::kRows), b_panels = Ceil(n, Tile::kColumns);
  p.split_panels = p.split_b ? b_panels : a_panels;
  p.shared_panels = p.split_b ? a_panels : b_panels;
  const int64_t width = p.split_b ? Tile::kRows : Tile::kColumns;
  const int64_t split_width = p.split_b ? Tile::kColumns : Tile::kRows;
  const int64_t blocks = p.steps > kDepthBlock<Tile> ? Ceil(p.steps, kDepthBlock<Tile>) : 1;
  p.depth_block = Ceil(Ceil(p.steps, blocks), 16) * 16;
  const int64_t strip = p.split_unit = p.split_b ? kStripB<Tile> : kStripA<Tile>;
  const int64_t by_packed = kPackedBytes / (width * p.steps * 4 + 1);
  const int64_t by_sums = kSumsBytes / (strip * kSize * 4);
  const int64_t least = p.split_b ? kStripA<Tile> : kStripB<Tile>;
  p.shared_block = Least(by_packed, by_sums);
  if (p.shared_block < least) p.shared_block = least;
  p.shared_block = Least(p.shared_block, p.shared_panels);
  p.packed_bytes = p.shared_block * width * p.steps * 4;
  p.scratch_bytes =
      4 * strip * (split_width * p.depth_block + (blocks > 1 ? p.shared_block * kSize : 0));
  const int64_t shared_lines = p.split_b ? m : n;
  p.pack_grain = Ceil(kElementsWorthAThread, width * p.steps + 1);
  p.split_grain = Ceil(kProductsWorthAThread, split_width * shared_lines * p.steps + 1);
  return p;
}

inline GemmPlan PlanGemm(const GemmArgs& g) {
  GemmPlan p{};
  p.split_b = g.b.lines >= g.a.lines;
  p.pairs = Pairs(g);
#if PD_TARGET >= PD_TARGET_AMX
  // A panel of b whose lines lie along memory is transposed, for as many tiles as a has panels; as
  // panels of a they are taken as they lie, and every tile of the result is transposed, after all
  // its depth.
  p.exchanged = p.pairs && g.b.depth_stride == 1 && 2 * g.a.lines < g.a.depth;
#endif
  const bool in_place = p.exchanged && g.b.dtype == DType::kBf16;
  if (DotsServe(g, p.split_b, in_place)) return PlanDots(g, p);
  p.split_b = p.split_b && !p.exchanged;
  return WithTile(g, p, [&]<class Tile>(Tile, const GemmArgs& h) { return PlanTiles<Tile>(h, p); });
}

// Packs shared panels [first + begin, first + end) into the memory of the block that begins at
// `first` and has `count` of them: depth blocks one after the other, each with all panels.
template <class Tile>
inline void PackShared(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                       int64_t begin, int64_t end, float* packed) {
  for (int64_t k = 0; k < p.steps; k += p.depth_block) {
    const int64_t steps = Least(p.depth_block, p.steps - k);
    if (p.split_b) {
      float* to = packed + Tile::kRows * (k * count + begin * steps);
      Tile::PackA(g.a, first + begin, end - begin, k, steps, to);
    } else {
      float* to = packed + Tile::kColumns * (k * count + begin * steps);
      Tile::PackB(g.b, first + begin, end - begin, k, steps, to);
    }
  }
}

// What a thread packs: `panels` of its own operand at a time, over a block of the depth.
struct Strip {
  int64_t begin, end, k, steps;
};

// The strip behind `at`, for a thread with panels to `end`; an empty one behind the last.
inline Strip NextStrip(const GemmPlan& p, const Strip& at, int64_t panels, int64_t end) {
  Strip next = at;
  next.k += at.steps;
  if (next.k >= p.steps) next = {at.end, Least(at.end + panels, end), 0, 0};
  next.steps = Least(p.depth_block, p.steps - next.k);
  return next;
}

inline Ahead AheadOfPanels(const GemmPlan& p, const Lines& x, int64_t width, const Strip& s) {
  const int64_t numbers = p.pairs ? 2 : 1;
  if (s.begin >= s.end) return {};
  return AheadOf(x, s.begin * width, s.end * width, s.k * numbers, (s.k + s.steps) * numbers);
}

// The columns [begin, end) of panels of b with a block of shared panels of a.
template <class Tile>
inline void MultiplySplitB(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                           int64_t begin, int64_t end, const float* packed, float* scratch) {
  constexpr int64_t kStrip = kStripB<Tile>, kSize = Tile::kRows * Tile::kColumns;
  // A panel is packed where it is used first, but numbers that lie side by side together.
  const int64_t together = g.b.depth_stride == 1 ? 1 : kStrip;
  float* sums = scratch + kStrip * Tile::kColumns * p.depth_block;
  Strip s{begin, Least(begin + kStrip, end), 0, Least(p.depth_block, p.steps)};
  while (s.begin < s.end) {
    const Strip next = NextStrip(p, s, kStrip, end);
    for (int64_t i = 0; i < count; i += kStripA<Tile>) {
      const Panels a{packed + Tile::kRows * (s.k * count + i * s.steps), first + i,
                     first + Least(i + kStripA<Tile>, count)};
      for (int64_t j = s.begin; j < s.end; j += together) {
        const int64_t stop = Least(j + together, s.end);
        float* panels = scratch + (j - s.begin) * Tile::kColumns * s.steps;
        Ahead ahead{};
        if (i == 0) {
          Tile::PackB(g.b, j, stop - j, s.k, s.steps, panels);
          const Strip following =
              stop < s.end
                  ? Strip{stop, Least(stop + together, s.end), s.k, s.steps}
                  : Strip{next.begin, Least(next.begin + together, next.end), next.k, next.steps};
          ahead = AheadOfPanels(p, g.b, Tile::kColumns, following);
        }
        AccumulateTiles<Tile>(g, a, {panels, j, stop}, s.steps,
                              sums + (i * kStrip + j - s.begin) * kSize, kStrip, 1, s.k > 0,
                              s.k + s.steps == p.steps, ahead);
      }
    }
    s = next;
  }
}

// The rows of panels [begin, end) of a with a block of shared panels of b.
template <class Tile>
inline void MultiplySplitA(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                           int64_t begin, int64_t end, const float* packed, float* scratch) {
  constexpr int64_t kStrip = kStripA<Tile>;
  float* sums = scratch + kStrip * Tile::kRows * p.depth_block;
  Strip s{begin, Least(begin + kStrip, end), 0, Least(p.depth_block, p.steps)};
  while (s.begin < s.end) {
    const Strip next = NextStrip(p, s, kStrip, end);
    const bool in_place = Tile::InPlace(g.a, s.end * Tile::kRows, s.k, s.steps);
    if (!in_place) Tile::PackA(g.a, s.begin, s.end - s.begin, s.k, s.steps, scratch);
    AccumulateTiles<Tile>(g, {scratch, s.begin, s.end, in_place ? &g.a : nullptr, s.k},
                          {packed + Tile::kColumns * s.k * count, first, first + count}, s.steps,
                          sums, 1, kStrip, s.k > 0, s.k + s.steps == p.steps,
                          AheadOfPanels(p, g.a, Tile::kRows, next));
    s = next;
  }
}

inline void PackSharedPanels(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                             int64_t begin, int64_t end, float* packed) {
  if (p.dots) return PackDots(g, p, begin, end, packed);
  WithTile(g, p, [&]<class Tile>(Tile, const GemmArgs& h) {
    PackShared<Tile>(h, p, first, count, begin, end, packed);
  });
}

// Split panels [begin, end) with the `count` shared panels from `first` on, which are in `packed`.
inline void MultiplySplitPanels(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                                int64_t begin, int64_t end, const float* packed, float* scratch) {
  if (p.dots) return MultiplyDots(g, p, begin, end, packed, scratch);
  WithTile(g, p, [&]<class Tile>(Tile, const GemmArgs& h) {
    [[maybe_unused]] const typename Tile::Registers registers;
    const auto multiply = p.split_b ? MultiplySplitB<Tile> : MultiplySplitA<Tile>;
    multiply(h, p, first, count, begin, end, packed, scratch);
  });
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
