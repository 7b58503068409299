// Compiles one kernel source once per instruction set. No include guard: included once per kernel.
//
//   // cpu/op.cc
//   #define PD_TARGET_INCLUDE "cpu/op-inl.h"
//   #include "cpu/foreach_target.h"
//   PD_EXPORT(op_rows)   // a table of pd::<target>::op_rows, indexed by Capability
//
// Each round defines PD_NAMESPACE (scalar, avx2, ...) and PD_TARGET (its number). The instruction
// set is set by pragma for that namespace only: a file-wide -m flag would leak wide instructions
// into the weak symbols of the standard library, and the linker may keep those for everybody.
// PD_TOGGLE flips every round, so that the guards of *-inl.h files open again (see vec-inl.h).
// The AMX capability runs the AVX512-BF16 code of all kernels but those that multiply tiles, which
// define PD_USES_TILES first.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/cpuid.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PD_TARGET_SCALAR 0
#define PD_TARGET_AVX2 1
#define PD_TARGET_AVX512 2
#define PD_TARGET_AVX512_BF16 3
#define PD_TARGET_AMX 4

#if defined(__clang__)
#define PD_PRAGMA(x) _Pragma(#x)
#define PD_BEGIN_TARGET(isa) \
  PD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PD_END_TARGET _Pragma("clang attribute pop")
#else
#define PD_PRAGMA(x) _Pragma(#x)
#define PD_BEGIN_TARGET(isa) _Pragma("GCC push_options") PD_PRAGMA(GCC target(isa))
#define PD_END_TARGET _Pragma("GCC pop_options")
#endif

#undef PD_TOGGLE
#define PD_TARGET PD_TARGET_SCALAR
#define PD_NAMESPACE scalar
#include PD_TARGET_INCLUDE
#undef PD_TARGET
#undef PD_NAMESPACE

#if defined(__x86_64__)
#define PD_TOGGLE
PD_BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2")
#define PD_TARGET PD_TARGET_AVX2
#define PD_NAMESPACE avx2
#include PD_TARGET_INCLUDE
#undef PD_TARGET
#undef PD_NAMESPACE
PD_END_TARGET
#undef PD_TOGGLE

#ifdef PD_WITHOUT_AVX512  // a build for a machine that could not run it
namespace pd {
namespace avx512 = avx2;
namespace avx512_bf16 = avx2;
namespace amx = avx2;
}  // namespace pd
#else
#ifdef PD_WITHOUT_PLAIN_AVX512  // a build that takes AVX512-BF16's code for both
namespace pd {
namespace avx512_bf16 {}
namespace avx512 = avx512_bf16;
}  // namespace pd
#else
PD_BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512dq,avx512bw,avx512vl")
#define PD_TARGET PD_TARGET_AVX512
#define PD_NAMESPACE avx512
#include PD_TARGET_INCLUDE
#undef PD_TARGET
#undef PD_NAMESPACE
PD_END_TARGET

#define PD_TOGGLE
#endif
PD_BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
#define PD_TARGET PD_TARGET_AVX512_BF16
#define PD_NAMESPACE avx512_bf16
#include PD_TARGET_INCLUDE
#undef PD_TARGET
#undef PD_NAMESPACE
PD_END_TARGET
#undef PD_TOGGLE

#ifdef PD_USES_TILES
PD_BEGIN_TARGET(
    "avx2,fma,f16c,bmi,bmi2,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#define PD_TARGET PD_TARGET_AMX
#define PD_NAMESPACE amx
#include PD_TARGET_INCLUDE
#undef PD_TARGET
#undef PD_NAMESPACE
PD_END_TARGET
#else
namespace pd {
namespace amx = avx512_bf16;
}  // namespace pd
#endif
#endif

#define PD_EXPORT(function)                                                          \
  decltype(&scalar::function) const function##_table[pd::kCapabilities] = {          \
      &scalar::function, &avx2::function, &avx512::function, &avx512_bf16::function, \
      &amx::function};
#else
#define PD_EXPORT(function)                                                       \
  decltype(&scalar::function) const function##_table[pd::kCapabilities] = {       \
      &scalar::function, &scalar::function, &scalar::function, &scalar::function, \
      &scalar::function};
#endif
