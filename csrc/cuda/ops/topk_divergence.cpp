// topk_divergence on CUDA: from torch tensors to the torch-free launchers. Schemas and checks with
// readable messages are in pydistill/ops/topk_divergence.py; here only what memory safety needs.
#include "cuda/topk_divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "cuda/ops/launch.h"

namespace pydistill {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSaved = 7, kKinds = 4, kModes = 3;

TopkDivergenceCall make_call(const Tensor& student, const Tensor& ids, const Tensor& log_p,
                             const MaybeTensor& log_tail, const MaybeTensor& params, int64_t kind,
                             int64_t mode, double temperature, double beta, bool scale_t2) {
  STD_TORCH_CHECK(student.is_cuda(), "the logits must be on a CUDA device");
  const pd::Logits s = pd::logits("student", student);
  TopkDivergenceCall call{};
  call.student = s.data;
  call.student_dtype = static_cast<int32_t>(s.dtype);
  call.rows = s.rows;
  call.vocab = s.width;
  call.student_stride = s.stride;
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == s.rows, "ids must be [rows, K]");
  call.slots = ids.size(1);
  call.ids = pd::vector<int64_t>("ids", ids, s.rows * call.slots);
  call.log_p = pd::vector<float>("log_p", log_p, s.rows * call.slots);
  call.log_tail = pd::vector_or_null<float>("log_tail", log_tail, s.rows);
  call.params = pd::vector_or_null<float>("params", params, 2 * s.rows);
  call.kind = static_cast<int32_t>(kind);
  call.mode = static_cast<int32_t>(mode);
  call.temperature = static_cast<float>(temperature);
  call.beta = static_cast<float>(beta);
  call.scale_t2 = scale_t2;
  // Columns are 32-bit in the kernels, and a grid has fewer than 2^31 blocks.
  constexpr int64_t kMost = INT32_MAX - (1 << 20);
  STD_TORCH_CHECK(kind >= 0 && kind < kKinds, "kind is ", kind);
  STD_TORCH_CHECK(mode >= 0 && mode < kModes, "mode is ", mode);
  STD_TORCH_CHECK(s.width <= kMost && s.rows <= kMost, "at most ", kMost, " rows and columns");
  return call;
}

void topk_divergence_fwd(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                         MaybeTensor counted, MaybeTensor params, int64_t kind, int64_t mode,
                         double temperature, double beta, bool scale_t2, Tensor loss,
                         Tensor saved) {
  TopkDivergenceCall call =
      make_call(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  call.counted = pd::vector_or_null<bool>("counted", counted, call.rows);
  call.loss = pd::vector<float>("loss", loss, call.rows);
  call.saved = pd::vector<float>("saved", saved, call.rows * kSaved);
  launch_on(student.get_device_index(), "topk_divergence_fwd",
            [&](void* stream) { return pyd_topk_divergence_forward(&call, stream); });
}

void topk_divergence_bwd(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                         MaybeTensor params, Tensor saved, Tensor grad_rows, int64_t kind,
                         int64_t mode, double temperature, double beta, bool scale_t2,
                         Tensor grad) {
  TopkDivergenceCall call =
      make_call(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  call.saved = pd::vector<float>("saved", saved, call.rows * kSaved);
  call.grad_rows = pd::vector<float>("grad_rows", grad_rows, call.rows);
  const pd::Logits out = pd::logits("grad", grad);
  STD_TORCH_CHECK(out.rows == call.rows && out.width == call.vocab &&
                      static_cast<int32_t>(out.dtype) == call.student_dtype,
                  "grad has another shape or dtype than student");
  call.grad = grad.data_ptr();
  call.grad_stride = out.stride;
  launch_on(student.get_device_index(), "topk_divergence_bwd",
            [&](void* stream) { return pyd_topk_divergence_backward(&call, stream); });
}

void topk_divergence_overwrite(Tensor student, Tensor ids, Tensor log_p, MaybeTensor log_tail,
                               MaybeTensor counted, MaybeTensor params, Tensor scale_rows,
                               int64_t kind, int64_t mode, double temperature, double beta,
                               bool scale_t2, Tensor loss, Tensor saved) {
  TopkDivergenceCall call =
      make_call(student, ids, log_p, log_tail, params, kind, mode, temperature, beta, scale_t2);
  call.counted = pd::vector_or_null<bool>("counted", counted, call.rows);
  call.loss = pd::vector<float>("loss", loss, call.rows);
  call.saved = pd::vector<float>("saved", saved, call.rows * kSaved);
  call.grad_rows = pd::vector<float>("scale_rows", scale_rows, call.rows);
  call.grad = student.data_ptr();
  call.grad_stride = call.student_stride;
  launch_on(student.get_device_index(), "topk_divergence_overwrite", [&](void* stream) {
    const int error = pyd_topk_divergence_forward(&call, stream);
    return error ? error : pyd_topk_divergence_backward(&call, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill_cuda, CUDA, m) {
  m.impl("topk_divergence_fwd", TORCH_BOX(&topk_divergence_fwd));
  m.impl("topk_divergence_bwd", TORCH_BOX(&topk_divergence_bwd));
  m.impl("topk_divergence_overwrite", TORCH_BOX(&topk_divergence_overwrite));
}

}  // namespace pydistill
