// Outside the targets: the standard library keeps the instruction set of the oldest machine.
#include <algorithm>
#include <functional>
#include <new>
#include <type_traits>
#define PD_TARGET_INCLUDE "cpu/verify-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(verify_requests)
}  // namespace pd
