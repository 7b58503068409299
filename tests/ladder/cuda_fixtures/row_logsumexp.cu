// Logsumexp and arg-max of each row of logits: the shape of every row kernel, with known answers.
// One block a row, one read of the row.
#include "cuda/common.cuh"

namespace {

using namespace pydistill;

template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock)
    row_logsumexp(const T* __restrict__ logits, float* __restrict__ out, int* __restrict__ argmax,
                  int64_t columns, int64_t stride) {
  constexpr int kTile = 8;
  __shared__ Softmax softmax_scratch[kBlock / kWarp];
  __shared__ ArgMax argmax_scratch[kBlock / kWarp];
  const T* row = logits + static_cast<int64_t>(blockIdx.x) * stride;
  const bool wide = is_wide_aligned(row);
  Softmax state = Softmax::empty();
  ArgMax best = ArgMax::empty();
  for (int64_t start = threadIdx.x * kTile; start < columns; start += kBlock * kTile) {
    float values[kTile];
    load_tile(row, start, columns, wide, -INFINITY, values);
    for (int i = 0; i < kTile; ++i) {
      state = push(state, values[i]);
      best = MergeArgMax{}(best, {values[i], static_cast<int>(start + i)});
    }
  }
  state = block_reduce<kBlock>(state, MergeSoftmax{}, softmax_scratch);
  best = block_reduce<kBlock>(best, MergeArgMax{}, argmax_scratch);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = logsumexp(state);
    argmax[blockIdx.x] = best.index;
  }
}

}  // namespace

PYD_API int pyd_row_logsumexp(int dtype, const void* logits, float* out, int* argmax, int64_t rows,
                              int64_t columns, int64_t stride, void* stream) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kBlock = 128;
    return PYD_LAUNCH((row_logsumexp<T, kBlock>), static_cast<unsigned>(rows), kBlock, 0, stream,
                      static_cast<const T*>(logits), out, argmax, columns, stride);
  });
}
