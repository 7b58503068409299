// causal_conv1d on the CPU: from torch tensors to the torch-free kernels. Schemas and checks with
// readable messages are in pydistill/ops/causal_conv1d.py; here only what memory safety needs.
#include "cpu/causal_conv1d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A contiguous tensor of x's dtype and of `size` elements.
void* like(const char* name, const Tensor& t, const Logits& x, int64_t size) {
  STD_TORCH_CHECK(dtype_of(name, t) == x.dtype && t.is_contiguous() && t.numel() == size, name,
                  " must be a contiguous tensor of ", size, " elements of x's dtype");
  return t.data_ptr();
}

Numbers numbers(const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == size, name, " must be a contiguous tensor of ",
                  size, " elements");
  return {t.data_ptr(), dtype_of(name, t)};
}

ConvArgs make_args(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& state, const Tensor& starts, bool silu) {
  ConvArgs a{};
  a.x = logits("x", x);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == a.x.width && weight.size(1) >= 1,
                  "weight must be [D, W]");
  a.width = weight.size(1);
  a.weight = numbers("weight", weight, a.width * a.x.width);
  if (bias.has_value()) a.bias = numbers("bias", *bias, a.x.width);
  a.sequences = starts.numel() - 1;
  STD_TORCH_CHECK(a.sequences >= 0, "starts must have at least one number");
  a.starts = vector<int64_t>("starts", starts, a.sequences + 1);
  STD_TORCH_CHECK(a.starts[0] == 0 && a.starts[a.sequences] == a.x.rows &&
                      std::is_sorted(a.starts, a.starts + a.sequences + 1),
                  "starts must rise from 0 to ", a.x.rows);
  if (state.has_value() && state->numel() != 0) {
    a.state = like("state", *state, a.x, a.sequences * (a.width - 1) * a.x.width);
  }
  a.silu = silu;
  return a;
}

void run(const ConvUnits* table, const ConvArgs& a) {
  const ConvUnits kernel = table[static_cast<int>(active_capability())];
  const int64_t tokens = std::min(a.x.rows, kConvTokens);
  parallel_rows(conv_units(a), std::max<int64_t>(1, tokens * std::min(a.x.width, kConvChannels)),
                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void causal_conv1d_fwd(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, Tensor starts,
                       bool silu, Tensor out) {
  ConvArgs a = make_args(x, weight, bias, state, starts, silu);
  a.out = like("out", out, a.x, a.x.rows * a.x.width);
  ask_for_huge_pages(a.out, out.numel() * out.element_size());
  run(causal_conv1d_forward_table, a);
}

void causal_conv1d_bwd(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, Tensor starts,
                       bool silu, Tensor grad_out, Tensor grad_x, Tensor grad_state, Tensor parts) {
  ConvArgs a = make_args(x, weight, bias, state, starts, silu);
  a.grad_out = logits("grad_out", grad_out);
  STD_TORCH_CHECK(
      a.grad_out.rows == a.x.rows && a.grad_out.width == a.x.width && a.grad_out.dtype == a.x.dtype,
      "grad_out has another shape or dtype than x");
  a.grad_x = like("grad_x", grad_x, a.x, a.x.rows * a.x.width);
  if (grad_state.numel() != 0) {
    a.grad_state = like("grad_state", grad_state, a.x, a.sequences * (a.width - 1) * a.x.width);
  }
  if (parts.numel() != 0) {
    const int64_t chunks = (a.x.rows + kConvTokens - 1) / kConvTokens;
    a.parts = vector<float>("parts", parts, chunks * (a.width + 1) * a.x.width);
  }
  ask_for_huge_pages(a.grad_x, grad_x.numel() * grad_x.element_size());
  run(causal_conv1d_backward_table, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
}

}  // namespace pd
