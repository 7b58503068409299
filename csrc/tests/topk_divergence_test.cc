// Every instruction set's top-k kernels on small, odd shapes: equal to the scalar ones within
// rounding, overwriting like backward, and, under the sanitizers, inside their memory.
#include "cpu/topk_divergence.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t rows, vocab, width, k;
};

struct Results {
  Exact<float> loss, saved, loss_overwrite;
  Bytes grad, student;  // student: after overwrite
};

class Problem {
 public:
  Problem(const Shape& shape, DType dtype, Kind kind, TailMode mode)
      : shape_(shape),
        dtype_(dtype),
        kind_(kind),
        mode_(mode),
        student_(static_cast<size_t>(shape.rows * shape.width) * size_of(dtype)),
        ids_(static_cast<size_t>(shape.rows * shape.k)),
        log_p_(static_cast<size_t>(shape.rows * shape.k)),
        log_tail_(static_cast<size_t>(shape.rows), -3.0f),
        grad_rows_(static_cast<size_t>(shape.rows), 0.5f) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab + shape.k));
    for (int64_t i = 0; i < shape.rows * shape.width; ++i) {
      const float x = static_cast<float>(int(random() % 127) - 63) / 8.0f;
      encode(x, dtype, student_.data() + static_cast<size_t>(i) * size_of(dtype));
    }
    Exact<int64_t> order(static_cast<size_t>(shape.vocab));
    for (int64_t r = 0; r < shape.rows; ++r) {
      std::iota(order.data(), order.data() + shape.vocab, 0);
      std::shuffle(order.data(), order.data() + shape.vocab, random);
      for (int64_t j = 0; j < shape.k; ++j) {
        const auto at = static_cast<size_t>(r * shape.k + j);
        const bool empty = j % 7 == 3;
        ids_[at] = empty ? -1 : order[static_cast<size_t>(j)];
        log_p_[at] = empty ? -INFINITY : -1.0f - static_cast<float>(random() % 64) / 8.0f;
      }
    }
  }

  Results Run(int capability) const {
    const auto rows = static_cast<size_t>(shape_.rows);
    Results out{Exact<float>(rows), Exact<float>(rows * kTopkSaved), Exact<float>(rows),
                Bytes(student_.size()), Bytes(student_)};
    TopkArgs a{};
    a.student = {student_.data(), dtype_, shape_.rows, shape_.vocab, shape_.width};
    a.ids = ids_.data(), a.log_p = log_p_.data();
    a.log_tail = mode_ == TailMode::kWithTail ? log_tail_.data() : nullptr;
    a.rows = shape_.rows, a.k = shape_.k, a.kind = kind_, a.mode = mode_;
    a.temperature = 1.5f, a.beta = 0.3f, a.scale_t2 = true;
    a.loss = out.loss.data(), a.saved = out.saved.data(), a.grad_rows = grad_rows_.data();
    a.grad = out.grad.data(), a.grad_stride = shape_.width;
    Exact<float> scratch(static_cast<size_t>(topk_divergence_scratch_bytes(a)) / sizeof(float));
    topk_divergence_forward_table[capability](a, 0, a.rows, scratch.data());
    topk_divergence_backward_table[capability](a, 0, a.rows, scratch.data());
    TopkArgs over = a;
    Exact<float> saved(rows * kTopkSaved);
    over.student.data = out.student.data(), over.loss = out.loss_overwrite.data();
    over.saved = saved.data();
    topk_divergence_overwrite_table[capability](over, 0, a.rows, scratch.data());
    return out;
  }

  void Compare(const Results& got, const Results& want, const char* name) const {
    for (int64_t r = 0; r < shape_.rows; ++r) {
      const auto i = static_cast<size_t>(r);
      const float error = std::fabs(got.loss[i] - want.loss[i]);
      EXPECT(error <= 1e-5f * (1.0f + std::fabs(want.loss[i])), "%s loss %g, scalar %g", name,
             got.loss[i], want.loss[i]);
      EXPECT(got.loss[i] == got.loss_overwrite[i], "%s loss %g, overwriting %g", name, got.loss[i],
             got.loss_overwrite[i]);
      for (int64_t j = 0; j < shape_.vocab; ++j) {
        const size_t at = static_cast<size_t>(r * shape_.width + j) * size_of(dtype_);
        const float g = decode(got.grad.data() + at, dtype_);
        const float scalar = decode(want.grad.data() + at, dtype_);
        const float over = decode(got.student.data() + at, dtype_);
        const float allowed = dtype_ == DType::kF32 ? 1e-5f : 0.01f;
        EXPECT(std::fabs(g - scalar) <= allowed * (0.1f + std::fabs(scalar)),
               "%s gradient %g, scalar %g at %d", name, g, scalar, int(j));
        EXPECT(std::fabs(g - over) <= allowed * (0.1f + std::fabs(g)),
               "%s gradient %g, overwriting %g at %d", name, g, over, int(j));
      }
    }
  }

 private:
  Shape shape_;
  DType dtype_;
  Kind kind_;
  TailMode mode_;
  Bytes student_;
  Exact<int64_t> ids_;
  Exact<float> log_p_, log_tail_, grad_rows_;
};

int Main() {
  const Shape shapes[] = {
      {1, 1, 1, 1},        {3, 2, 3, 2},        {4, 17, 17, 5},      {3, 67, 71, 67},
      {2, 1024, 1024, 16}, {3, 1025, 1031, 64}, {2, 2113, 2113, 65}, {2, 3079, 3081, 3079},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (int kind = 0; kind <= static_cast<int>(Kind::kTvd); ++kind) {
        for (int mode = 0; mode <= static_cast<int>(TailMode::kTruncated); ++mode) {
          const Problem problem(shape, dtype, static_cast<Kind>(kind), static_cast<TailMode>(mode));
          const Results scalar = problem.Run(0);
          for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) {
            problem.Compare(problem.Run(i), scalar, capability_name(static_cast<Capability>(i)));
          }
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
