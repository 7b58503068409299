// A matrix product with few lines on one side: dot products with the other side's lines where they
// lie, each read once, widened in registers or multiplied as the pairs of bf16 that they are.
//
// Packing would cost as much as multiplying by so few, and would only copy what memory is slow to
// deliver. The few lines are widened once, in blocks of the depth that stay in the first-level
// cache. For bf16 the numbers of even and of odd depth are kept apart, since two instructions
// separate them on the other side and none joins them again.
#if defined(PD_GEMM_DOTS_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_DOTS_INL_H
#undef PD_GEMM_DOTS_INL_H
#else
#define PD_GEMM_DOTS_INL_H
#endif

#include "cpu/gemm_pack-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr int64_t kFewLines = 32, kFewBesideTiles = 4;  // AMX multiplies 16 lines as fast as one
constexpr int64_t kDotsStep = 2 * kLanes;
constexpr int64_t kDotsStrip = 48;         // lines whose sums are kept between blocks of the depth
constexpr int64_t kDotsPacked = 40 << 10;  // bytes of a block of the few lines
constexpr int64_t kDotsAhead = 8 << 10;    // bytes a prefetch is ahead

// Whether the side that is not split is few lines, and the lines of the other one lie along memory.
// `tiles` multiply these too, where they lie.
PD_INLINE bool DotsServe(const GemmArgs& g, bool split_b, bool tiles) {
  const Lines &few = split_b ? g.a : g.b, &many = split_b ? g.b : g.a;
  return few.lines <= (tiles ? kFewBesideTiles : kFewLines) && many.depth_stride == 1;
}

// The plan for operands of which `p` knows who is split; fp32 lines are not rounded where they lie.
inline GemmPlan PlanDots(const GemmArgs& g, GemmPlan p) {
  const Lines &few = p.split_b ? g.a : g.b, &many = p.split_b ? g.b : g.a;
  p.dots = true;
  p.pairs = p.pairs && many.dtype == DType::kBf16;
  p.split_panels = many.lines;
  p.shared_panels = p.shared_block = few.lines;
  p.depth_block = kDotsPacked / (p.pairs ? 2 : 4) / few.lines / kDotsStep * kDotsStep;
  p.pack_grain = Ceil(kElementsWorthAThread, few.depth + 1);
  p.split_grain = Ceil(kProductsWorthAThread, (few.lines + 8) * few.depth + 1);
  p.split_unit = 1;
  p.packed_bytes = 4 * few.lines * Ceil(few.depth, kDotsStep) * kDotsStep;
  p.scratch_bytes = 4 * few.lines * kDotsStrip;
  return p;
}

template <class Type>
inline void PackDotsOf(const Lines& few, const Lines& many, const GemmPlan& p, int64_t begin,
                       int64_t end, float* packed) {
  constexpr int64_t kStep = Type::kStep;
  const bool apart = many.dtype == DType::kBf16 && !p.pairs;
  const auto* data = static_cast<const typename Type::T*>(few.data);
  for (int64_t first = 0; first < few.depth; first += p.depth_block) {
    const int64_t depth = Least(p.depth_block, few.depth - first);
    const int64_t steps = Ceil(depth, kDotsStep) * kDotsStep / kStep;
    for (int64_t i = begin; i < end; ++i) {
      const auto* line = data + i * few.line_stride + first * few.depth_stride;
      float* to = packed + first / kStep * few.lines + i * steps;
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t in = k % kDotsStep, at = apart ? k - in + in / 2 + in % 2 * kLanes : k;
        const int64_t left = depth - k * kStep;
        to[at] = left > 0
                     ? Type::One(line + k * kStep * few.depth_stride, few.depth_stride, left > 1)
                     : 0.0f;
      }
    }
  }
}

inline void PackDots(const GemmArgs& g, const GemmPlan& p, int64_t begin, int64_t end,
                     float* packed) {
  const Lines &few = p.split_b ? g.a : g.b, &many = p.split_b ? g.b : g.a;
#if PD_TARGET >= PD_TARGET_AVX512_BF16
  if (p.pairs) {
    if (few.dtype == DType::kF32) return PackDotsOf<F32Pairs>(few, many, p, begin, end, packed);
    return PackDotsOf<Bf16Pairs>(few, many, p, begin, end, packed);
  }
#endif
  switch (few.dtype) {
    case DType::kF32:
      return PackDotsOf<F32>(few, many, p, begin, end, packed);
    case DType::kBf16:
      return PackDotsOf<Bf16>(few, many, p, begin, end, packed);
    case DType::kF16:
      return PackDotsOf<F16>(few, many, p, begin, end, packed);
  }
}

// Where the sum of few line i with line j of the many is kept.
struct Sums {
  float* data;
  int64_t few_stride, many_stride;
  bool add;  // to blocks of the depth before this one
};

