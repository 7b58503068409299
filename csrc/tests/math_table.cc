#include "tests/math_table.h"

#define PD_TARGET_INCLUDE "tests/math_table-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(math_map)
PD_EXPORT(widen)
PD_EXPORT(narrow)
}  // namespace pd
