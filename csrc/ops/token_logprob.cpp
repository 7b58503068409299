// token_logprob on the CPU: from torch tensors to the torch-free kernels. Schemas and checks with
// readable messages are in pydistill/ops/token_logprob.py; here only what memory safety needs.
#include "cpu/token_logprob.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

TokenArgs make_args(const Tensor& x, const Tensor& ids, const MaybeTensor& params,
                    double temperature, const Tensor& saved) {
  TokenArgs a{};
  a.logits = logits("logits", x);
  a.ids = vector<int64_t>("ids", ids, a.logits.rows);
  a.params = vector_or_null<float>("params", params, a.logits.rows);
  a.temperature = temperature;
  a.saved = vector<float>("saved", saved, a.logits.rows * kTokenSaved);
  return a;
}

void run(const TokenRows* table, const TokenArgs& a) {
  const TokenRows kernel = table[static_cast<int>(active_capability())];
  parallel_rows(a.logits.rows, a.logits.width,
                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void token_logprob_fwd(Tensor x, Tensor ids, MaybeTensor counted, MaybeTensor params,
                       double temperature, Tensor logprob, Tensor entropy, Tensor saved) {
  TokenArgs a = make_args(x, ids, params, temperature, saved);
  a.counted = vector_or_null<bool, uint8_t>("counted", counted, a.logits.rows);
  a.logprob = vector<float>("logprob", logprob, a.logits.rows);
  a.entropy = vector<float>("entropy", entropy, a.logits.rows);
  run(token_logprob_forward_table, a);
}

void token_logprob_bwd(Tensor x, Tensor ids, MaybeTensor params, Tensor saved, Tensor grad_logprob,
                       Tensor grad_entropy, double temperature, Tensor grad) {
  TokenArgs a = make_args(x, ids, params, temperature, saved);
  a.grad_logprob = vector<float>("grad_logprob", grad_logprob, a.logits.rows);
  a.grad_entropy = vector<float>("grad_entropy", grad_entropy, a.logits.rows);
  const Logits out = logits("grad", grad);
  STD_TORCH_CHECK(
      out.rows == a.logits.rows && out.width == a.logits.width && out.dtype == a.logits.dtype,
      "grad has another shape or dtype than logits");
  a.grad = const_cast<void*>(out.data);
  a.grad_stride = out.stride;
  if (a.grad != a.logits.data && out.stride == out.width) {
    ask_for_huge_pages(a.grad, grad.numel() * grad.element_size());
  }
  run(token_logprob_backward_table, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&token_logprob_bwd));
}

}  // namespace pd
