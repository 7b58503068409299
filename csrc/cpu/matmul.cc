#define PD_USES_TILES
#define PD_TARGET_INCLUDE "cpu/matmul-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(matmul_plan)
PD_EXPORT(matmul_pack)
PD_EXPORT(matmul_multiply)
}  // namespace pd
