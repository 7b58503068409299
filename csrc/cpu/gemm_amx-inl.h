// A tile of a matrix product in the tile registers of AMX: 32 rows by 32 columns, four products of
// 16 rows, 16 columns and 32 bf16 of the depth (16 steps) from four loads.
//
// Panels of b are packed as for the other micro-kernels: 16 steps of 16 lines are what a product
// takes. A product takes the 16 steps of a row of a together, so panels of a are packed by blocks
// of 16 steps, line after line. Steps are padded with zeros to whole blocks.
//
// Four products take 64 cycles, and their four loads as long where all come from the second-level
// cache, so the rest is about memory: the panel that is used again stays in the first-level cache
// (the other one is loaded as used once), the source of the next panels and the lines of the result
// are fetched between the products, and lines of a bf16 operand that lie along the depth become
// rows of tiles as they are, not columns, which would have to be transposed for every block of rows
// (kExchanged).
#if defined(PD_GEMM_AMX_INL_H) == defined(PD_TOGGLE)
#ifdef PD_GEMM_AMX_INL_H
#undef PD_GEMM_AMX_INL_H
#else
#define PD_GEMM_AMX_INL_H
#endif

#include "cpu/gemm_pack-inl.h"

#if PD_TARGET >= PD_TARGET_AMX
namespace pd::PD_NAMESPACE {
namespace {

// Packs panels of kWidth lines as PackPanels does, but [block of kLanes steps][line][step].
template <int kWidth, class Type>
inline void PackLinesOf(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                        float* to) {
  static_assert(Type::kStep == 2 && kWidth % kLanes == 0);
  const auto* first = static_cast<const typename Type::T*>(x.data) + 2 * k0 * x.depth_stride;
  const int64_t begin = panel * kWidth, end = Least(begin + panels * kWidth, x.lines);
  const int64_t whole = Least(steps, x.depth / 2 - k0);
  const int64_t exist = Least(steps, Ceil(x.depth, 2) - k0);
  const auto pack = [&](int64_t i, int64_t k) PD_INLINE_LAMBDA {  // a block
    const int64_t lines = Least(kLanes, end - i), in_panel = (i - begin) % kWidth;
    float* block = to + (i - begin - in_panel) * steps + k * kWidth + in_panel * kLanes;
    const auto* p = first + i * x.line_stride + 2 * k * x.depth_stride;
    if (k + kLanes <= whole && x.depth_stride == 1) {
      const int64_t next = NumbersAhead(k, whole, 2, x.line_stride);
      for (int64_t l = 0; l < lines; ++l) {
        __builtin_prefetch(p + l * x.line_stride + next);
        Store(Type::Along(p + l * x.line_stride), block + l * kLanes);
      }
    } else if (k + kLanes <= whole && lines == kLanes) {
      V v[kLanes];
      for (int s = 0; s < kLanes; ++s) {
        v[s] = Type::Across(p + 2 * s * x.depth_stride, x.depth_stride);
      }
      Transpose(v);
      for (int l = 0; l < kLanes; ++l) Store(v[l], block + l * kLanes);
    } else {
      for (int64_t l = 0; l < lines; ++l) {
        for (int64_t s = 0; s < kLanes; ++s) {
          const auto* q = p + l * x.line_stride + 2 * s * x.depth_stride;
          block[l * kLanes + s] =
              k + s < exist ? Type::One(q, x.depth_stride, k + s < whole) : 0.0f;
        }
      }
    }
  };
  if (x.depth_stride == 1) {
    for (int64_t i = begin; i < end; i += kLanes) {
      for (int64_t k = 0; k < steps; k += kLanes) pack(i, k);
    }
  } else {
    for (int64_t k = 0; k < steps; k += kLanes) {
      for (int64_t i = begin; i < end; i += kLanes) pack(i, k);
    }
  }
}

// Loads a tile register, which gcc wants to see as a digit. What is used `once` must not drive the
// panel that is kept out of the first-level cache.
#define PD_LOAD_TILE(number, once, data, stride)    \
  do {                                              \
    if constexpr (once) {                           \
      _tile_stream_loadd(number, (data), (stride)); \
    } else {                                        \
      _tile_loadd(number, (data), (stride));        \
    }                                               \
  } while (false)

// With kExchanged the tile is that of the transpose of the result, and the panel that is used again
// is one of a, not of b.
template <bool kExchanged>
struct AmxTile {
  static constexpr bool kTransposes = kExchanged, kFetchesB = false;
  static constexpr int kRows = 32, kColumns = 32;
  static constexpr int64_t kUnit = kLanes;  // of steps

  // The registers' shape, for as long as a thread multiplies.
  class Registers {
   public:
    Registers() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
      } shape;
      for (int i = 0; i < 8; ++i) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
      }
      Memory();
      _tile_loadconfig(&shape);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
  };

