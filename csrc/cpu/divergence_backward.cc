#define PD_TARGET_INCLUDE "cpu/divergence_backward-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(divergence_backward)
PD_EXPORT(divergence_overwrite)
}  // namespace pd
