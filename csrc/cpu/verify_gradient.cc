// Outside the targets: the standard library keeps the instruction set of the oldest machine.
#include <algorithm>
#include <functional>
#define PD_TARGET_INCLUDE "cpu/verify_gradient-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(verify_gradient_rows)
}  // namespace pd
