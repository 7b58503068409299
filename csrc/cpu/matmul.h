// The torch-free face of the matrix product: how a call's work is cut, and its two phases.
// docs/ops/matmul.md says what is computed.
#pragma once

#include "cpu/gemm.h"

namespace pd {

using MatmulPlan = GemmPlan (*)(const GemmArgs&);
// Panels [begin, end) of those from `first` on, of which there are `count` in `packed`.
using MatmulPack = void (*)(const GemmArgs&, const GemmPlan&, int64_t first, int64_t count,
                            int64_t begin, int64_t end, float* packed);
// Split panels [begin, end) with these.
using MatmulMultiply = void (*)(const GemmArgs&, const GemmPlan&, int64_t first, int64_t count,
                                int64_t begin, int64_t end, const float* packed, float* scratch);

// Tables of one function per Capability. For each block of shared panels, all are packed before any
// split panel is multiplied.
extern const MatmulPlan matmul_plan_table[];
extern const MatmulPack matmul_pack_table[];
extern const MatmulMultiply matmul_multiply_table[];

}  // namespace pd
