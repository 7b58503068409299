// The C interface of the CUDA kernels of `topk_divergence`: what the operator file hands over.
//
// Everything is a raw pointer, a size or an option, so that no torch is needed to compile or to
// call the kernels. Strides are in elements; dtype codes are those of pydistill::Dtype (0 fp32,
// 1 bf16, 2 fp16). The meaning of each tensor is in docs/ops/topk_divergence.md.
#pragma once

#include <cstdint>

struct TopkDivergenceCall {
  const void* student;    // [rows, vocab], unit last stride
  const int64_t* ids;     // [rows, slots]; negative: an empty slot
  const float* log_p;     // [rows, slots], the teacher at the call's temperature
  const float* log_tail;  // [rows], or null: the tail has no cell, or the teacher gives it nothing
  const bool* counted;    // [rows], or null: all are
  const float* params;    // [rows, 2]: T, beta; or null: the scalars below
  int64_t rows, vocab, slots;
  int64_t student_stride;
  int32_t student_dtype, kind, mode, scale_t2;
  float temperature, beta;

  float* loss;   // [rows], written by forward
  float* saved;  // [rows, 7], written by forward, read by backward

  // Backward only. It may be given some columns of the rows that forward read: `student`, `grad`
  // and `vocab` are then theirs, and the ids of all other tokens negative.
  const float* grad_rows;  // [rows], upstream gradient of each loss
  void* grad;              // [rows, vocab], the student's dtype; may be `student`
  int64_t grad_stride;
};

// Each returns 0 or a CUDA error code. `stream` is a cudaStream_t.
extern "C" {
int pyd_topk_divergence_forward(const TopkDivergenceCall* call, void* stream);
int pyd_topk_divergence_backward(const TopkDivergenceCall* call, void* stream);
}