// kFew of the packed lines, of `steps` steps each, with kMany lines from `line` on.
template <class Type, int kFew, int kMany>
__attribute__((noinline)) void Dots(const float* few, int64_t steps, const typename Type::T* line,
                                    int64_t stride, int64_t depth, int64_t ahead,
                                    const Sums& sums) {
  V sum[kFew][kMany];
#pragma GCC unroll 4
  for (int i = 0; i < kFew; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) sum[i][j] = Set(0.0f);
  }
  const auto multiply = [&]<int kHalf>(const typename Type::T* x, int64_t x_stride,
                                       const float* y) PD_INLINE_LAMBDA {
    V wide[kMany];
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) wide[j] = Type::template Half<kHalf>(x + j * x_stride);
#pragma GCC unroll 4
    for (int i = 0; i < kFew; ++i) {
      const V other = Load(y + i * steps + kHalf * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kMany; ++j)
        sum[i][j] = AddProducts<Type::kStep == 2>(other, wide[j], sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kDotsStep <= depth; k += kDotsStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) __builtin_prefetch(line + (ahead + j) * stride + k);
    multiply.template operator()<0>(line + k, stride, few + k / Type::kStep);
    if constexpr (Type::kStep == 1) multiply.template operator()<1>(line + k, stride, few + k);
  }
  if (k < depth) {
    typename Type::T last[kMany * kDotsStep] = {};
    for (int j = 0; j < kMany; ++j) {
      std::memcpy(last + j * kDotsStep, line + j * stride + k,
                  static_cast<size_t>(depth - k) * sizeof(*last));
    }
    multiply.template operator()<0>(last, kDotsStep, few + k / Type::kStep);
    if constexpr (Type::kStep == 1) multiply.template operator()<1>(last, kDotsStep, few + k);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kFew; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) {
      float* to = sums.data + i * sums.few_stride + j * sums.many_stride;
      *to = (sums.add ? *to : 0.0f) + Sum(sum[i][j]);
    }
  }
}

// All of `few.lines` with kMany lines.
template <class Type, int kMany>
inline void DotsOfAll(const float* few, int64_t lines, int64_t steps, const typename Type::T* line,
                      int64_t stride, int64_t depth, int64_t ahead, Sums sums) {
  while (lines > 0) {
    const auto done = Least(lines, 4);
    switch (done) {
      case 4:
        Dots<Type, 4, kMany>(few, steps, line, stride, depth, ahead, sums);
        break;
      case 3:
        Dots<Type, 3, kMany>(few, steps, line, stride, depth, ahead, sums);
        break;
      case 2:
        Dots<Type, 2, kMany>(few, steps, line, stride, depth, ahead, sums);
        break;
      default:
        Dots<Type, 1, kMany>(few, steps, line, stride, depth, ahead, sums);
    }
    few += done * steps;
    sums.data += done * sums.few_stride;
    lines -= done;
  }
}

template <class Type>
inline void MultiplyDotsOf(const GemmArgs& g, const GemmPlan& p, int64_t begin, int64_t end,
                           const float* packed, float* scratch) {
  // Four of the few lines with so many of the others: more would not stay in registers.
  constexpr int kMany = kLanes > 8 ? 4 : std::is_same_v<Type, Bf16> ? 2 : 3;
  const Lines &few = p.split_b ? g.a : g.b, &many = p.split_b ? g.b : g.a;
  const auto* data = static_cast<const typename Type::T*>(many.data);
  const int64_t bytes = many.depth * static_cast<int64_t>(sizeof(*data)) + 1;
  const int64_t ahead = Ceil(kDotsAhead, bytes * kMany) * kMany;
  for (int64_t first = begin; first < end; first += kDotsStrip) {
    const int64_t count = Least(kDotsStrip, end - first);
    int64_t k = 0;
    do {
      const int64_t depth = Least(p.depth_block, many.depth - k);
      const int64_t steps = Ceil(depth, kDotsStep) * kDotsStep / Type::kStep;
      const float* shared = packed + k / Type::kStep * few.lines;
      for (int64_t j = 0; j < count;) {
        const Sums sums = p.split_b ? Sums{scratch + j, kDotsStrip, 1, k > 0}
                                    : Sums{scratch + j * few.lines, 1, few.lines, k > 0};
        const auto* line = data + (first + j) * many.line_stride + k;
        if (count - j >= kMany) {
          DotsOfAll<Type, kMany>(shared, few.lines, steps, line, many.line_stride, depth, ahead,
                                 sums);
          j += kMany;
        } else {
          DotsOfAll<Type, 1>(shared, few.lines, steps, line, many.line_stride, depth, ahead, sums);
          ++j;
        }
      }
      k += depth;
    } while (k < many.depth);
    if (p.split_b) {
      WriteTile(scratch, kDotsStrip, CornerAt(g, 0, first, few.lines, count));
    } else {
      WriteTile(scratch, few.lines, CornerAt(g, first, 0, count, few.lines));
    }
  }
}

// Lines [begin, end) of the many with the few, which are packed.
inline void MultiplyDots(const GemmArgs& g, const GemmPlan& p, int64_t begin, int64_t end,
                         const float* packed, float* scratch) {
#if PD_TARGET >= PD_TARGET_AVX512_BF16
  if (p.pairs) return MultiplyDotsOf<Bf16Pairs>(g, p, begin, end, packed, scratch);
#endif
  switch ((p.split_b ? g.b : g.a).dtype) {
    case DType::kF32:
      return MultiplyDotsOf<F32>(g, p, begin, end, packed, scratch);
    case DType::kBf16:
      return MultiplyDotsOf<Bf16>(g, p, begin, end, packed, scratch);
    case DType::kF16:
      return MultiplyDotsOf<F16>(g, p, begin, end, packed, scratch);
  }
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
