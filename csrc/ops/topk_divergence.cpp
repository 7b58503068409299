// topk_divergence on the CPU: from torch tensors to the torch-free kernels. Schemas and checks with
// readable messages are in pydistill/ops/topk_divergence.py; here only what memory safety needs.
#include "cpu/topk_divergence.h"

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

TopkArgs make_args(const Tensor& student, const Tensor& ids, const Tensor& log_p,
                   const MaybeTensor& log_tail, const MaybeTensor& params, int64_t kind,
                   int64_t mode, double temperature, double beta, bool scale_t2) {
  TopkArgs a{};
  a.student = logits("student", student);
  a.rows = a.student.rows;
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == a.rows, "ids must be [rows, K]");
  a.k = ids.size(1);
  a.ids = vector<int64_t>("ids", ids, a.rows * a.k);
  a.log_p = vector<float>("log_p", log_p, a.rows * a.k);
  a.log_tail = vector_or_null<float>("log_tail", log_tail, a.rows);
  a.params = vector_or_null<float>("params", params, 2 * a.rows);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kTvd), "kind is ", kind);
  STD_TORCH_CHECK(mode >= 0 && mode <= static_cast<int64_t>(TailMode::kTruncated), "mode is ",
                  mode);
  a.kind = static_cast<Kind>(kind);
  a.mode = static_cast<TailMode>(mode);
  a.temperature = static_cast<float>(temperature);
  a.beta = static_cast<float>(beta);
  a.scale_t2 = scale_t2;
  return a;
}

void run(const TopkRows* table, const TopkArgs& a) {
  const TopkRows kernel = table[static_cast<int>(active_capability())];
  parallel_rows(a.rows, a.student.width, [&](int64_t begin, int64_t end) {
    const Scratch memory(topk_divergence_scratch_bytes(a));
    kernel(a, begin, end, memory.data());
  });
}

void topk_divergence_fwd(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                         MaybeTensor counted, MaybeTensor params, int64_t kind, int64_t mode,
                         double temperature, double beta, bool scale_t2, Tensor loss,
                         Tensor saved) {
  TopkArgs a =
      make_args(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  a.counted = vector_or_null<bool, uint8_t>("counted", counted, a.rows);
  a.loss = vector<float>("loss", loss, a.rows);
  a.saved = vector<float>("saved", saved, a.rows * kTopkSaved);
  run(topk_divergence_forward_table, a);
}

void topk_divergence_bwd(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                         MaybeTensor params, Tensor saved, Tensor grad_rows, int64_t kind,
                         int64_t mode, double temperature, double beta, bool scale_t2,
                         Tensor grad) {
  TopkArgs a =
      make_args(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  a.saved = vector<float>("saved", saved, a.rows * kTopkSaved);
  a.grad_rows = vector<float>("grad_rows", grad_rows, a.rows);
  const Logits out = logits("grad", grad);
  STD_TORCH_CHECK(
      out.rows == a.rows && out.width == a.student.width && out.dtype == a.student.dtype,
      "grad has another shape or dtype than student");
  a.grad = const_cast<void*>(out.data);
  a.grad_stride = out.stride;
  ask_for_huge_pages(a.grad, grad.numel() * grad.element_size());
  run(topk_divergence_backward_table, a);
}

void topk_divergence_overwrite(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                               MaybeTensor counted, MaybeTensor params, Tensor scale_rows,
                               int64_t kind, int64_t mode, double temperature, double beta,
                               bool scale_t2, Tensor loss, Tensor saved) {
  TopkArgs a =
      make_args(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  a.counted = vector_or_null<bool, uint8_t>("counted", counted, a.rows);
  a.loss = vector<float>("loss", loss, a.rows);
  a.saved = vector<float>("saved", saved, a.rows * kTopkSaved);
  a.grad_rows = vector<float>("scale_rows", scale_rows, a.rows);
  run(topk_divergence_overwrite_table, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("topk_divergence_fwd", TORCH_BOX(&topk_divergence_fwd));
  m.impl("topk_divergence_bwd", TORCH_BOX(&topk_divergence_bwd));
  m.impl("topk_divergence_overwrite", TORCH_BOX(&topk_divergence_overwrite));
}

}  // namespace pd
