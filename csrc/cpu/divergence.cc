#define PD_TARGET_INCLUDE "cpu/divergence-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(divergence_forward)
PD_EXPORT(divergence_keep)
}  // namespace pd
