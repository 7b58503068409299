// The torch-free face of the causal convolution's kernels: what a call is, and one function a
// direction. docs/ops/causal_conv1d.md gives the maths.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

// The unit of work: so many tokens, in blocks of so many channels.
constexpr int64_t kConvTokens = 256, kConvChannels = 512;

// Contiguous numbers of any dtype.
struct Numbers {
  const void* data;
  DType dtype;
};

struct ConvArgs {
  Logits x;               // [M, D]
  int64_t width;          // W
  Numbers weight;         // [D, W]
  Numbers bias;           // [D], or of null data
  const void* state;      // [N, W - 1, D] of x's dtype, or null: zeros
  const int64_t* starts;  // [N + 1], from 0 to M, never falling
  int64_t sequences;      // N
  bool silu;

  void* out;  // [M, D] of x's dtype, forward

  Logits grad_out;   // [M, D] of x's dtype, backward
  void* grad_x;      // [M, D] of x's dtype
  void* grad_state;  // like `state`, of zeros where a sequence is empty; or null
  float* parts;      // [ceil(M / kConvTokens), W + 1, D], of zeros: the weight's gradient and the
                     // bias's; or null
};

inline int64_t conv_blocks(const ConvArgs& a) {
  return (a.x.width + kConvChannels - 1) / kConvChannels;
}
inline int64_t conv_units(const ConvArgs& a) {
  return (a.x.rows + kConvTokens - 1) / kConvTokens * conv_blocks(a);
}

using ConvUnits = void (*)(const ConvArgs&, int64_t begin, int64_t end);

// Tables of one function per Capability, over units [begin, end) of `conv_units`.
extern const ConvUnits causal_conv1d_forward_table[];   // out
extern const ConvUnits causal_conv1d_backward_table[];  // grad_x, grad_state and parts

}  // namespace pd
