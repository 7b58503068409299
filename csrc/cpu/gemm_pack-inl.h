// What the matrix product does beside looping over tiles: panels of fp32 numbers, or of pairs of
// bf16, from operands of any dtype and order, and a result of any dtype from fp32 tiles.
#if defined(PD_GEMM_PACK_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_PACK_INL_H
#undef PD_GEMM_PACK_INL_H
#else
#define PD_GEMM_PACK_INL_H
#endif

#include "cpu/gemm.h"
#include "cpu/numbers-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr int64_t kElementsWorthAThread = 1 << 15, kProductsWorthAThread = 1 << 19;

PD_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
PD_INLINE int64_t Ceil(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

#if PD_TARGET >= PD_TARGET_AVX512_BF16
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Whether operands are multiplied as pairs of bf16.
PD_INLINE bool Pairs(const GemmArgs& g) {
  const auto fits = [&](DType dtype) {
    return dtype == DType::kBf16 || (g.narrow && dtype == DType::kF32);
  };
  const bool any = g.a.dtype == DType::kBf16 || g.b.dtype == DType::kBf16;
  return kHasPairs && any && fits(g.a.dtype) && fits(g.b.dtype);
}

// c + a b for one step of the depth.
template <bool kPairs>
PD_INLINE V AddProducts(V a, V b, V c) {
#if PD_TARGET >= PD_TARGET_AVX512_BF16
  if constexpr (kPairs) return DotBf16(a, b, c);
#endif
  return Fma(a, b, c);
}

#if PD_TARGET >= PD_TARGET_AVX512_BF16
// Steps of the depth that are pairs of bf16; those of one number are in numbers-inl.h.
struct Bf16Pairs {
  using T = uint16_t;
  static constexpr int kStep = 2;
  static constexpr bool kAsIs = true;
  static PD_INLINE V Along(const T* p) { return LoadPairs(p); }
  template <int kHalf>  // of kLanes numbers a vector there is but one
  static PD_INLINE V Half(const T* p) {
    return LoadPairs(p);
  }
  static PD_INLINE V Across(const T* p, int64_t next) { return JoinBf16(p, p + next); }
  static PD_INLINE float One(const T* p, int64_t next, bool there) {
    const uint16_t pair[2] = {*p, there ? p[next] : uint16_t{0}};
    float bits;
    std::memcpy(&bits, pair, sizeof(bits));
    return bits;
  }
};
struct F32Pairs {
  using T = float;
  static constexpr int kStep = 2;
  static constexpr bool kAsIs = false;
  static PD_INLINE V Along(const T* p) { return RoundPairs(Load(p), Load(p + kLanes)); }
  static PD_INLINE V Across(const T* p, int64_t next) {
    return JoinRounded(Load(p), Load(p + next));
  }
  static PD_INLINE float One(const T* p, int64_t next, bool there) {
    const float pair[2 * kLanes] = {*p, there ? p[next] : 0.0f};
    float pairs[kLanes];
    Store(RoundPairs(Load(pair), Load(pair + kLanes)), pairs);
    return pairs[0];
  }
};
#endif

// From step k of kLanes lines, of which `steps` are packed one group of lines after the other: how
// many numbers ahead to prefetch, farther along each line, or of the next lines. Lines far apart
// are as many streams as no prefetcher of the processor follows.
PD_INLINE int64_t NumbersAhead(int64_t k, int64_t steps, int64_t step, int64_t line_stride) {
  constexpr int64_t kAhead = 8 * kLanes;
  return k + kAhead < steps ? kAhead * step : kLanes * line_stride + (kAhead - steps) * step;
}

// Packs `steps` whole steps of kLanes lines (only `lines` of them exist; the others are anything)
// at p, and a half one after them if `half`: step k of line i goes to to[k * stride + i].
template <class Type>
inline void PackLanes(const typename Type::T* p, const Lines& x, int64_t lines, int64_t steps,
                      bool half, float* to, int64_t stride) {
  constexpr int64_t kStep = Type::kStep;
  const auto one = [&](int64_t i, int64_t k, bool there) PD_INLINE_LAMBDA {
    to[k * stride + i] =
        Type::One(p + i * x.line_stride + k * kStep * x.depth_stride, x.depth_stride, there);
  };
  const int64_t exist = Least(kLanes, lines);
  if (half) {
    for (int64_t i = 0; i < exist; ++i) one(i, steps, false);
  }
  if (x.depth_stride != 1) {
    for (int64_t k = 0; k < steps; ++k) {
      if (lines >= kLanes) {
        Store(Type::Across(p + k * kStep * x.depth_stride, x.depth_stride), to + k * stride);
      } else {
        for (int64_t i = 0; i < exist; ++i) one(i, k, true);
      }
    }
    return;
  }
  const typename Type::T* line[kLanes];
  for (int i = 0; i < kLanes; ++i) line[i] = p + Least(i, lines - 1) * x.line_stride;
  V v[kLanes];
  int64_t k = 0;
  if constexpr (std::is_same_v<Type, Bf16>) {  // pairs are transposed before they are widened
    for (; k + 2 * kLanes <= steps; k += 2 * kLanes) {
      for (int i = 0; i < kLanes; ++i) v[i] = LoadPairs(line[i] + k);
      Transpose(v);
      for (int i = 0; i < kLanes; ++i) {
        Store(FirstBf16(v[i]), to + (k + 2 * i) * stride);
        Store(SecondBf16(v[i]), to + (k + 2 * i + 1) * stride);
      }
    }
  }
  for (; k + kLanes <= steps; k += kLanes) {
    const int64_t next = k * kStep + NumbersAhead(k, steps, kStep, x.line_stride);
    for (int i = 0; i < kLanes; ++i) __builtin_prefetch(line[i] + next);
    if constexpr (Type::kAsIs) {
      const float* from[kLanes];
      for (int i = 0; i < kLanes; ++i)
        from[i] = reinterpret_cast<const float*>(line[i] + k * kStep);
      LoadTransposed(from, v);
    } else {
      for (int i = 0; i < kLanes; ++i) v[i] = Type::Along(line[i] + k * kStep);
      Transpose(v);
    }
    for (int i = 0; i < kLanes; ++i) Store(v[i], to + (k + i) * stride);
  }
  for (; k < steps; ++k) {
    for (int i = 0; i < exist; ++i) one(i, k, true);
  }
}

// Packs `panels` panels of kWidth lines, from number `panel` on, over steps [k0, k0 + steps) of the
// depth: step k of line i of a panel goes to [k * kWidth + i] of its kWidth * steps numbers. Steps
// behind the depth are zeros.
template <int kWidth, class Type>
inline void PackPanelsOf(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                         float* to) {
  constexpr int64_t kStep = Type::kStep;
  const auto* first = static_cast<const typename Type::T*>(x.data) + k0 * kStep * x.depth_stride;
  const int64_t begin = panel * kWidth, end = Least(begin + panels * kWidth, x.lines);
  const int64_t whole = Least(steps, x.depth / kStep - k0);
  if constexpr (kWidth % kLanes == 0) {
    const int64_t exist = Least(steps, Ceil(x.depth, kStep) - k0);
    const auto lanes = [&](int64_t i) PD_INLINE_LAMBDA {
      return to + (i - begin) / kWidth * kWidth * steps + (i - begin) % kWidth;
    };
    constexpr int64_t kStepsAhead = 8;
    int64_t from = begin;  // lines of which some were packed side by side
    if (x.depth_stride != 1) {
      from += (end - begin) / kLanes * kLanes;
      for (int64_t k = 0; k < whole; ++k) {
        const auto* p = first + k * kStep * x.depth_stride;
        for (int64_t i = begin; i < from; i += kLanes) {
          for (int64_t number = 0; number < kStep; ++number) {
            __builtin_prefetch(p + i + (kStepsAhead * kStep + number) * x.depth_stride);
          }
          Store(Type::Across(p + i, x.depth_stride), lanes(i) + k * kWidth);
        }
      }
    }
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t done = i < from ? whole : 0;
      PackLanes<Type>(first + i * x.line_stride + done * kStep * x.depth_stride, x, end - i,
                      whole - done, whole < exist, lanes(i) + done * kWidth, kWidth);
      for (int64_t k = exist; k < steps; ++k) Store(Set(0.0f), lanes(i) + k * kWidth);
    }
  } else {  // through a block whose width is a multiple of both
    constexpr int64_t kWide = 4 * kWidth * kLanes / 4, kSteps = 32;
    static_assert(kWide % kLanes == 0 && kWide % kWidth == 0);
    float block[kSteps * kWide];
    for (int64_t i = begin; i < end; i += kWide) {
      const int64_t lines = Least(kWide, end - i);
      for (int64_t k = 0; k < steps; k += kSteps) {
        const int64_t some = Least(kSteps, steps - k), full = Least(some, whole - k);
        for (int64_t j = 0; j < lines; j += kLanes) {
          PackLanes<Type>(first + (i + j) * x.line_stride + k * kStep * x.depth_stride, x,
                          lines - j, full, full < some, block + j, kWide);
        }
        for (int64_t j = 0; j < lines; j += kWidth) {
          float* panel_at = to + (i - begin + j) * steps + k * kWidth;
          for (int64_t s = 0; s < some; ++s) {
            std::memcpy(panel_at + s * kWidth, block + s * kWide + j, kWidth * sizeof(float));
          }
        }
      }
    }
  }
}

