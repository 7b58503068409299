// decoder_layer on the CPU: a layer's products and what lies between them. Schema and checks with
// readable messages are in pydistill/ops/decoder_layer.py; here only what memory safety needs.
#include "cpu/decoder_layer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "common/check.h"
#include "common/multiply.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kNumbersWorthAThread = 1 << 14;

// Memory of a call in parts, each on a cache line of its own.
class Parts {
 public:
  int64_t add(int64_t bytes) { return std::exchange(bytes_, bytes_ + ceil_to(bytes, 64)); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

const void* numbers(const char* name, const Tensor& x, DType dtype, int64_t size) {
  STD_TORCH_CHECK(dtype_of(name, x) == dtype && x.is_contiguous() && x.numel() == size, name,
                  " must be a contiguous tensor of ", size, " numbers of hidden's dtype");
  return x.data_ptr();
}

const void* numbers_or_null(const char* name, const Optional& x, DType dtype, int64_t size) {
  return x.has_value() ? numbers(name, *x, dtype, size) : nullptr;
}

Lines weight(const char* name, const Tensor& x, DType dtype, int64_t out, int64_t in) {
  STD_TORCH_CHECK(dtype_of(name, x) == dtype && x.dim() == 2 && x.size(0) == out &&
                      x.size(1) == in && (x.stride(1) == 1 || in == 1),
                  name, " must be [", out, ", ", in, "] of hidden's dtype, with unit last stride");
  return {x.data_ptr(), dtype, out, in, out == 1 ? 1 : x.stride(0), 1};
}

// The product of `rows` rows of x with the lines of a weight, in fp32.
GemmArgs product(const void* x, int64_t rows, const Lines& w, void* out) {
  const Lines left{x, w.dtype, rows, w.depth, rows == 1 ? 1 : w.depth, 1};
  return {left, w, out, DType::kF32, w.lines, false, false};
}

void decoder_layer_out(Tensor hidden, Tensor input_norm, Tensor q, Tensor k, Tensor v, Tensor o,
                       Tensor post_norm, Tensor gate, Tensor up, Tensor down, Optional q_bias,
                       Optional k_bias, Optional v_bias, Optional o_bias, Optional q_norm,
                       Optional k_norm, Tensor cos, Tensor sin, Tensor keys, Tensor values,
                       Tensor starts, int64_t columns, double eps, double scale, int64_t window,
                       Tensor out) {
  STD_TORCH_CHECK(hidden.dim() == 3 && keys.dim() == 4 && values.dim() == 4 && cos.dim() == 3 &&
                      sin.dim() == 3 && gate.dim() == 2,
                  "hidden, keys, values, cos, sin or gate has a wrong number of dimensions");
  const DType dtype = dtype_of("hidden", hidden);
  const int64_t batch = hidden.size(0), tokens = hidden.size(1), width = hidden.size(2);
  const int64_t rows = batch * tokens, groups = keys.size(1), size = keys.size(3);
  const int64_t inner = gate.size(0), heads = q.size(0) / (size > 0 ? size : 1);
  STD_TORCH_CHECK(width > 0 && size > 0 && size % 2 == 0 && groups > 0 && heads > 0 &&
                      heads % groups == 0 && inner > 0,
                  "sizes of heads must be even and positive, and heads a multiple of groups");
  const void* x = numbers("hidden", hidden, dtype, rows * width);
  auto* result = const_cast<void*>(numbers("out", out, dtype, rows * width));
  const Lines q_weight = weight("q", q, dtype, heads * size, width);
  const Lines k_weight = weight("k", k, dtype, groups * size, width);
  const Lines v_weight = weight("v", v, dtype, groups * size, width);
  const Lines o_weight = weight("o", o, dtype, width, heads * size);
  const Lines gate_weight = weight("gate", gate, dtype, inner, width);
  const Lines up_weight = weight("up", up, dtype, inner, width);
  const Lines down_weight = weight("down", down, dtype, width, inner);

  HeadsArgs a{};
  a.batch = batch, a.tokens = tokens, a.heads = heads, a.groups = groups, a.size = size;
  a.columns = columns, a.window = window, a.dtype = dtype;
  a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
  a.q_bias = numbers_or_null("q_bias", q_bias, dtype, heads * size);
  a.k_bias = numbers_or_null("k_bias", k_bias, dtype, groups * size);
  a.v_bias = numbers_or_null("v_bias", v_bias, dtype, groups * size);
  a.q_norm = numbers_or_null("q_norm", q_norm, dtype, size);
  a.k_norm = numbers_or_null("k_norm", k_norm, dtype, size);
  for (const Tensor* y : {&cos, &sin}) {
    STD_TORCH_CHECK(dtype_of("cos", *y) == dtype && y->size(0) == batch && y->size(1) == tokens &&
                        y->size(2) == size && y->stride(2) == 1 && y->stride(0) == cos.stride(0) &&
                        y->stride(1) == cos.stride(1),
                    "cos and sin must be [B, T, D] of hidden's dtype and of the same strides");
  }
  a.cos = cos.data_ptr(), a.sin = sin.data_ptr();
  a.rotary_batch = cos.stride(0), a.rotary_token = cos.stride(1);
  for (const Tensor* y : {&keys, &values}) {
    STD_TORCH_CHECK(dtype_of("keys", *y) == dtype && y->size(0) == batch && y->size(1) == groups &&
                        y->size(2) >= columns + tokens && y->size(3) == size && y->stride(3) == 1 &&
                        columns >= 0,
                    "keys and values must be [B, G, C, D] of hidden's dtype, with unit last"
                    " stride and room for ",
                    columns + tokens, " columns");
  }
  a.keys = keys.data_ptr(), a.values = values.data_ptr();
  a.key_batch = keys.stride(0), a.key_head = keys.stride(1), a.key_column = keys.stride(2);
  a.value_batch = values.stride(0), a.value_head = values.stride(1);
  a.value_column = values.stride(2);
  a.starts = vector<int64_t>("starts", starts, batch);
  for (int64_t b = 0; b < batch; ++b) STD_TORCH_CHECK(a.starts[b] >= 0, "starts has a negative");
  const void* bias = numbers_or_null("o_bias", o_bias, dtype, width);
  const void* first_norm = numbers("input_norm", input_norm, dtype, width);
  const void* second_norm = numbers("post_norm", post_norm, dtype, width);
  if (rows == 0) return;

  const int64_t narrow = ElementSize(dtype), wide = 4;
  Parts parts;
  const int64_t at_normed = parts.add(rows * width * narrow);
  const int64_t at_q = parts.add(rows * heads * size * wide);
  const int64_t at_k = parts.add(rows * groups * size * wide);
  const int64_t at_v = parts.add(rows * groups * size * wide);
  const int64_t at_attended = parts.add(rows * heads * size * narrow);
  const int64_t at_middle = parts.add(rows * width * narrow);
  const int64_t at_sum = parts.add(rows * width * wide);
  const int64_t at_gate = parts.add(rows * inner * wide);
  const int64_t at_up = parts.add(rows * inner * wide);
  const int64_t at_gated = parts.add(rows * inner * narrow);
  const Scratch memory(parts.bytes());
  const auto part = [&](int64_t at) {
    return static_cast<void*>(reinterpret_cast<char*>(memory.data()) + at);
  };
  void *normed = part(at_normed), *middle = part(at_middle), *gated = part(at_gated);
  auto *sum = static_cast<float*>(part(at_sum)), *gates = static_cast<float*>(part(at_gate));
  auto* ups = static_cast<float*>(part(at_up));
  a.q = static_cast<float*>(part(at_q)), a.k = static_cast<float*>(part(at_k));
  auto* v_rows = static_cast<float*>(part(at_v));
  a.v = v_rows, a.out = part(at_attended);

  const auto capability = static_cast<int>(active_capability());
  const auto over_rows = [&](int64_t columns_of_row, const auto& body) {
    const int64_t grain = kNumbersWorthAThread / (columns_of_row + 1) + 1;
    torch::stable::parallel_for(0, rows, grain, body);
  };
  const auto norm = [&](const void* from, const void* by) {
    const NormArgs n{from, by, normed, dtype, width, a.eps};
    over_rows(width,
              [&](int64_t begin, int64_t end) { decoder_norm_table[capability](n, begin, end); });
  };
  const auto add = [&](const void* to, const void* bias_or_null, void* into) {
    const ResidualArgs r{to, bias_or_null, sum, into, dtype, width};
    over_rows(width, [&](int64_t begin, int64_t end) {
      decoder_residual_table[capability](r, begin, end);
    });
  };

  norm(x, first_norm);
  multiply(std::array{product(normed, rows, q_weight, a.q), product(normed, rows, k_weight, a.k),
                      product(normed, rows, v_weight, v_rows)});
  over_rows((heads + 2 * groups) * size,
            [&](int64_t begin, int64_t end) { decoder_place_table[capability](a, begin, end); });
  // The heads that share keys together, unless that leaves threads without work. What they compute
  // must not depend on how many threads there are.
  constexpr int64_t kUnits = 8;
  a.together = batch * groups >= kUnits ? heads / groups : 1;
  const int64_t of_a_unit = 2 * a.together * tokens * (columns + tokens) * size;
  torch::stable::parallel_for(0, batch * heads / a.together, kNumbersWorthAThread / of_a_unit + 1,
                              [&](int64_t begin, int64_t end) {
                                const Scratch scratch(4 * attend_scratch(a));
                                decoder_attend_table[capability](a, begin, end, scratch.data());
                              });
  multiply(product(a.out, rows, o_weight, sum));
  add(x, bias, middle);
  norm(middle, second_norm);
  multiply(
      std::array{product(normed, rows, gate_weight, gates), product(normed, rows, up_weight, ups)});
  const GateArgs g{gates, ups, gated, dtype};
  torch::stable::parallel_for(
      0, rows * inner, kNumbersWorthAThread,
      [&](int64_t begin, int64_t end) { decoder_gate_table[capability](g, begin, end); });
  multiply(product(gated, rows, down_weight, sum));
  add(middle, nullptr, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("decoder_layer_out", TORCH_BOX(&decoder_layer_out));
}

}  // namespace pd
