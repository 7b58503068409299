#define PD_TARGET_INCLUDE "cpu/token_logprob-inl.h"
#include "cpu/foreach_target.h"

namespace pd {
PD_EXPORT(token_logprob_forward)
PD_EXPORT(token_logprob_backward)
}  // namespace pd
