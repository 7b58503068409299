// Kernels that are wrong, each in one way that a run with the right numbers may hide.
#include "cuda/common.cuh"

namespace {

using namespace pydistill;

// Shared memory is read before the other warps have surely written it.
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

// The second round overwrites what a slower warp may still read.
__global__ void missing_second_barrier(const float* in, float* out) {
  __shared__ float tile[64];
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

// Lanes of one warp exchange with no __syncwarp between; the shuffle orders no memory.
__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  const float unused = __shfl_xor_sync(kFullMask, in[threadIdx.x], 1);
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + 0.0f * unused;
}

__global__ void barrier_in_branch(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void mask_without_caller(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);
}

__global__ void masks_disagree(float* out) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}

__global__ void reads_outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void exited_lane(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1.0f, 1);
}

__global__ void warp_meets_barrier(float* out) {
  if (threadIdx.x == 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1.0f, 1);
}

__global__ void load_out_of_bounds(const float* in, float* out, int n) {
  out[threadIdx.x] = in[threadIdx.x + n];
}

__global__ void store_out_of_bounds(float* out, int n) { out[threadIdx.x + n] = 1.0f; }

__global__ void shared_out_of_bounds(float* out, int n) {
  __shared__ float tile[24];
  tile[(threadIdx.x + n) % 32] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[0];
}

__global__ void wild_pointer(float* out) {
  out[threadIdx.x] = *reinterpret_cast<const float*>(static_cast<uintptr_t>(64));
}

__global__ void misaligned(const float* in, float* out) {
  const float4 wide = *reinterpret_cast<const float4*>(in + 1);
  out[threadIdx.x] = wide.x;
}

// All blocks add to one number without atomics.
__global__ void blocks_add(float* out) {
  if (threadIdx.x == 0) out[0] = out[0] + 1.0f;
}

// Each block reads its right neighbour's element, then overwrites its own.
__global__ void write_after_foreign_read(float* data) {
  if (threadIdx.x != 0) return;
  const float next = data[blockIdx.x + 1];
  data[blockIdx.x] = next;
}

// An atomic on one side does not excuse a plain load on the other.
__global__ void atomic_and_plain(float* data, float* out) {
  if (threadIdx.x == 0) atomicAdd(data, 1.0f);
  if (threadIdx.x == 32) out[0] = data[0];
}

__global__ void dynamic_shared_out_of_bounds(float* out) {
  PYD_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_shared_race(const float* in, float* out) {
  PYD_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

}  // namespace

#define FAULT_WITH_SHARED(name, grid, block, bytes, ...) \
  if (which == index++) return PYD_LAUNCH(name, grid, block, bytes, stream, __VA_ARGS__);
#define FAULT(name, grid, block, ...) FAULT_WITH_SHARED(name, grid, block, 0, __VA_ARGS__)

// Numbered in the order of FAULTS in test_cusim.py.
PYD_API int pyd_fault(int which, const float* in, float* out, int n, void* stream) {
  int index = 0;
  FAULT(missing_barrier, 1, 64, in, out)
  FAULT(missing_second_barrier, 1, 64, in, out)
  FAULT(missing_syncwarp, 1, 32, in, out)
  FAULT(barrier_in_branch, 1, 64, out)
  FAULT(two_barriers, 1, 64, out)
  FAULT(mask_without_caller, 1, 32, out)
  FAULT(masks_disagree, 1, 32, out)
  FAULT(reads_outside_mask, 1, 32, out)
  FAULT(exited_lane, 1, 32, out)
  FAULT(warp_meets_barrier, 1, 32, out)
  FAULT(load_out_of_bounds, 1, 64, in, out, n)
  FAULT(store_out_of_bounds, 1, 64, out, n)
  FAULT(shared_out_of_bounds, 1, 32, out, n)
  FAULT(wild_pointer, 1, 32, out)
  FAULT(misaligned, 1, 32, in, out)
  FAULT(blocks_add, 4, 32, out)
  FAULT(write_after_foreign_read, 4, 32, out)
  FAULT(atomic_and_plain, 1, 64, out, out + 1)
  FAULT_WITH_SHARED(dynamic_shared_out_of_bounds, 1, 32, 31 * sizeof(float), out)
  FAULT_WITH_SHARED(dynamic_shared_race, 1, 64, 64 * sizeof(float), in, out)
  return 1;
}
