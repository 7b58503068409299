// Every instruction set's divergence kernels on small, odd shapes: equal to the scalar ones within
// rounding, and, under the sanitizers, inside their memory: every array is a heap block of exactly
// its size. Prints each failure; fails if there was one.
#include "cpu/divergence.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

enum class Pairs { kInOrder, kReversed, kShared };  // kShared: two pairs to a student row

struct Shape {
  int64_t rows, vocab, width;
  bool masked;  // some logits are -inf, in both rows
  Pairs pairs;
  bool plain;  // no labels, z-loss, per-row parameters or statistics: the shortest ways through
};

struct Results {
  Exact<float> loss, saved, stats, loss_overwrite;
  Bytes grad, student;  // student: after overwrite
};

class Problem {
 public:
  Problem(const Shape& shape, DType dtype, Kind kind)
      : shape_(shape),
        dtype_(dtype),
        kind_(kind),
        student_(bytes()),
        teacher_(bytes()),
        student_rows_(shape.rows),
        teacher_rows_(shape.rows),
        pair_of_(shape.rows),
        starts_(shape.rows + 1),
        labels_(shape.rows),
        params_(3 * shape.rows),
        grad_rows_(shape.rows) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab));
    for (int64_t i = 0; i < shape.rows * shape.width; ++i) {
      const bool masked = shape.masked && i % shape.width % 5 == 3;
      for (Bytes* bytes : {&student_, &teacher_}) {
        const float x = masked ? -INFINITY : static_cast<float>(int(random() % 127) - 63) / 8.0f;
        encode(x, dtype, bytes->data() + i * size_of(dtype));
      }
    }
    for (int64_t i = 0; i < shape.rows; ++i) {
      const int64_t reversed = shape.rows - 1 - i;
      const bool shared = shape.pairs == Pairs::kShared;
      student_rows_[i] = shared ? i / 2 : reversed;
      teacher_rows_[i] = reversed;
      pair_of_[i] = shared ? i : reversed;
      starts_[i] = shared && 2 * i > shape.rows ? shape.rows : (shared ? 2 * i : i);
      labels_[i] = shape.vocab - 1 - i % shape.vocab;
      if (shape.masked) labels_[i] = 0;
      params_[3 * i] = 1.0f + 0.5f * static_cast<float>(i % 3);
      params_[3 * i + 1] = 0.3f;
      params_[3 * i + 2] = 0.6f;
      grad_rows_[i] = i % 4 == 2 ? 0.0f : 0.5f;
    }
    starts_[shape.rows] = shape.rows;
  }

  Results Run(int capability) const {
    const size_t rows = shape_.rows;
    Results out{Exact<float>(rows, NAN),
                Exact<float>(rows * kSaved, NAN),
                Exact<float>(rows * kStats, NAN),
                Exact<float>(rows, NAN),
                Bytes(bytes(), 0xff),
                student_};
    DivergenceArgs a{};
    a.student = {student_.data(), dtype_, shape_.rows, shape_.width, shape_.width};
    a.teacher = {teacher_.data(), dtype_, shape_.rows, shape_.width, shape_.width};
    a.pairs = shape_.rows;
    if (shape_.pairs != Pairs::kInOrder) {
      a.student_rows = student_rows_.data();
      a.teacher_rows = teacher_rows_.data();
      a.pair_of = pair_of_.data();
      a.row_start = starts_.data();
    }
    a.temperature = 1.0f;
    a.alpha = 0.3f;
    a.beta = 0.6f;
    a.kind = kind_;
    a.vocab = shape_.vocab;
    a.loss = out.loss.data();
    a.saved = out.saved.data();
    if (!shape_.plain) {
      a.labels = labels_.data();
      a.params = params_.data();
      a.scale_t2 = true;
      a.label_weight = 0.25f;
      a.z_loss = 1e-3f;
      a.stats = out.stats.data();
    }
    a.grad_rows = grad_rows_.data();
    a.grad = out.grad.data();
    a.grad_stride = shape_.width;
    const size_t scratch_bytes = (divergence_scratch_bytes(a, true) + 63) / 64 * 64;
    const std::unique_ptr<void, decltype(&std::free)> memory(
        scratch_bytes ? std::aligned_alloc(64, scratch_bytes) : nullptr, &std::free);
    auto* scratch = static_cast<float*>(memory.get());
    divergence_forward_table[capability](a, 0, a.pairs, scratch);
    divergence_backward_table[capability](a, 0, a.student.rows, scratch);

    if (shape_.pairs == Pairs::kShared) return out;  // overwrite takes a row once
    a.student.data = out.student.data();
    a.loss = out.loss_overwrite.data();
    a.saved = nullptr;
    a.stats = nullptr;
    divergence_overwrite_table[capability](a, 0, a.pairs, scratch);
    return out;
  }

  void Compare(const Results& got, const Results& want, const char* name) const {
    const auto where = [&](const char* what, int64_t i, float a, float b) {
      EXPECT(Near(a, b), "%s of %s, kind %d, dtype %d, vocab %lld at %lld: %.9g and not %.9g", what,
             name, int(kind_), int(dtype_), (long long)shape_.vocab, (long long)i, a, b);
    };
    for (int64_t i = 0; i < shape_.rows; ++i) {
      where("loss", i, got.loss[i], want.loss[i]);
      if (overwritten()) where("overwrite's loss", i, got.loss_overwrite[i], want.loss[i]);
    }
    for (int64_t i = 0; i < (shape_.plain ? 0 : shape_.rows * kStats); ++i) {
      where("stats", i, got.stats[i], want.stats[i]);
    }
    for (int64_t i = 0; i < shape_.rows * shape_.width; ++i) {
      const float grad = decode(got.grad.data() + i * size_of(dtype_), dtype_);
      where("grad", i, grad, decode(want.grad.data() + i * size_of(dtype_), dtype_));
      const float over = decode(got.student.data() + i * size_of(dtype_), dtype_);
      if (overwritten()) where("overwrite's grad", i, over, grad);
      if (i % shape_.width >= shape_.vocab) {
        EXPECT(grad == 0.0f, "padding of %s holds %g", name, grad);
      }
    }
  }

  // The scalar results themselves: losses are positive, and gradients are 0 where nothing is asked
  // for.
  void Check(const Results& scalar) const {
    for (int64_t i = 0; i < shape_.rows; ++i) {
      EXPECT(std::isfinite(scalar.loss[i]) && scalar.loss[i] > 0, "loss %g of kind %d",
             scalar.loss[i], int(kind_));
      double largest = 0;
      for (int64_t j = 0; j < shape_.vocab; ++j) {
        const int64_t at = (i * shape_.width + j) * int64_t(size_of(dtype_));
        largest = std::fmax(largest, std::fabs(decode(scalar.grad.data() + at, dtype_)));
      }
      float upstream = 0;
      for (int64_t r = 0; r < shape_.rows; ++r) {
        if ((shape_.pairs == Pairs::kInOrder ? r : student_rows_[r]) == i)
          upstream += grad_rows_[r];
      }
      EXPECT(shape_.vocab == 1 || (largest > 0) == (upstream != 0), "gradient of row %lld",
             (long long)i);
    }
  }

 private:
  bool overwritten() const { return shape_.pairs != Pairs::kShared; }
  size_t bytes() const { return shape_.rows * shape_.width * size_of(dtype_); }

  bool Near(float a, float b) const {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    if (a == b) return true;
    const float relative = dtype_ == DType::kF32 ? 2e-5f : dtype_ == DType::kF16 ? 2e-3f : 1e-2f;
    return std::fabs(a - b) <= relative * std::fabs(b) + 2e-6f;
  }

  Shape shape_;
  DType dtype_;
  Kind kind_;
  Bytes student_, teacher_;
  Exact<int64_t> student_rows_, teacher_rows_, pair_of_, starts_, labels_;
  Exact<float> params_, grad_rows_;
};

int Main() {
  constexpr Pairs kInOrder = Pairs::kInOrder, kReversed = Pairs::kReversed,
                  kShared = Pairs::kShared;
  const Shape shapes[] = {
      {1, 1, 1, false, kInOrder, false},      {3, 2, 3, false, kReversed, false},
      {3, 17, 17, false, kInOrder, true},     {4, 64, 64, true, kReversed, false},
      {5, 67, 71, true, kShared, false},      {2, 255, 257, false, kReversed, true},
      {2, 1024, 1024, true, kInOrder, false}, {3, 1025, 1031, false, kReversed, false},
      {2, 2113, 2113, true, kInOrder, false}, {2, 2113, 2115, true, kReversed, true},
      {5, 3079, 3079, false, kShared, true},  {2, 3079, 3081, false, kInOrder, true},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (int kind = 0; kind <= static_cast<int>(Kind::kTodi); ++kind) {
        const Problem problem(shape, dtype, static_cast<Kind>(kind));
        const Results scalar = problem.Run(0);
        if (shape.vocab > 1) problem.Check(scalar);
        for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) {
          problem.Compare(problem.Run(i), scalar, capability_name(static_cast<Capability>(i)));
        }
      }
    }
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
