// The torch-free face of a decoder layer: what lies between its products.
// docs/ops/decoder_layer.md says what is computed.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace pd {

// Rows of `width` numbers: out = weight * x / sqrt(mean(x^2) + eps).
struct NormArgs {
  const void *x, *weight;
  void* out;
  DType dtype;  // of all three
  int64_t width;
  float eps;
};

// Numbers: out = x + y, y a product's rows of `width`, to which a bias is added if there is one.
struct ResidualArgs {
  const void *x, *bias;
  const float* y;
  void* out;
  DType dtype;
  int64_t width;
};

// Numbers: out = silu(gate) * up.
struct GateArgs {
  const float *gate, *up;
  void* out;
  DType dtype;
};

// A batch of `tokens` new tokens a request, row b * tokens + t of the products: queries, keys and
// values of heads of `size` numbers, of which `heads / groups` queries share a key. The cache holds
// `columns` tokens of each request before them, those of request b from column starts[b] on.
struct HeadsArgs {
  int64_t batch, tokens, heads, groups, size, columns, window;  // window: 0 for all columns
  int64_t together;  // heads of a unit of `attend`, a divisor of heads / groups
  float *q, *k;      // [rows, heads or groups, size]
  const float* v;
  const void *q_bias, *k_bias, *v_bias;  // [heads or groups, size], or null
  const void *q_norm, *k_norm;           // [size], or null
  const void *cos, *sin;                 // [batch, tokens, size], of two strides
  int64_t rotary_batch, rotary_token;
  void *keys, *values;  // [batch, groups, columns and more, size], of three strides each
  int64_t key_batch, key_head, key_column;
  int64_t value_batch, value_head, value_column;
  const int64_t* starts;
  void* out;    // [rows, heads, size]
  DType dtype;  // of all but the products
  float scale, eps;
};

using DecoderNorm = void (*)(const NormArgs&, int64_t begin, int64_t end);             // rows
using DecoderResidual = void (*)(const ResidualArgs&, int64_t begin, int64_t end);     // rows
using DecoderGate = void (*)(const GateArgs&, int64_t begin, int64_t end);             // numbers
using DecoderPlace = void (*)(const HeadsArgs&, int64_t begin, int64_t end);           // rows
using DecoderAttend = void (*)(const HeadsArgs&, int64_t begin, int64_t end, float*);  // units

// Of the scores of one query in the scratch memory of `attend`, and all of it, in floats.
inline int64_t scores_stride(const HeadsArgs& a) { return (a.columns + a.tokens + 32) / 16 * 16; }
inline int64_t attend_scratch(const HeadsArgs& a) {
  return 4 * (scores_stride(a) + 2 * ((a.size + 63) / 64 * 64));
}

// Tables of one function per Capability. `place` turns queries and keys and writes keys and values
// to the cache; then `attend` takes units b * heads / together + i, all tokens of each.
extern const DecoderNorm decoder_norm_table[];
extern const DecoderResidual decoder_residual_table[];
extern const DecoderGate decoder_gate_table[];
extern const DecoderPlace decoder_place_table[];
extern const DecoderAttend decoder_attend_table[];

}  // namespace pd
