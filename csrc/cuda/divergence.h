// The C interface of the CUDA kernels of `divergence`: what the operator file hands over.
//
// Everything is a raw pointer, a size or an option, so that no torch is needed to compile or to
// call the kernels. Strides are in elements; dtype codes are those of pydistill::Dtype (0 fp32,
// 1 bf16, 2 fp16). The meaning of each tensor is in docs/ops/divergence.md.
#pragma once

#include <cstdint>

struct DivergenceCall {
  const void* student;          // [student_count, >= vocab], unit last stride
  const void* teacher;          // [teacher_count, >= vocab], unit last stride
  const int64_t* student_rows;  // [pairs], or null: pair i is row i
  const int64_t* teacher_rows;
  const bool* counted;    // [pairs], or null: all are
  const int64_t* labels;  // [pairs], or null
  const float* params;    // [pairs, 3]: T, alpha, beta; or null: the scalars below
  int64_t pairs;
  int64_t student_count, student_stride;
  int64_t teacher_count, teacher_stride;
  int64_t vocab;
  int32_t student_dtype, teacher_dtype;
  int32_t kind, scale_t2;
  float temperature, alpha, beta;
  float label_weight, z_loss;

  float* loss;   // [pairs], written by forward
  float* saved;  // [pairs, 8], written by forward, read by backward; 16-byte aligned
  float* stats;  // [pairs, 6], or null: none wanted

  // Backward only. With `row_start` the pairs of student row i are group[row_start[i] ..
  // row_start[i + 1]), their gradients are added, and every row of `grad` is written; without it
  // only the rows that a pair names are, each by one pair.
  const int64_t* row_start;  // [student_count + 1], or null
  const int64_t* group;      // [pairs]
  const float* grad_rows;    // [pairs], upstream gradient of each loss
  void* grad;                // [student_count, columns], the student's dtype; may be `student`
  int64_t grad_stride, columns;
};

// Each returns 0 or a CUDA error code. `stream` is a cudaStream_t.
extern "C" {
int pyd_divergence_forward(const DivergenceCall* call, void* stream);
int pyd_divergence_backward(const DivergenceCall* call, void* stream);
}
