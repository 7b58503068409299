#define PD_TARGET_INCLUDE "cpu/cache_decode-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(cache_decode)
}  // namespace pd
