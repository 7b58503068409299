// Every instruction set's top-k log-probabilities on small, odd shapes: the ids of a sort, values
// near those of fp64, and, under the sanitizers, nothing outside its memory.
#include "cpu/topk_logprobs.h"

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

class Problem {
 public:
  // `levels`: how many different logits there are. `finite`: how many are not -inf.
  Problem(const Shape& shape, DType dtype, int levels, int64_t finite)
      : shape_(shape),
        dtype_(dtype),
        logits_(static_cast<size_t>(shape.rows * shape.width) * size_of(dtype)) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab + shape.k));
    for (int64_t i = 0; i < shape.rows * shape.width; ++i) {
      const float x = static_cast<float>(int(random() % unsigned(levels)) - levels / 2) / 8.0f;
      const bool kept = i % shape.width < finite;
      encode(kept ? x : -INFINITY, dtype, logits_.data() + static_cast<size_t>(i) * size_of(dtype));
    }
  }

  void Check(int capability, const char* name) const {
    const auto rows = static_cast<size_t>(shape_.rows),
               slots = rows * static_cast<size_t>(shape_.k);
    Exact<int64_t> ids(slots, -7);
    Exact<float> logprobs(slots, 7.0f), tail(rows, 7.0f), lse(rows, 7.0f);
    TopkLogprobsArgs a{{logits_.data(), dtype_, shape_.rows, shape_.vocab, shape_.width},
                       shape_.k,
                       kTemperature,
                       ids.data(),
                       logprobs.data(),
                       tail.data(),
                       lse.data()};
    Exact<float> scratch(static_cast<size_t>(topk_logprobs_scratch_bytes(a)) / sizeof(float));
    topk_logprobs_forward_table[capability](a, 0, shape_.rows, scratch.data());
    for (int64_t r = 0; r < shape_.rows; ++r) {
      const auto at = static_cast<size_t>(r);
      CheckRow(r, ids.data() + r * shape_.k, logprobs.data() + r * shape_.k, tail[at], lse[at],
               name);
    }
  }

 private:
  static constexpr double kTemperature = 1.5;

  double Logit(int64_t r, int64_t i) const {
    const auto at = static_cast<size_t>(r * shape_.width + i) * size_of(dtype_);
    return decode(logits_.data() + at, dtype_);
  }

  void CheckRow(int64_t r, const int64_t* ids, const float* logprobs, float tail, float lse,
                const char* name) const {
    Exact<int64_t> order(static_cast<size_t>(shape_.vocab));
    std::iota(order.data(), order.data() + shape_.vocab, 0);
    std::stable_sort(order.data(), order.data() + shape_.vocab,
                     [&](int64_t i, int64_t j) { return Logit(r, i) > Logit(r, j); });
    const auto z = [&](int64_t j) {
      return Logit(r, order[static_cast<size_t>(j)]) / kTemperature;
    };
    double all = 0, rest = 0;
    for (int64_t j = 0; j < shape_.vocab; ++j) all += std::exp(z(j));
    for (int64_t j = shape_.k; j < shape_.vocab; ++j) rest += std::exp(z(j));
    for (int64_t j = 0; j < shape_.k; ++j) {
      const bool empty = z(j) == -INFINITY;
      const int64_t want = empty ? -1 : order[static_cast<size_t>(j)];
      EXPECT(ids[j] == want, "%s id %d, sorted %d", name, int(ids[j]), int(want));
      Near(logprobs[j], z(j) - std::log(all), name, "log-probability");
    }
    Near(lse, std::log(all), name, "normaliser");
    Near(tail, std::log(rest) - std::log(all), name, "tail");
  }

  static void Near(double got, double want, const char* name, const char* what) {
    EXPECT(got == want || std::fabs(got - want) <= 1e-5 * (1 + std::fabs(want)),
           "%s %s %.9g, in fp64 %.9g", name, what, got, want);
  }

  Shape shape_;
  DType dtype_;
  Bytes logits_;
};

int Main() {
  const Shape shapes[] = {
      {1, 1, 1, 1},          {3, 2, 3, 2},        {4, 17, 17, 5},       {3, 67, 71, 67},
      {2, 1024, 1024, 16},   {3, 1025, 1031, 64}, {2, 2113, 2113, 600}, {2, 3079, 3081, 3079},
      {2, 5000, 5003, 1000}, {2, 4096, 4096, 1},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const int levels : {127, 3, 1}) {
        for (const int64_t finite : {shape.vocab, (shape.k + 1) / 2}) {
          const Problem problem(shape, dtype, levels, finite);
          for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) {
            problem.Check(i, capability_name(static_cast<Capability>(i)));
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