template <int kWidth>
inline void PackPanels(const Lines& x, bool pairs, int64_t panel, int64_t panels, int64_t k0,
                       int64_t steps, float* to) {
  if (steps == 0) return;
#if PD_TARGET >= PD_TARGET_AVX512_BF16
  if (pairs) {
    if (x.dtype == DType::kF32) {
      return PackPanelsOf<kWidth, F32Pairs>(x, panel, panels, k0, steps, to);
    }
    return PackPanelsOf<kWidth, Bf16Pairs>(x, panel, panels, k0, steps, to);
  }
#endif
  (void)pairs;
  switch (x.dtype) {
    case DType::kF32:
      return PackPanelsOf<kWidth, F32>(x, panel, panels, k0, steps, to);
    case DType::kBf16:
      return PackPanelsOf<kWidth, Bf16>(x, panel, panels, k0, steps, to);
    case DType::kF16:
      return PackPanelsOf<kWidth, F16>(x, panel, panels, k0, steps, to);
  }
}

// Memory that will be packed soon: `lines` pieces of `bytes` each, `stride` bytes apart.
struct Ahead {
  const char* data;
  int64_t stride, lines, bytes;
};

// That of lines [begin, end) of an operand over numbers [k0, k1) of the depth.
inline Ahead AheadOf(const Lines& x, int64_t begin, int64_t end, int64_t k0, int64_t k1) {
  const int64_t size = ElementSize(x.dtype);
  const int64_t lines = Least(end, x.lines) - begin, depth = Least(k1, x.depth) - k0;
  const char* data =
      static_cast<const char*>(x.data) + (begin * x.line_stride + k0 * x.depth_stride) * size;
  if (x.depth_stride == 1) return {data, x.line_stride * size, lines, depth * size};
  return {data, x.depth_stride * size, depth, lines * size};
}

