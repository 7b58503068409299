// The C interface of the CUDA kernels of `verify`: what the operator file hands over.
//
// Everything is a raw pointer, a size or an option, so that no torch is needed to compile or to
// call the kernels. Strides and steps are in elements; a step of 0 serves all requests, or rows, by
// one. dtype codes are those of pydistill::Dtype (0 fp32, 1 bf16, 2 fp16), methods and leniences
// indices into METHODS and LENIENCES of pydistill/reference/verify.py. The meaning of each tensor
// is in docs/ops/verify.md.
#pragma once

#include <cstdint>

struct VerifyCall {
  const void* target;          // [batch, slots + 1, vocab], unit last stride
  const void* draft;           // [batch, slots, vocab or support_size]; null: point masses
  const int64_t* ids;          // [batch, slots]
  const int64_t* num_drafted;  // [batch or 1]
  const double* warpers;       // [batch or 1, 8]: the target's and the draft's
  const int64_t* seed;         // [batch or 1]
  const int64_t* position;     // [batch or 1]
  const float* logit_bias;     // [batch or 1, vocab], or null
  const int32_t* parent;       // [batch or 1, slots] of trees, null of chains
  const int64_t* support;      // [batch or 1, slots or 1, support_size], or null: all tokens
  int64_t batch, slots, vocab, support_size;
  int64_t target_request_stride, target_row_stride, draft_request_stride, draft_row_stride;
  int64_t drafted_step, warper_step, seed_step, position_step, bias_step, parent_step;
  int64_t support_request_step, support_row_step;
  int32_t dtype, method, lenience, unused;
  double strength, alpha;

  void* scratch;  // pyd_verify_scratch bytes, 8-byte aligned; holds nothing between calls

  int64_t* tokens;        // [batch, slots + 1]
  int64_t* num_accepted;  // [batch]
  float* logprobs;        // [batch, slots + 1]
  float* overlap;         // [batch, slots]
  float* bias;            // [batch, slots]
  float* target_lse;      // [batch, slots + 1]
  float* draft_lse;       // [batch, slots]
  int32_t* flags;         // [batch, slots + 1]
  int64_t* path;          // [batch, slots]
};

// Each returns 0 or a CUDA error code. `stream` is a cudaStream_t.
extern "C" {
int pyd_verify(const VerifyCall* call, void* stream);
// Writes how many bytes of scratch a call with these sizes needs; no other pointer is read.
int pyd_verify_scratch(const VerifyCall* call, int64_t* bytes);
}
