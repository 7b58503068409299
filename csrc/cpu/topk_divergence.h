// The torch-free face of the top-k divergence kernels: what a call is, and one function a
// direction. docs/ops/topk_divergence.md gives the maths.
#pragma once

#include <cstdint>

#include "cpu/divergence.h"
#include "cpu/rows.h"

namespace pd {

// Numbers shared with every backend and with pydistill/reference/topk_divergence.py.
enum class TailMode : int { kWithTail = 0, kSupportOnly, kTruncated };
enum TopkSaved {
  kTopkMaxS,
  kTopkOutsideMax,
  kTopkLogQScale,
  kTopkCentre,
  kTopkCentreLow,
  kTopkOutsideSlope,
  kTopkStatus,
  kTopkSaved
};
enum TopkStatus { kSound = 0, kIdOutOfRange, kIdTwice };

struct TopkArgs {
  Logits student;
  const int64_t* ids;      // [R, K]; negative: an empty slot
  const float* log_p;      // [R, K], the teacher at the call's temperature
  const float* log_tail;   // [R] or null: no cell for the tail
  const uint8_t* counted;  // [R] or null: all
  const float* params;     // [R, 2] of temperature and beta, or null: the scalars below
  int64_t rows, k;
  Kind kind;
  TailMode mode;
  float temperature, beta;
  bool scale_t2;

  float* loss;             // [R]
  float* saved;            // [R, kTopkSaved]
  const float* grad_rows;  // [R], backward and overwrite
  void* grad;              // [R, width], rows of `grad_stride`; the student's dtype
  int64_t grad_stride;
};

// Bytes of scratch a thread needs: the row's exponentials and a maximum a block, and the support's
// logits and log-probabilities, padded.
inline int64_t topk_divergence_scratch_bytes(const TopkArgs& a) {
  return 4 * (a.student.width + 64) + 4 * (a.student.width / 1024 + 1) + 8 * (a.k + 1 + 64) + 256;
}

using TopkRows = void (*)(const TopkArgs&, int64_t begin, int64_t end, float* scratch);

// Tables of one function per Capability, over rows [begin, end).
extern const TopkRows topk_divergence_forward_table[];    // loss and saved
extern const TopkRows topk_divergence_backward_table[];   // grad
extern const TopkRows topk_divergence_overwrite_table[];  // loss, saved, and grad over the student

}  // namespace pd
