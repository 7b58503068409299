#define PD_TARGET_INCLUDE "cpu/causal_conv1d-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(causal_conv1d_forward)
PD_EXPORT(causal_conv1d_backward)
}  // namespace pd
