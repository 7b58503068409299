// What a matrix product is to the kernels of gemm-inl.h: pointers, sizes, and how its work is cut.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/rows.h"

namespace pd {

// An operand as `lines` vectors of `depth` numbers: the rows of the left one, the columns of the
// right one. One of the strides (in elements) is 1.
struct Lines {
  const void* data;
  DType dtype;
  int64_t lines, depth, line_stride, depth_stride;
};

// out[i, j] = sum over k of a[i, k] b[k, j], plus what out held if `accumulate` (fp32 only).
// Columns of out have unit stride. out is not empty and overlaps neither operand. With `narrow` an
// fp32 operand beside a bf16 one may be rounded to bf16, and is where that is faster.
struct GemmArgs {
  Lines a, b;
  void* out;
  DType out_dtype;
  int64_t out_stride;
  bool accumulate;
  bool narrow;
};

// Threads share out the panels of the longer operand, the `split` one; the other's, the `shared`
// one's, are packed once for all of them, at most `shared_block` at a time.
struct GemmPlan {
  bool split_b;    // else a is split
  bool dots;       // the shared operand has few lines: dot products on the split one where it lies
  bool exchanged;  // the operands, so that the transpose of the result is computed
  bool pairs;      // operands are multiplied as bf16, two of the depth a step; else as fp32, one
  int64_t split_panels, shared_panels, shared_block;
  int64_t steps;                    // of the depth, whole ones of the micro-kernel
  int64_t depth_block;              // in steps; for dots in numbers
  int64_t pack_grain, split_grain;  // panels that are worth a thread
  int64_t split_unit;               // split panels that are in work together
  int64_t packed_bytes;             // for all threads
  int64_t scratch_bytes;            // for each
};

}  // namespace pd
