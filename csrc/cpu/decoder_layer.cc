#define PD_TARGET_INCLUDE "cpu/decoder_layer-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(decoder_norm)
PD_EXPORT(decoder_residual)
PD_EXPORT(decoder_gate)
PD_EXPORT(decoder_place)
PD_EXPORT(decoder_attend)
}  // namespace pd
