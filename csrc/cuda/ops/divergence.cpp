// divergence on CUDA: from torch tensors to the torch-free launchers. Schemas and checks with
// readable messages are in pydistill/ops/divergence.py; here only what memory safety needs.
#include "cuda/divergence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "cuda/ops/launch.h"

namespace pydistill {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSaved = 8, kStats = 6, kKinds = 11;

struct Options {
  int64_t kind;
  double temperature, alpha, beta;
  bool scale_t2;
  double label_weight, z_loss;
  int64_t vocab;
};

DivergenceCall make_call(const Tensor& student, const Tensor& teacher,
                         const MaybeTensor& student_rows, const MaybeTensor& teacher_rows,
                         const MaybeTensor& labels, const MaybeTensor& params, int64_t pairs,
                         const Options& options) {
  STD_TORCH_CHECK(student.is_cuda() && teacher.is_cuda(), "the logits must be on a CUDA device");
  const pd::Logits s = pd::logits("student", student), t = pd::logits("teacher", teacher);
  DivergenceCall call{};
  call.student = s.data;
  call.student_dtype = static_cast<int32_t>(s.dtype);
  call.student_count = s.rows;
  call.student_stride = s.stride;
  call.columns = s.width;
  call.teacher = t.data;
  call.teacher_dtype = static_cast<int32_t>(t.dtype);
  call.teacher_count = t.rows;
  call.teacher_stride = t.stride;
  call.pairs = pairs;
  call.student_rows = pd::vector_or_null<int64_t>("student_rows", student_rows, pairs);
  call.teacher_rows = pd::vector_or_null<int64_t>("teacher_rows", teacher_rows, pairs);
  call.labels = pd::vector_or_null<int64_t>("labels", labels, pairs);
  call.params = pd::vector_or_null<float>("params", params, 3 * pairs);
  call.kind = static_cast<int32_t>(options.kind);
  call.temperature = static_cast<float>(options.temperature);
  call.alpha = static_cast<float>(options.alpha);
  call.beta = static_cast<float>(options.beta);
  call.scale_t2 = options.scale_t2;
  call.label_weight = static_cast<float>(options.label_weight);
  call.z_loss = static_cast<float>(options.z_loss);
  call.vocab = options.vocab;
  // Columns are 32-bit in the kernels, and a grid has fewer than 2^31 blocks.
  constexpr int64_t kMost = INT32_MAX - 4096;
  STD_TORCH_CHECK(options.kind >= 0 && options.kind < kKinds, "kind is ", options.kind);
  STD_TORCH_CHECK(options.vocab >= 1 && options.vocab <= s.width && options.vocab <= t.width &&
                      s.width <= kMost,
                  "vocab is ", options.vocab);
  STD_TORCH_CHECK(pairs <= kMost && s.rows <= kMost, "at most ", kMost, " rows");
  STD_TORCH_CHECK(call.student_rows || pairs == s.rows, "student has other rows");
  STD_TORCH_CHECK(call.teacher_rows || pairs == t.rows, "teacher has other rows");
  return call;
}

void divergence_fwd(Tensor student, Tensor teacher, MaybeTensor student_rows,
                    MaybeTensor teacher_rows, MaybeTensor counted, MaybeTensor labels,
                    MaybeTensor params, int64_t kind, double temperature, double alpha, double beta,
                    bool scale_t2, double label_weight, double z_loss, int64_t vocab, Tensor loss,
                    Tensor saved, Tensor stats) {
  const int64_t pairs = loss.numel();
  DivergenceCall call =
      make_call(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  call.counted = pd::vector_or_null<bool>("counted", counted, pairs);
  call.loss = pd::vector<float>("loss", loss, pairs);
  call.saved = pd::vector<float>("saved", saved, pairs * kSaved);
  call.stats = stats.numel() ? pd::vector<float>("stats", stats, pairs * kStats) : nullptr;
  launch_on(student.get_device_index(), "divergence_fwd",
            [&](void* stream) { return pyd_divergence_forward(&call, stream); });
}

void divergence_bwd(Tensor student, Tensor teacher, MaybeTensor student_rows,
                    MaybeTensor teacher_rows, MaybeTensor row_start, MaybeTensor group,
                    MaybeTensor labels, MaybeTensor params, Tensor saved, Tensor grad_rows,
                    int64_t kind, double temperature, double alpha, double beta, bool scale_t2,
                    double label_weight, double z_loss, int64_t vocab, Tensor grad) {
  const int64_t pairs = grad_rows.numel();
  DivergenceCall call =
      make_call(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  call.saved = pd::vector<float>("saved", saved, pairs * kSaved);
  call.grad_rows = pd::vector<float>("grad_rows", grad_rows, pairs);
  call.row_start = pd::vector_or_null<int64_t>("row_start", row_start, call.student_count + 1);
  call.group = pd::vector_or_null<int64_t>("pairs", group, pairs);
  STD_TORCH_CHECK(!call.student_rows == !call.row_start && !call.row_start == !call.group,
                  "student_rows, row_start and pairs come together");
  const pd::Logits out = pd::logits("grad", grad);
  STD_TORCH_CHECK(out.rows == call.student_count && out.width == call.columns &&
                      static_cast<int32_t>(out.dtype) == call.student_dtype,
                  "grad has another shape or dtype than student");
  call.grad = grad.data_ptr();
  call.grad_stride = out.stride;
  launch_on(student.get_device_index(), "divergence_bwd",
            [&](void* stream) { return pyd_divergence_backward(&call, stream); });
}

void divergence_overwrite(Tensor student, Tensor teacher, MaybeTensor student_rows,
                          MaybeTensor teacher_rows, MaybeTensor counted, MaybeTensor labels,
                          MaybeTensor params, Tensor scale_rows, int64_t kind, double temperature,
                          double alpha, double beta, bool scale_t2, double label_weight,
                          double z_loss, int64_t vocab, Tensor loss) {
  const int64_t pairs = loss.numel();
  DivergenceCall call =
      make_call(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  Tensor saved = torch::stable::new_empty(loss, {pairs, kSaved});
  call.counted = pd::vector_or_null<bool>("counted", counted, pairs);
  call.loss = pd::vector<float>("loss", loss, pairs);
  call.saved = pd::vector<float>("saved", saved, pairs * kSaved);
  call.grad_rows = pd::vector<float>("scale_rows", scale_rows, pairs);
  call.grad = student.data_ptr();
  call.grad_stride = call.student_stride;
  launch_on(student.get_device_index(), "divergence_overwrite", [&](void* stream) {
    const int error = pyd_divergence_forward(&call, stream);
    return error ? error : pyd_divergence_backward(&call, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill_cuda, CUDA, m) {
  m.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
  m.impl("divergence_overwrite", TORCH_BOX(&divergence_overwrite));
}

}  // namespace pydistill
