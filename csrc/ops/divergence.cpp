// divergence on the CPU: from torch tensors to the torch-free kernels. Schemas and checks with
// readable messages are in pydistill/ops/divergence.py; here only what memory safety needs.
#include "cpu/divergence.h"

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

struct Options {
  int64_t kind;
  double temperature, alpha, beta;
  bool scale_t2;
  double label_weight, z_loss;
  int64_t vocab;
};

DivergenceArgs make_args(const Tensor& student, const Tensor& teacher,
                         const MaybeTensor& student_rows, const MaybeTensor& teacher_rows,
                         const MaybeTensor& labels, const MaybeTensor& params, int64_t pairs,
                         const Options& o) {
  DivergenceArgs a{};
  a.student = logits("student", student);
  a.teacher = logits("teacher", teacher);
  a.pairs = pairs;
  a.student_rows = vector_or_null<int64_t>("student_rows", student_rows, pairs);
  a.teacher_rows = vector_or_null<int64_t>("teacher_rows", teacher_rows, pairs);
  a.labels = vector_or_null<int64_t>("labels", labels, pairs);
  a.params = vector_or_null<float>("params", params, 3 * pairs);
  STD_TORCH_CHECK(o.kind >= 0 && o.kind <= static_cast<int64_t>(Kind::kTodi), "kind is ", o.kind);
  a.kind = static_cast<Kind>(o.kind);
  a.temperature = static_cast<float>(o.temperature);
  a.alpha = static_cast<float>(o.alpha);
  a.beta = static_cast<float>(o.beta);
  a.scale_t2 = o.scale_t2;
  a.label_weight = static_cast<float>(o.label_weight);
  a.z_loss = static_cast<float>(o.z_loss);
  a.vocab = o.vocab;
  STD_TORCH_CHECK(o.vocab >= 1 && o.vocab <= a.student.width && o.vocab <= a.teacher.width,
                  "vocab is ", o.vocab);
  STD_TORCH_CHECK(student_rows.has_value() || pairs == a.student.rows, "student has other rows");
  STD_TORCH_CHECK(teacher_rows.has_value() || pairs == a.teacher.rows, "teacher has other rows");
  return a;
}

void run(const DivergenceRows* table, const DivergenceArgs& a, int64_t rows, int64_t scratch) {
  const DivergenceRows kernel = table[static_cast<int>(active_capability())];
  parallel_rows(rows, a.vocab, [&](int64_t begin, int64_t end) {
    const Scratch memory(scratch);
    kernel(a, begin, end, memory.data());
  });
}

void divergence_fwd(Tensor student, Tensor teacher, MaybeTensor student_rows,
                    MaybeTensor teacher_rows, MaybeTensor counted, MaybeTensor labels,
                    MaybeTensor params, int64_t kind, double temperature, double alpha, double beta,
                    bool scale_t2, double label_weight, double z_loss, int64_t vocab, Tensor loss,
                    Tensor saved, Tensor stats) {
  const int64_t pairs = loss.numel();
  DivergenceArgs a =
      make_args(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  a.counted = vector_or_null<bool, uint8_t>("counted", counted, pairs);
  a.loss = vector<float>("loss", loss, pairs);
  a.saved = vector<float>("saved", saved, pairs * kSaved);
  a.stats = stats.numel() ? vector<float>("stats", stats, pairs * kStats) : nullptr;
  run(divergence_forward_table, a, pairs, divergence_scratch_bytes(a, false));
}

void divergence_bwd(Tensor student, Tensor teacher, MaybeTensor student_rows,
                    MaybeTensor teacher_rows, MaybeTensor row_start, MaybeTensor pair_of,
                    MaybeTensor labels, MaybeTensor params, Tensor saved, Tensor grad_rows,
                    int64_t kind, double temperature, double alpha, double beta, bool scale_t2,
                    double label_weight, double z_loss, int64_t vocab, Tensor grad) {
  const int64_t pairs = grad_rows.numel();
  DivergenceArgs a =
      make_args(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  a.saved = vector<float>("saved", saved, pairs * kSaved);
  a.grad_rows = vector<float>("grad_rows", grad_rows, pairs);
  a.row_start = vector_or_null<int64_t>("row_start", row_start, a.student.rows + 1);
  a.pair_of = vector_or_null<int64_t>("pairs", pair_of, pairs);
  STD_TORCH_CHECK(student_rows.has_value() == row_start.has_value() &&
                      row_start.has_value() == pair_of.has_value(),
                  "student_rows, row_start and pairs come together");
  const Logits out = logits("grad", grad);
  STD_TORCH_CHECK(
      out.rows == a.student.rows && out.width == a.student.width && out.dtype == a.student.dtype,
      "grad has another shape or dtype than student");
  a.grad = const_cast<void*>(out.data);
  a.grad_stride = out.stride;
  ask_for_huge_pages(a.grad, grad.numel() * grad.element_size());
  run(divergence_backward_table, a, a.student.rows, 0);
}

void divergence_overwrite(Tensor student, Tensor teacher, MaybeTensor student_rows,
                          MaybeTensor teacher_rows, MaybeTensor counted, MaybeTensor labels,
                          MaybeTensor params, Tensor scale_rows, int64_t kind, double temperature,
                          double alpha, double beta, bool scale_t2, double label_weight,
                          double z_loss, int64_t vocab, Tensor loss) {
  const int64_t pairs = loss.numel();
  DivergenceArgs a =
      make_args(student, teacher, student_rows, teacher_rows, labels, params, pairs,
                {kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab});
  a.counted = vector_or_null<bool, uint8_t>("counted", counted, pairs);
  a.loss = vector<float>("loss", loss, pairs);
  a.grad_rows = vector<float>("scale_rows", scale_rows, pairs);
  run(divergence_overwrite_table, a, pairs, divergence_scratch_bytes(a, true));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
  m.impl("divergence_overwrite", TORCH_BOX(&divergence_overwrite));
}

}  // namespace pd
