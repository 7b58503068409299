// What the matrix product does beside multiplying: fp32 panels from operands of any dtype and
// order, and a result of any dtype from fp32 tiles.
#if defined(PD_GEMM_PACK_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_PACK_INL_H
#undef PD_GEMM_PACK_INL_H
#else
#define PD_GEMM_PACK_INL_H
#endif

#include "cpu/gemm.h"
#include "cpu/vec-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr int64_t kElementsWorthAThread = 1 << 15, kProductsWorthAThread = 1 << 19;

PD_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
PD_INLINE int64_t Ceil(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// How elements of a dtype become fp32: kLanes of them in order, or half of 2 kLanes of them, for
// bf16 every other one.
struct F32 {
  using T = float;
  static PD_INLINE V Widen(const T* p) { return Load(p); }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return Load(p + kHalf * kLanes);
  }
};
struct Bf16 {
  using T = uint16_t;
  static PD_INLINE V Widen(const T* p) { return LoadBf16(p); }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return kHalf ? SecondBf16(LoadPairs(p)) : FirstBf16(LoadPairs(p));
  }
};
struct F16 {
  using T = uint16_t;
  static PD_INLINE V Widen(const T* p) { return LoadF16(p); }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return LoadF16(p + kHalf * kLanes);
  }
};
template <class Type>
PD_INLINE float WidenOne(typename Type::T x) {
  if constexpr (std::is_same_v<Type, F32>) return x;
  if constexpr (std::is_same_v<Type, Bf16>) {  // without a detour through memory
    const uint32_t bits = uint32_t(x) << 16;
    float wide_bits;
    std::memcpy(&wide_bits, &bits, sizeof(bits));
    return wide_bits;
  }
  typename Type::T alone[kLanes] = {x};
  float wide[kLanes];
  Store(Type::Widen(alone), wide);
  return wide[0];
}

// Packs kLanes lines (only `lines` of them exist; the others are anything) at p: number k of line i
// goes to to[k * stride + i].
template <class Type>
inline void PackLanes(const typename Type::T* p, const Lines& x, int64_t lines, int64_t depth,
                      float* to, int64_t stride) {
  if (x.depth_stride != 1) {
    if (lines >= kLanes) {
      for (int64_t k = 0; k < depth; ++k)
        Store(Type::Widen(p + k * x.depth_stride), to + k * stride);
      return;
    }
    for (int64_t k = 0; k < depth; ++k) {
      typename Type::T some[kLanes] = {};
      for (int64_t i = 0; i < lines; ++i) some[i] = p[k * x.depth_stride + i];
      Store(Type::Widen(some), to + k * stride);
    }
    return;
  }
  const typename Type::T* line[kLanes];
  for (int i = 0; i < kLanes; ++i) line[i] = p + Least(i, lines - 1) * x.line_stride;
  V v[kLanes];
  int64_t k = 0;
  if constexpr (std::is_same_v<Type, Bf16>) {  // pairs are transposed before they are widened
    for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
      for (int i = 0; i < kLanes; ++i) v[i] = LoadPairs(line[i] + k);
      Transpose(v);
      for (int i = 0; i < kLanes; ++i) {
        Store(FirstBf16(v[i]), to + (k + 2 * i) * stride);
        Store(SecondBf16(v[i]), to + (k + 2 * i + 1) * stride);
      }
    }
  }
  for (; k + kLanes <= depth; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) v[i] = Type::Widen(line[i] + k);
    Transpose(v);
    for (int i = 0; i < kLanes; ++i) Store(v[i], to + (k + i) * stride);
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < kLanes; ++i) to[k * stride + i] = WidenOne<Type>(line[i][k]);
  }
}

// Packs `panels` panels of kWidth lines, from number `panel` on, over depth [k0, k0 + depth):
// number k of line i of a panel goes to [k * kWidth + i] of its kWidth * depth floats.
template <int kWidth, class Type>
inline void PackPanelsOf(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t depth,
                         float* to) {
  const auto* first = static_cast<const typename Type::T*>(x.data) + k0 * x.depth_stride;
  const int64_t begin = panel * kWidth, end = Least(begin + panels * kWidth, x.lines);
  if constexpr (kWidth % kLanes == 0) {
    for (int64_t i = begin; i < end; i += kLanes) {
      PackLanes<Type>(first + i * x.line_stride, x, end - i, depth,
                      to + (i - begin) / kWidth * kWidth * depth + (i - begin) % kWidth, kWidth);
    }
  } else {  // through a block whose width is a multiple of both
    constexpr int64_t kWide = 4 * kWidth * kLanes / 4, kSteps = 32;
    static_assert(kWide % kLanes == 0 && kWide % kWidth == 0);
    float block[kSteps * kWide];
    for (int64_t i = begin; i < end; i += kWide) {
      const int64_t lines = Least(kWide, end - i);
      for (int64_t k = 0; k < depth; k += kSteps) {
        const int64_t steps = Least(kSteps, depth - k);
        for (int64_t j = 0; j < lines; j += kLanes) {
          PackLanes<Type>(first + (i + j) * x.line_stride + k * x.depth_stride, x, lines - j, steps,
                          block + j, kWide);
        }
        for (int64_t j = 0; j < lines; j += kWidth) {
          float* panel_at = to + (i - begin + j) * depth + k * kWidth;
          for (int64_t s = 0; s < steps; ++s) {
            std::memcpy(panel_at + s * kWidth, block + s * kWide + j, kWidth * sizeof(float));
          }
        }
      }
    }
  }
}

template <int kWidth>
inline void PackPanels(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t depth,
                       float* to) {
  if (depth == 0) return;
  switch (x.dtype) {
    case DType::kF32:
      return PackPanelsOf<kWidth, F32>(x, panel, panels, k0, depth, to);
    case DType::kBf16:
      return PackPanelsOf<kWidth, Bf16>(x, panel, panels, k0, depth, to);
    case DType::kF16:
      return PackPanelsOf<kWidth, F16>(x, panel, panels, k0, depth, to);
  }
}

// Where a finished tile goes; `rows` and `columns` of it exist.
struct Corner {
  char* data;
  DType dtype;
  int64_t stride, rows, columns;
  bool accumulate;
};

// The place of element (row, column) of the result.
PD_INLINE Corner CornerAt(const GemmArgs& g, int64_t row, int64_t column, int64_t rows,
                          int64_t columns) {
  const int64_t size = g.out_dtype == DType::kF32 ? 4 : 2;
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
      for (int64_t j = 0; j < to.columns; ++j) p[j] = to.accumulate ? p[j] + tile[j] : tile[j];
      continue;
    }
    uint16_t* p = reinterpret_cast<uint16_t*>(to.data) + i * to.stride;
    for (int64_t j = 0; j < to.columns; j += kLanes) {
      float wide[kLanes] = {};
      uint16_t narrow[kLanes];
      const int64_t n = Least(kLanes, to.columns - j);
      std::memcpy(wide, tile + j, static_cast<size_t>(n) * sizeof(float));
      if (to.dtype == DType::kBf16) {
        StoreBf16(Load(wide), narrow);
      } else {
        StoreF16(Load(wide), narrow);
      }
      std::memcpy(p + j, narrow, static_cast<size_t>(n) * sizeof(uint16_t));
    }
  }
}

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