  // A panel of a: where its first line is, and bytes from a line, and from a block of 16 steps, to
  // the next.
  struct LeftPanel {
    const char* data;
    int64_t line, block;
  };
  static LeftPanel Left(const float* packed) {
    return {reinterpret_cast<const char*>(packed), kLanes * 4, kRows * kLanes * 4};
  }
  // Whether lines before `line` are whole panels over `steps` steps from `k` on as they lie.
  static bool InPlace(const Lines& x, int64_t line, int64_t k, int64_t steps) {
    const bool whole = line <= x.lines && 2 * (k + steps) <= x.depth;
    return kExchanged && x.dtype == DType::kBf16 && whole;  // lines lie along memory
  }
  static LeftPanel LeftInPlace(const Lines& x, int64_t line, int64_t step) {
    return {static_cast<const char*>(x.data) + 2 * (line * x.line_stride + 2 * step),
            2 * x.line_stride, kLanes * 4};
  }

  static void PackA(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                    float* to) {
    if (x.dtype == DType::kF32)
      return PackLinesOf<kRows, F32Pairs>(x, panel, panels, k0, steps, to);
    PackLinesOf<kRows, Bf16Pairs>(x, panel, panels, k0, steps, to);
  }
  static void PackB(const Lines& x, int64_t panel, int64_t panels, int64_t k0, int64_t steps,
                    float* to) {
    PackPanels<kColumns>(x, true, panel, panels, k0, steps, to);
  }

  static __attribute__((noinline)) void Accumulate(LeftPanel a, const float* b, int64_t steps,
                                                   float* sums, bool add, const float* next,
                                                   const Ahead& source, int64_t, const Corner* to) {
    constexpr int kHalf = 16 * kColumns;  // from the upper tiles of the result to the lower ones
    Memory();
    if (add) {
      _tile_loadd(0, sums, kColumns * 4);
      _tile_loadd(1, sums + 16, kColumns * 4);
      _tile_loadd(2, sums + kHalf, kColumns * 4);
      _tile_loadd(3, sums + kHalf + 16, kColumns * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    // What is written next, or summed up, is asked for between the products.
    const char* ahead = to ? to->data : reinterpret_cast<const char*>(next);
    const int64_t stride_ahead = to ? to->stride * ElementSize(to->dtype) : kColumns * 4;
    int64_t left = to ? to->rows : kRows;
    const int64_t share = Ceil(kRows * kLanes, steps + 1);
    const int64_t piece =
        Ceil(source.bytes * kLanes, steps * 64 + 1) * 64;  // of a line of `source`
    int64_t offset = 0;
    for (int64_t k = 0; k < steps; k += kLanes, a.data += a.block, b += kColumns * kLanes) {
      for (const int64_t stop = Least(offset + piece, source.bytes); offset < stop; offset += 64) {
        for (int64_t l = 0; l < source.lines; ++l) {
          __builtin_prefetch(source.data + l * source.stride + offset, 0, 2);
        }
      }
      for (int64_t q = 0; q < share && left > 0; ++q, --left, ahead += stride_ahead) {
        __builtin_prefetch(ahead, 1);
        __builtin_prefetch(ahead + 64, 1);
      }
      PD_LOAD_TILE(4, !kExchanged, a.data, a.line);
      PD_LOAD_TILE(6, kExchanged, b, kColumns * 4);
      _tile_dpbf16ps(0, 4, 6);
      PD_LOAD_TILE(7, kExchanged, b + 16, kColumns * 4);
      _tile_dpbf16ps(1, 4, 7);
      PD_LOAD_TILE(5, !kExchanged, a.data + 16 * a.line, a.line);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    const bool direct = to && to->dtype == DType::kF32 && !to->accumulate && !kExchanged &&
                        to->columns == kColumns && to->rows == kRows;
    alignas(64) float tile[kRows * kColumns];
    float* target = !to ? sums : direct ? reinterpret_cast<float*>(to->data) : tile;
    const int64_t stride = direct ? to->stride : kColumns;
    _tile_stored(0, target, stride * 4);
    _tile_stored(1, target + 16, stride * 4);
    _tile_stored(2, target + 16 * stride, stride * 4);
    _tile_stored(3, target + 16 * stride + 16, stride * 4);
    Memory();
    if (target != tile) return;
    if (kExchanged) {
      WriteTransposed(tile, *to);
    } else {
      WriteTile(tile, kColumns, *to);
    }
  }

 private:
  // What compilers do not know of the tile instructions: that they read memory.
  static PD_INLINE void Memory() { __asm__ volatile("" ::: "memory"); }

  static void WriteTransposed(const float* tile, const Corner& to) {
    alignas(64) float turned[kColumns * kRows];
    const bool direct = to.dtype == DType::kF32 && !to.accumulate && to.columns == kRows;
    float* target = direct ? reinterpret_cast<float*>(to.data) : turned;
    const int64_t stride = direct ? to.stride : kRows;
    for (int64_t j = 0; j < Least(kColumns, to.rows); j += kLanes) {
      for (int64_t i = 0; i < kRows; i += kLanes) {
        const float* line[kLanes];
        for (int l = 0; l < kLanes; ++l) line[l] = tile + (i + l) * kColumns + j;
        V v[kLanes];
        LoadTransposed(line, v);
        const int64_t rows = Least(kLanes, to.rows - j);
        for (int64_t l = 0; l < rows; ++l) Store(v[l], target + (j + l) * stride + i);
      }
    }
    if (!direct) WriteTile(turned, kRows, to);
  }
};

#undef PD_LOAD_TILE

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
#endif
