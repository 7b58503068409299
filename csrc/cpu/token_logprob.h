// The torch-free face of the token log-probability kernels: what a call is, and one function a
// direction. docs/ops/token_logprob.md gives the maths.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

// Numbers shared with every backend and with pydistill/reference/token_logprob.py.
enum TokenSaved { kTokenMax, kTokenLogZ, kTokenDepth, kTokenLogprob, kTokenStatus, kTokenSaved };
enum TokenStatus { kTokenSound = 0, kTokenIdOutOfRange };

struct TokenArgs {
  Logits logits;           // backward: whole rows, or a tile of their columns
  const int64_t* ids;      // [R]; backward: relative to the tile, any other number if outside
  const uint8_t* counted;  // [R] or null: all
  const float* params;     // [R] temperatures, or null: the scalar below
  double temperature;

  float *logprob, *entropy;                  // [R], forward
  float* saved;                              // [R, kTokenSaved]
  const float *grad_logprob, *grad_entropy;  // [R], backward
  void* grad;  // like `logits`, rows of `grad_stride`; may be the logits' memory
  int64_t grad_stride;
};

using TokenRows = void (*)(const TokenArgs&, int64_t begin, int64_t end);

// Tables of one function per Capability, over rows [begin, end).
extern const TokenRows token_logprob_forward_table[];   // logprob, entropy and saved
extern const TokenRows token_logprob_backward_table[];  // grad

}  // namespace pd
