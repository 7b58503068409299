// coins[i] of seeds, positions and slots, of one stream.
#include "cuda/verify-coins.cuh"

namespace {

__global__ void coins(const int64_t* seed, const int64_t* position, const int64_t* slot,
                      int64_t stream, double* out) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = pydistill::coin(seed[i], position[i], slot[i], static_cast<uint32_t>(stream));
}

}  // namespace

PYD_API int pyd_coins(const int64_t* seed, const int64_t* position, const int64_t* slot,
                      int64_t kind, double* out, int64_t count, void* stream) {
  return PYD_LAUNCH(coins, 1, static_cast<unsigned>(count), 0, stream, seed, position, slot, kind,
                    out);
}
