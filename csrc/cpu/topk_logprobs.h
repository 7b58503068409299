// The torch-free face of the top-k log-probabilities kernel. docs/ops/topk_logprobs.md gives the
// maths.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

struct TopkLogprobsArgs {
  Logits logits;  // of at most 2^32 columns
  int64_t k;      // 1 to the width
  double temperature;

  int64_t* ids;       // [R, k], by falling logit, then by rising id; -1 in empty slots
  float* logprobs;    // [R, k]; -inf in empty slots
  float *tail, *lse;  // [R]
};

// How many candidates are kept before the k best of them are picked.
inline int64_t topk_logprobs_limit(const TopkLogprobsArgs& a) { return 2 * a.k + 128; }

// Bytes of scratch a thread needs: the candidates, of which a block of 1024 columns may bring as
// many.
inline int64_t topk_logprobs_scratch_bytes(const TopkLogprobsArgs& a) {
  const int64_t most = topk_logprobs_limit(a) + 1024;
  return 8 * (most < a.logits.width ? most : a.logits.width);
}

using TopkLogprobsRows = void (*)(const TopkLogprobsArgs&, int64_t begin, int64_t end,
                                  float* scratch);

// One function per Capability, over rows [begin, end).
extern const TopkLogprobsRows topk_logprobs_forward_table[];

}  // namespace pd
