#define PD_TARGET_INCLUDE "cpu/topk_divergence-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(topk_divergence_forward)
PD_EXPORT(topk_divergence_backward)
PD_EXPORT(topk_divergence_overwrite)
}  // namespace pd
