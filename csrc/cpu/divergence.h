// The torch-free face of the divergence kernels: what a call is, and one function a direction.
// docs/ops/divergence.md gives the maths and the layout of `saved` and `stats`.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

// Numbers shared with every backend and with pydistill/reference/divergence.py.
enum class Kind : int {
  kForwardKl = 0,
  kReverseKl,
  kJsd,
  kTvd,
  kSkewForwardKl,
  kSkewReverseKl,
  kAlphaBeta,
  kAdaptiveKl,
  kHellinger,
  kChi2,
  kTodi,
};
enum Saved { kMaxS, kLogZS, kMaxT, kLogZT, kValue, kCentre, kLogZ1, kHead, kSaved };
enum Stats { kLseS, kLseT, kEntropyS, kEntropyT, kAcceptance, kAgree, kStats };

struct DivergenceArgs {
  Logits student, teacher;
  int64_t pairs;                // R
  const int64_t* student_rows;  // [R] or null: pair i is row i
  const int64_t* teacher_rows;
  const uint8_t* counted;  // [R] or null: all
  const int64_t* labels;   // [R] or null
  const float* params;     // [R, 3] of temperature, alpha, beta, or null: the scalars below
  Kind kind;
  float temperature, alpha, beta;
  bool scale_t2;
  float label_weight, z_loss;
  int64_t vocab;

  float* loss;   // [R]
  float* saved;  // [R, kSaved], may be null for overwrite
  float* stats;  // [R, kStats] or null

  const float* grad_rows;    // [R], backward and overwrite
  const int64_t* row_start;  // [S + 1] or null: student row i is in pair i only
  const int64_t* pair_of;    // [R]
  void* grad;                // [S, width], contiguous rows of `grad_stride`; the student's dtype
  int64_t grad_stride;
};

// Bytes of scratch a thread needs: adaptive_kl's forward and forward_kl's overwrite keep both rows'
// exponentials and a maximum a block.
inline int64_t divergence_scratch_bytes(const DivergenceArgs& a, bool overwrite) {
  const bool needed = a.kind == Kind::kAdaptiveKl || (a.kind == Kind::kForwardKl && overwrite);
  return needed ? 8 * (a.vocab + 64) + 8 * (a.vocab / 1024 + 1) : 0;
}

using DivergenceRows = void (*)(const DivergenceArgs&, int64_t begin, int64_t end, float* scratch);
using DivergencePair = void (*)(const DivergenceArgs&, int64_t pair, float* saved, float* scratch);

// Tables of one function per Capability.
extern const DivergenceRows divergence_forward_table[];    // pairs [begin, end): loss, saved, stats
extern const DivergencePair divergence_keep_table[];       // forward_kl's exponentials in scratch
extern const DivergenceRows divergence_backward_table[];   // student rows [begin, end): grad
extern const DivergenceRows divergence_overwrite_table[];  // pairs: loss, and grad over the student

}  // namespace pd
