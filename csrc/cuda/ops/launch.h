// Where an operator file launches its kernels: on the tensors' device, in torch's current stream.
//
// The stable ABI of torch 2.10 knows a stream only by an opaque id, and linking to libtorch_cuda
// would keep the library from loading beside a CPU-only torch. So the one symbol that is needed is
// looked up in the libtorch_cuda that torch itself has loaded.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace pydistill {

inline void* current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA; install a CUDA build of torch");
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "no current stream on CUDA device ", device);
  return stream;
}

// Calls launch(stream) with `device` current; a CUDA error code becomes an exception.
template <class Launch>
void launch_on(int32_t device, const char* name, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(current_stream(device));
  STD_TORCH_CHECK(error == 0, name, " could not be launched: CUDA error ", error);
}

}  // namespace pydistill
