// What Python asks of the library itself, by ctypes: pydistill/_native.py.
#include "cpu/cpuid.h"

#define PD_API extern "C" __attribute__((visibility("default")))

PD_API const char* pydistill_cpu_capability() {
  return pd::capability_name(pd::active_capability());
}

PD_API const char* pydistill_set_cpu_capability(const char* name) {
  return pd::set_capability(name);
}