// Share number `i` of `n`.
inline Ahead Share(const Ahead& x, int64_t i, int64_t n) {
  const int64_t each = Ceil(x.lines, n), first = Least(i * each, x.lines);
  return {x.data + first * x.stride, x.stride, Least(each, x.lines - first), x.bytes};
}

// Where a finished tile goes; `rows` and `columns` of it exist, there.
struct Corner {
  char* data;
  DType dtype;
  int64_t stride, rows, columns;
  bool accumulate;
};

// The place of element (row, column) of the result as it is stored.
PD_INLINE Corner CornerAt(const GemmArgs& g, int64_t row, int64_t column, int64_t rows,
                          int64_t columns) {
  const int64_t size = ElementSize(g.out_dtype);
  return {static_cast<char*>(g.out) + (row * g.out_stride + column) * size,
          g.out_dtype,
          g.out_stride,
          rows,
          columns,
          g.accumulate};
}

// Writes a tile from fp32 rows `stride` apart.
inline void WriteTile(const float* tile, int64_t stride, const Corner& to) {
  for (int64_t i = 0; i < to.rows; ++i, tile += stride) {
    if (to.dtype == DType::kF32) {
      float* p = reinterpret_cast<float*>(to.data) + i * to.stride;
      int64_t j = 0;
      for (; j + kLanes <= to.columns; j += kLanes) {
        const V v = Load(tile + j);
        Store(to.accumulate ? Load(p + j) + v : v, p + j);
      }
      for (; j < to.columns; ++j) p[j] = to.accumulate ? p[j] + tile[j] : tile[j];
      continue;
    }
    const auto write = [&](V v, uint16_t* p) PD_INLINE_LAMBDA {
      to.dtype == DType::kBf16 ? StoreBf16(v, p) : StoreF16(v, p);
    };
    uint16_t* p = reinterpret_cast<uint16_t*>(to.data) + i * to.stride;
    int64_t j = 0;
    for (; j + kLanes <= to.columns; j += kLanes) write(Load(tile + j), p + j);
    if (j == to.columns) continue;
    float wide[kLanes] = {};
    uint16_t narrow[kLanes];
    for (int64_t l = 0; j + l < to.columns; ++l) wide[l] = tile[j + l];
    write(Load(wide), narrow);
    for (int64_t l = 0; j + l < to.columns; ++l) p[j + l] = narrow[l];
  }
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
