// One way to launch a kernel, in two worlds: on a GPU under nvcc, on the CPU under -DCUSIM, where
// the same source is compiled as C++ and each CUDA thread is a fiber (tools/ladder/cuda/cusim.h).
//
//   return PYD_LAUNCH((row_logsumexp<float, 256>), rows, 256, shared_bytes, stream, x, out, n);
//
// evaluates to 0 or the CUDA error code. The parentheses keep template commas from the
// preprocessor. PYD_DYNAMIC_SHARED(float, tile) declares `float* tile`, the launch's dynamic shared
// memory; more than the 48 KiB that a block has unasked, static shared memory included, is asked
// for here. PYD_SHARED_LIMIT(kernel) is how many bytes of it a launch may have on the current
// device.
#pragma once

#include <cstddef>
#include <cstdint>

// A launcher is torch-free: raw pointers, sizes, a stream last; it returns a CUDA error code.
#define PYD_API extern "C" __attribute__((visibility("default")))

#ifdef CUSIM

#include "cusim.h"

#define PYD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                      \
   ::cusim::launch_kernel(#kernel, kernel, dim3(grid), dim3(block), shared_bytes, __VA_ARGS__))
#define PYD_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cusim::dynamic_shared())
#define PYD_SHARED_LIMIT(kernel) ::cusim::shared_limit()

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pydistill {

template <class... Params, class... Args>
int launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  void* stream, Args... args) {
  if (shared_bytes > 0) {  // what the kernel has of static shared memory is not known here
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Params>(args)...);
  return static_cast<int>(cudaGetLastError());
}

// 0 where the device does not answer; the launch will then say why.
template <class... Params>
int64_t shared_limit(void (*kernel)(Params...)) {
  int device = 0, most = 0;
  cudaFuncAttributes used = {};
  const auto* symbol = reinterpret_cast<const void*>(kernel);
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaFuncGetAttributes(&used, symbol) != cudaSuccess)
    return 0;
  return most - static_cast<int64_t>(used.sharedSizeBytes);
}

}  // namespace pydistill

#define PYD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::pydistill::launch_kernel(kernel, dim3(grid), dim3(block), shared_bytes, stream, __VA_ARGS__)
#define PYD_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pyd_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(pyd_dynamic_shared)
#define PYD_SHARED_LIMIT(kernel) ::pydistill::shared_limit(kernel)

#endif
