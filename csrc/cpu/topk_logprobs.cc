// Outside the targets: the standard library keeps the instruction set of the oldest machine.
#include <algorithm>
#include <functional>
#define PD_TARGET_INCLUDE "cpu/topk_logprobs-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(topk_logprobs_forward)
}  // namespace pd
