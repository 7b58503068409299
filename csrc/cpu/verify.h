// The torch-free face of the verification kernel. docs/ops/verify.md gives the maths.
#pragma once

#include <cstdint>

#include "cpu/divergence.h"
#include "cpu/rows.h"

namespace pd {

// Numbers shared with every backend and with pydistill/reference/verify.py.
enum VerifyMethod {
  kVerifyToken,
  kVerifyBlock,
  kVerifyTypical,
  kVerifyTargetOnly,  // from here on trees
  kVerifyTree,
  kVerifyTraversal,
  kVerifyMethods
};
enum Lenience { kStrict, kLinear, kSquare, kExponential, kEnsemble, kTvBudget, kLeniences };
enum VerifyFlag { kBadId = 1, kBadTarget = 2, kBadDraft = 4, kImpossible = 8, kBadParent = 16 };
enum VerifyStream { kAcceptStream = 0, kResampleStream = 1 };
enum Warper { kTemperature, kTopK, kTopP, kLogMinP, kWarpers };

// Rows of logits of B requests, distances in elements.
struct VerifyRows {
  const char* data;  // null: no rows
  int64_t request_stride, row_stride;
};

struct VerifyArgs {
  DType dtype;
  int64_t slots, vocab;        // K, in a tree the number of nodes, and V
  VerifyRows target, draft;    // [B, K + 1, V] and [B, K, V], or [B, K, S] with support
  const int64_t* ids;          // [B, K]
  const int64_t* num_drafted;  // [B], or [1] with drafted_step 0
  const int64_t* seed;         // the same
  const int64_t* position;     // the same
  const double* warpers;       // [B, 2 kWarpers], or [1, ...] with warper_step 0
  const float* bias;           // [B, V], or [1, V] with bias_step 0, or null
  const int32_t* parent;       // [B, K], or [1, K] with parent_step 0; null for chains
  const int64_t* support;      // [B or 1, K or 1, S]: the draft's tokens; null for all
  int64_t support_size, support_request_step, support_row_step;
  int64_t drafted_step, seed_step, position_step, warper_step, bias_step, parent_step;
  VerifyMethod method;
  Lenience lenience;
  double strength, alpha;

  int64_t *tokens, *num_accepted;   // [B, K + 1] and [B]
  float *logprobs, *target_lse;     // [B, K + 1]
  float *overlap, *tv, *draft_lse;  // [B, K]
  int32_t* flags;                   // [B, K + 1]
  int64_t* path;                    // [B, K]
};

// Spreads the blocks of a row over threads: calls body(state, begin, end) until [0, blocks) is
// covered. Null: one thread.
using VerifySpread = void (*)(int64_t blocks, void (*body)(void* state, int64_t begin, int64_t end),
                              void* state);

// Requests [begin, end). `scratch` holds verify_scratch_bytes.
using VerifyRequests = void (*)(const VerifyArgs&, int64_t begin, int64_t end, VerifySpread,
                                float* scratch);
extern const VerifyRequests verify_requests_table[];  // one a Capability

inline constexpr int64_t kVerifyColumns = 1024;     // of a block
inline constexpr int64_t kVerifyPivots = 7;         // of one pass that looks for a cut
inline constexpr int64_t kVerifyCandidates = 1024;  // logits that are sorted to find it
inline constexpr int64_t kVerifySlotBytes = 320;    // what else is kept of a slot
inline constexpr int64_t kVerifyBlockNumbers = 3;   // a block and slot: two masses, one residual
inline constexpr int64_t kVerifyNodeBytes = 80;     // of a node or row of a tree, beside its slot

inline int64_t verify_blocks(const VerifyArgs& a) {
  return (a.vocab + kVerifyColumns - 1) / kVerifyColumns;
}

// One token of a draft that is known on a few, and its logit.
struct SupportEntry {
  int32_t id;
  float logit;
};

// What is kept of a draft's row that is known on a few tokens: the entries, and where those of each
// block begin.
inline int64_t verify_support_bytes(const VerifyArgs& a) {
  if (a.support == nullptr) return 0;
  return a.support_size * 8 + (verify_blocks(a) / 2 + 1) * 8;
}

inline int64_t verify_scratch_bytes(const VerifyArgs& a) {
  const int64_t a_slot = kVerifyBlockNumbers * verify_blocks(a) * 8;
  const int64_t passes = 2 * kVerifyPivots * verify_blocks(a) * 8;
  const int64_t a_node = a.parent == nullptr ? 0 : kVerifyNodeBytes;
  return (a.slots + 1) * (a_slot + kVerifySlotBytes + a_node + verify_support_bytes(a)) + passes +
         4 * (kVerifyCandidates + kVerifyColumns);
}

// Divergence of the verified pairs and its gradient. VerifyArgs give the rows, the warpers and, of
// the verification, `overlap` and `flags`.
struct VerifyGradient {
  Kind kind;
  float beta;           // of jsd
  float* divergence;    // [B, K]
  VerifyRows gradient;  // [B, K, V]; may be the draft itself
};

// Rows [begin, end) of the B K of the draft. `scratch` holds verify_gradient_bytes.
using VerifyGradientRows = void (*)(const VerifyArgs&, const VerifyGradient&, int64_t begin,
                                    int64_t end, float* scratch);
extern const VerifyGradientRows verify_gradient_rows_table[];  // one a Capability

inline int64_t verify_gradient_bytes(const VerifyArgs& a) {
  const int64_t blocks = verify_blocks(a), numbers = 2 * kVerifyPivots * blocks + blocks + 8;
  return 4 * blocks * kVerifyColumns + 8 * numbers + 4 * (kVerifyCandidates + kVerifyColumns) +
         8 * (a.vocab + 64) + 8 * (a.vocab / 1024 + 1);  // divergence_scratch_bytes at its most
}

}  // namespace pd
