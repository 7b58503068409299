// Small kernels of known answers, one for each thing that cusim must get right.
#include "cuda/common.cuh"

namespace {

using namespace pydistill;

struct ScaleCall {
  const float* in;
  float* out;  // [n]; may be `in`
  int32_t n;
  float factor, shift;
  bool negate;
  int64_t offset;
};

__global__ void scale(ScaleCall call) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= call.n) return;
  const float x = call.in[call.offset + i] * call.factor + call.shift;
  call.out[i] = call.negate ? -x : x;
}

template <class From, class To>
__global__ void convert(const From* in, To* out, int64_t n) {
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  const bool wide = is_wide_aligned(in) && is_wide_aligned(out);
  if (start >= n) return;
  float values[8];
  load_tile(in, start, n, wide, 0.0f, values);
  store_tile(out, start, n, wide, values);
}

// out[0..4]: block sum, block max, arg-max, its value, number of non-negative values.
__global__ void reductions(const float* in, float* out) {
  __shared__ float scratch[8];
  __shared__ ArgMax argmax_scratch[8];
  const float x = in[threadIdx.x];
  const float sum = block_reduce<256>(x, Sum{}, scratch);
  const float max = block_reduce<256>(x, Max{}, scratch);
  const ArgMax best =
      block_reduce<256>(ArgMax{x, static_cast<int>(threadIdx.x)}, MergeArgMax{}, argmax_scratch);
  const int positive = __syncthreads_count(x >= 0.0f);
  if (threadIdx.x == 0) {
    out[0] = sum;
    out[1] = max;
    out[2] = static_cast<float>(best.index);
    out[3] = best.value;
    out[4] = static_cast<float>(positive);
  }
}

// Each warp reverses its 32 numbers, votes on their sign, and scans them.
__global__ void warp_collectives(const int* in, int* reversed, int* votes, int* scan, int* total) {
  const int lane = threadIdx.x % 32;
  const int x = in[threadIdx.x];
  reversed[threadIdx.x] = __shfl_sync(kFullMask, x, 31 - lane);
  votes[threadIdx.x] = static_cast<int>(__ballot_sync(kFullMask, x < 0));
  int running = x;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(kFullMask, running, offset);
    if (lane >= offset) running += below;
  }
  scan[threadIdx.x] = running;
  total[threadIdx.x] = __reduce_add_sync(kFullMask, x);
}

// Reverses each block's slice through dynamic shared memory.
__global__ void reverse_blocks(const float* in, float* out) {
  PYD_DYNAMIC_SHARED(float, tile);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x;
  tile[threadIdx.x] = in[base + threadIdx.x];
  __syncthreads();
  out[base + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void histogram(const int* in, int* counts, int n) {
  __shared__ int local[16];
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&local[in[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

__global__ void read_unwritten_shared(float* out) {
  __shared__ float never_written[32];
  PYD_DYNAMIC_SHARED(float, dynamic);
  out[threadIdx.x] = never_written[threadIdx.x] + dynamic[threadIdx.x];
}

// Neighbouring lanes exchange through shared memory, ordered by __syncwarp alone.
__global__ void warp_exchange(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Loads in[i * step]: a request of a warp touches 4 sectors for step 1 and 32 for step 8.
__global__ void strided_copy(const float* in, float* out, int step) {
  out[threadIdx.x] = in[threadIdx.x * step];
}

__global__ void add_one(float* data) { data[threadIdx.x] += 1.0f; }

}  // namespace

PYD_API int pyd_convert(int from, int to, const void* in, void* out, int64_t n, void* stream) {
  return dispatch_dtype(from, [&](auto from_type) {
    return dispatch_dtype(to, [&](auto to_type) {
      using From = typename decltype(from_type)::type;
      using To = typename decltype(to_type)::type;
      return PYD_LAUNCH((convert<From, To>), static_cast<unsigned>((n + 511) / 512), 64, 0, stream,
                        static_cast<const From*>(in), static_cast<To*>(out), n);
    });
  });
}
PYD_API int pyd_reductions(const float* in, float* out, void* stream) {
  return PYD_LAUNCH(reductions, 1, 256, 0, stream, in, out);
}
PYD_API int pyd_warp_collectives(const int* in, int* reversed, int* votes, int* scan, int* total,
                                 void* stream) {
  return PYD_LAUNCH(warp_collectives, 1, 64, 0, stream, in, reversed, votes, scan, total);
}
PYD_API int pyd_reverse_blocks(const float* in, float* out, int blocks, void* stream) {
  return PYD_LAUNCH(reverse_blocks, blocks, 64, 64 * sizeof(float), stream, in, out);
}
PYD_API int pyd_histogram(const int* in, int* counts, int n, void* stream) {
  return PYD_LAUNCH(histogram, 3, 64, 0, stream, in, counts, n);
}
PYD_API int pyd_read_unwritten_shared(float* out, void* stream) {
  return PYD_LAUNCH(read_unwritten_shared, 1, 32, 32 * sizeof(float), stream, out);
}
PYD_API int pyd_warp_exchange(const float* in, float* out, void* stream) {
  return PYD_LAUNCH(warp_exchange, 1, 64, 0, stream, in, out);
}
PYD_API int pyd_strided_copy(const float* in, float* out, int step, void* stream) {
  return PYD_LAUNCH(strided_copy, 1, 64, 0, stream, in, out, step);
}
PYD_API int pyd_add_one_twice(float* data, void* stream) {
  const int error = PYD_LAUNCH(add_one, 1, 32, 0, stream, data);
  return error ? error : PYD_LAUNCH(add_one, 1, 32, 0, stream, data);
}
PYD_API int pyd_launch_shape(int grid, int block, int64_t shared_bytes, float* data, void* stream) {
  return PYD_LAUNCH(add_one, grid, block, static_cast<size_t>(shared_bytes), stream, data);
}
PYD_API int pyd_scale(const ScaleCall* call, void* stream) {
  return PYD_LAUNCH(scale, 1, 64, 0, stream, *call);
}
