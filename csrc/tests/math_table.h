// The vector maths of every instruction set as plain functions over arrays, for tests.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

enum class Math : int {
  kExp = 0,
  kExpNonPositive,
  kExpNormal,
  kExpLess,              // e^-87
  kExpNonPositiveOfTwo,  // e^x as computed beside e^x - 1
  kExpm1NonPositive,
  kExpm1,
  kLog,
  kLog1p,  // of w, with u = 1 + w rounded
  kExpClamped,
  kLogNormal,
  kReciprocal,
  kPhiSmall,
};
inline constexpr const char* kMathNames[] = {"exp",
                                             "exp_non_positive",
                                             "exp_normal",
                                             "exp_less",
                                             "exp_non_positive_of_two",
                                             "expm1_non_positive",
                                             "expm1",
                                             "log",
                                             "log1p",
                                             "exp_clamped",
                                             "log_normal",
                                             "reciprocal",
                                             "phi_small"};

// Tables of one function per Capability. `in` and `out` hold n elements and may end anywhere.
extern void (*const math_map_table[])(Math function, const float* in, int64_t n, float* out);
extern void (*const widen_table[])(DType dtype, const void* in, int64_t n, float* out);
extern void (*const narrow_table[])(DType dtype, const float* in, int64_t n, void* out);

}  // namespace pd
