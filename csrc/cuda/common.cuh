// What every row kernel needs: dtypes, wide loads, reductions, the online softmax.
//
// A row kernel gives one row of logits to one block. Each thread takes tiles of kTile consecutive
// elements, converts them to float, keeps its own running statistics in registers, and the block
// merges them at the end; so global memory is touched once, 16 bytes a thread at a time where the
// row's alignment allows. All arithmetic is fp32.
//
// No torch, no inline PTX; offsets are int64_t, since rows * vocabulary passes 2^31.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"

namespace pydistill {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the C++ type of a dtype code that came through the C interface.
template <class F>
int dispatch_dtype(int code, F f) {
  switch (static_cast<Dtype>(code)) {
    case Dtype::kFloat32:
      return f(Type<float>{});
    case Dtype::kBfloat16:
      return f(Type<__nv_bfloat16>{});
    case Dtype::kFloat16:
      return f(Type<__half>{});
  }
  return kInvalidValue;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounds to nearest even, as torch does.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class T>
__device__ __forceinline__ bool is_wide_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

// Where tiles of a row begin so that they are 16-byte aligned: 0, or a few elements before the row.
template <class T>
__device__ __forceinline__ int tile_origin(const T* row) {
  return -static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T));
}

// 0 <= i < n in one comparison.
template <class Index>
__device__ __forceinline__ bool is_inside(Index i, Index n) {
  using Unsigned = std::make_unsigned_t<Index>;
  return static_cast<Unsigned>(i) < static_cast<Unsigned>(n);
}

// values[i] = row[start + i] for 0 <= start + i < n, and `fill` outside. `wide` promises that
// row + start is 16-byte aligned; whole tiles then move 16 bytes at a time.
template <int kTile, class T, class Index>
__device__ __forceinline__ void load_tile(const T* row, Index start, Index n, bool wide, float fill,
                                          float (&values)[kTile]) {
  constexpr int kPack = sizeof(uint4) / sizeof(T);
  static_assert(kTile % kPack == 0, "a tile is a whole number of 16-byte packs");
  if (wide && start >= 0 && start + kTile <= n) {
#pragma unroll
    for (int p = 0; p < kTile / kPack; ++p) {
      const uint4 pack = *reinterpret_cast<const uint4*>(row + start + p * kPack);
      const T* elements = reinterpret_cast<const T*>(&pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) values[p * kPack + i] = to_float(elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      values[i] = is_inside(start + i, n) ? to_float(row[start + i]) : fill;
  }
}

// The inverse: row[start + i] = values[i] for 0 <= start + i < n.
template <int kTile, class T, class Index>
__device__ __forceinline__ void store_tile(T* row, Index start, Index n, bool wide,
                                           const float (&values)[kTile]) {
  constexpr int kPack = sizeof(uint4) / sizeof(T);
  static_assert(kTile % kPack == 0, "a tile is a whole number of 16-byte packs");
  if (wide && start >= 0 && start + kTile <= n) {
#pragma unroll
    for (int p = 0; p < kTile / kPack; ++p) {
      uint4 pack;
      T* elements = reinterpret_cast<T*>(&pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) elements[i] = from_float<T>(values[p * kPack + i]);
      *reinterpret_cast<uint4*>(row + start + p * kPack) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (is_inside(start + i, n)) row[start + i] = from_float<T>(values[i]);
  }
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The largest value and the lowest index that has it. Index -1 says "nothing yet".
struct ArgMax {
  float value;
  int index;
  __device__ static ArgMax empty() { return {-INFINITY, -1}; }
};

struct MergeArgMax {
  __device__ __forceinline__ ArgMax operator()(ArgMax a, ArgMax b) const {
    if (a.index < 0) return b;
    if (b.index < 0) return a;
    const bool take_b = b.value > a.value || (b.value == a.value && b.index < a.index);
    return take_b ? b : a;
  }
};

// sum over seen x of exp(x - max), with the running maximum. A set of nothing but -inf keeps
// max = -inf and sum = 0, whose logsumexp is -inf, and never forms inf - inf; a NaN stays in sum.
struct Softmax {
  float max;
  float sum;
  __device__ static Softmax empty() { return {-INFINITY, 0.0f}; }
};

__device__ __forceinline__ float exp_below(float x, float max) {
  return x == -INFINITY ? 0.0f : expf(x - max);
}

__device__ __forceinline__ Softmax push(Softmax state, float x) {
  const float max = fmaxf(state.max, x);
  return {max, state.sum * exp_below(state.max, max) + exp_below(x, max)};
}

struct MergeSoftmax {
  __device__ __forceinline__ Softmax operator()(Softmax a, Softmax b) const {
    const float max = fmaxf(a.max, b.max);
    return {max, a.sum * exp_below(a.max, max) + b.sum * exp_below(b.max, max)};
  }
};

__device__ __forceinline__ float logsumexp(Softmax state) { return state.max + logf(state.sum); }

__device__ __forceinline__ float shuffle_xor(float x, int lane_mask) {
  return __shfl_xor_sync(kFullMask, x, lane_mask);
}

__device__ __forceinline__ double shuffle_xor(double x, int lane_mask) {
  return __shfl_xor_sync(kFullMask, x, lane_mask);
}

__device__ __forceinline__ ArgMax shuffle_xor(ArgMax x, int lane_mask) {
  ArgMax other;
  other.value = __shfl_xor_sync(kFullMask, x.value, lane_mask);
  other.index = __shfl_xor_sync(kFullMask, x.index, lane_mask);
  return other;
}

__device__ __forceinline__ Softmax shuffle_xor(Softmax x, int lane_mask) {
  return {__shfl_xor_sync(kFullMask, x.max, lane_mask),
          __shfl_xor_sync(kFullMask, x.sum, lane_mask)};
}

// Every lane gets the same total of its group of kWidth lanes; all lanes of the warp must call.
// `combine` must be commutative to the last bit, so that all lanes agree exactly.
template <int kWidth = kWarp, class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    value = combine(value, shuffle_xor(value, offset));
  return value;
}

// Every thread of a one-dimensional block of kBlock threads gets the same total. `scratch` is
// shared memory of kBlock / 32 elements; it may be used again at once.
template <int kBlock, class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine, T* scratch) {
  constexpr int kWarps = kBlock / kWarp;
  static_assert(kBlock % kWarp == 0 && (kWarps & (kWarps - 1)) == 0 && kWarps <= kWarp,
                "a block is 32, 64, 128, 256, 512 or 1024 threads");
  value = warp_reduce(value, combine);
  if constexpr (kWarps == 1) return value;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_reduce<kWarps>(scratch[lane % kWarps], combine);
  __syncthreads();
  return value;
}

// The same for N values at once, with two barriers in all. `scratch` holds N * kBlock / 32
// elements.
template <int kBlock, int N, class T, class Combine>
__device__ __forceinline__ void block_reduce_each(T (&values)[N], Combine combine, T* scratch) {
  constexpr int kWarps = kBlock / kWarp;
  static_assert(kBlock % kWarp == 0 && (kWarps & (kWarps - 1)) == 0 && kWarps <= kWarp,
                "a block is 32, 64, 128, 256, 512 or 1024 threads");
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = warp_reduce(values[i], combine);
    if (lane == 0) scratch[i * kWarps + threadIdx.x / kWarp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i)
    values[i] = warp_reduce<kWarps>(scratch[i * kWarps + lane % kWarps], combine);
  __syncthreads();
}

}  // namespace pydistill
