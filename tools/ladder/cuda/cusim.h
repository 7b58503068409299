// The CUDA dialect that cusim understands: what a kernel source sees when it is compiled as C++.
//
//   g++ -x c++ -std=c++17 -DCUSIM kernel.cu cusim.cpp          (built by tools/ladder/cuda/sim.py)
//
// Every CUDA thread of a block is a fiber, and blocks run one at a time. A collective
// (__syncthreads, anything *_sync) blocks its fiber until every thread it names has arrived, and
// ends the launch with a message where a GPU would hang or be undefined: divergent barriers, masks
// that disagree, lanes that have exited. Shared variables are thread-local variables of this
// library, so that they lie in one block of memory which can be poisoned and bounds-checked, and so
// that the shared variables of templates work too. The fp16 and bf16 types are CUDA's own.
//
// Everything here is a thin wrapper that touches only its own stack: the memory hooks then see the
// loads and stores of the kernel and nothing else. Not covered, and a compile error if used: inline
// PTX, mma, cp.async, cooperative groups, __constant__ and __device__ variables, textures.
// Also unseen by the hooks: memcpy and memset of more than 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// The alignment leaves a gap behind every variable that does not fill it, where an index past the
// end is caught; one that runs into the next variable is not.
#define __shared__ static __thread __attribute__((aligned(128)))

namespace cusim {

// Where in the source a collective stands: threads that meet must meet at the same place.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class Access { kLoad, kStore, kAtomic };
enum class Shuffle { kXor, kDown, kUp, kIndex };

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();
void* dynamic_shared();
int64_t shared_limit();  // bytes of dynamic shared memory that a launch may have
int block_barrier(bool predicate, Site site);  // returns the number of true predicates
void warp_barrier(unsigned mask, Site site);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Site site);
void gather(unsigned mask, uint64_t bits, uint64_t (&lanes)[32], Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
void touch(const volatile void* address, size_t bytes, Access access);
int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(const void*),
           const void* closure, size_t closure_bytes);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Kernel arguments travel by value, as they do on a GPU.
template <class... Params, class... Args>
int launch_kernel(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                  size_t shared_bytes, Args&&... args) {
  struct Closure {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> arguments;
  };
  const Closure closure{kernel, {static_cast<Params>(args)...}};
  auto run = [](const void* data) {
    const auto* closure = static_cast<const Closure*>(data);
    std::apply(closure->kernel, closure->arguments);
  };
  return launch(name, grid, block, shared_bytes, run, &closure, sizeof closure);
}

// Applies `update` to *address as one atomic step; the hooks see one atomic access.
template <class T, class Update>
__attribute__((no_sanitize("thread"), noinline)) T atomic(T* address, Update update) {
  touch(address, sizeof(T), Access::kAtomic);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cusim

#define threadIdx (::cusim::thread_index())
#define blockIdx (::cusim::block_index())
#define blockDim (::cusim::block_dim())
#define gridDim (::cusim::grid_dim())
#define warpSize 32

using std::max;
using std::min;

inline void __syncthreads(cusim::Site site = cusim::Site::here()) {
  cusim::block_barrier(false, site);
}
inline int __syncthreads_count(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cusim::Site site = cusim::Site::here()) {
  cusim::warp_barrier(mask, site);
}
// Fences order memory, not execution: fibers see every write at once, and the race hooks still
// demand a barrier.
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cusim::Site site = cusim::Site::here()) {
  return cusim::from_bits<T>(
      cusim::shuffle(cusim::Shuffle::kXor, mask, cusim::to_bits(value), lane_mask, width, site));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cusim::Site site = cusim::Site::here()) {
  return cusim::from_bits<T>(cusim::shuffle(cusim::Shuffle::kDown, mask, cusim::to_bits(value),
                                            static_cast<int>(delta), width, site));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cusim::Site site = cusim::Site::here()) {
  return cusim::from_bits<T>(cusim::shuffle(cusim::Shuffle::kUp, mask, cusim::to_bits(value),
                                            static_cast<int>(delta), width, site));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cusim::Site site = cusim::Site::here()) {
  return cusim::from_bits<T>(
      cusim::shuffle(cusim::Shuffle::kIndex, mask, cusim::to_bits(value), source, width, site));
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cusim::Site site = cusim::Site::here()) {
  return cusim::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::ballot(mask, predicate != 0, site) == mask;
}

namespace cusim {
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, Site site) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "__reduce_*_sync takes 32-bit integers");
  uint64_t lanes[32];
  gather(mask, to_bits(value), lanes, site);
  T total = value;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T next = from_bits<T>(lanes[lane]);
    total = first ? next : combine(total, next);
    first = false;
  }
  return total;
}
}  // namespace cusim

template <class T>
T __reduce_add_sync(unsigned mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); }, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, [](T a, T b) { return a < b ? b : a; }, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, [](T a, T b) { return b < a ? b : a; }, site);
}

template <class T>
T atomicAdd(T* address, T value) {
  return cusim::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return cusim::atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
  return cusim::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
  return cusim::atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, T value) {
  return cusim::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return cusim::atomic(address, [=](T old) { return old == expected ? value : old; });
}

// Cache hints do not change the meaning of a load or store.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

// The fast intrinsics are computed exactly: cusim checks meaning, not the last bits of a GPU.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) { return cusim::from_bits<unsigned>(cusim::to_bits(x)); }
inline int __float_as_int(float x) { return cusim::from_bits<int>(cusim::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cusim::from_bits<float>(cusim::to_bits(x)); }
inline float __int_as_float(int x) { return cusim::from_bits<float>(cusim::to_bits(x)); }
