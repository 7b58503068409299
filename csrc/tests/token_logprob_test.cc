// Every instruction set's token log-probability kernels on small, odd shapes: equal to fp64 sums
// written out here, tiles in place equal to whole rows, and, under the sanitizers, inside their
// memory.
#include "cpu/token_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t rows, vocab, stride;
};

class Problem {
 public:
  Problem(const Shape& shape, DType dtype, bool tempered)
      : shape_(shape),
        dtype_(dtype),
        tempered_(tempered),
        logits_(static_cast<size_t>(shape.rows * shape.stride) * size_of(dtype)),
        ids_(static_cast<size_t>(shape.rows)),
        temperatures_(static_cast<size_t>(shape.rows)),
        up_(static_cast<size_t>(shape.rows)),
        up_entropy_(static_cast<size_t>(shape.rows)) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab));
    for (int64_t i = 0; i < shape.rows * shape.stride; ++i) {
      const float x = static_cast<float>(int(random() % 127) - 63) / 8.0f;
      encode(x, dtype, At(logits_, i));
    }
    for (int64_t r = 0; r < shape.rows; ++r) {
      const auto i = static_cast<size_t>(r);
      ids_[i] = static_cast<int64_t>(random()) % shape.vocab;
      temperatures_[i] = tempered ? 0.5f + static_cast<float>(r) / 4 : 1.0f;
      up_[i] = r == 1 ? 0.0f : 0.75f;
      up_entropy_[i] = r == 2 ? 0.0f : -0.5f;
    }
    encode(24.0f, dtype, At(logits_, ids_[0]));  // a row that is all but certain
  }

  void Check(int capability) const {
    const auto rows = static_cast<size_t>(shape_.rows);
    const char* name = capability_name(static_cast<Capability>(capability));
    Exact<float> logprob(rows), entropy(rows), saved(rows * kTokenSaved);
    Bytes grad(logits_.size()), tiled(logits_);
    TokenArgs a{};
    a.logits = {logits_.data(), dtype_, shape_.rows, shape_.vocab, shape_.stride};
    a.ids = ids_.data(), a.temperature = 1.0;
    a.params = tempered_ ? temperatures_.data() : nullptr;
    a.logprob = logprob.data(), a.entropy = entropy.data(), a.saved = saved.data();
    a.grad_logprob = up_.data(), a.grad_entropy = up_entropy_.data();
    token_logprob_forward_table[capability](a, 0, shape_.rows);
    a.grad = grad.data(), a.grad_stride = shape_.stride;
    token_logprob_backward_table[capability](a, 0, shape_.rows);
    Tiles(capability, a, tiled);
    for (int64_t r = 0; r < shape_.rows; ++r) {
      const auto i = static_cast<size_t>(r);
      const double k = 1.0 / double(temperatures_[i]);
      double max = -INFINITY, rest = 0, depth = 0;
      int64_t top = 0;
      for (int64_t j = 0; j < shape_.vocab; ++j) {
        if (Logit(r, j) > max) max = Logit(r, j), top = j;
      }
      for (int64_t j = 0; j < shape_.vocab; ++j) {
        const double d = k * (Logit(r, j) - max);
        rest += j == top ? 0.0 : std::exp(d);
        depth -= d * std::exp(d);
      }
      depth /= 1 + rest;
      const double log_z = std::log1p(rest);
      const double want = k * (Logit(r, ids_[i]) - max) - log_z, h = log_z + depth;
      EXPECT(std::fabs(logprob[i] - want) <= 2e-6 * std::fabs(want), "%s logprob %g, not %g", name,
             double(logprob[i]), want);
      EXPECT(std::fabs(entropy[i] - h) <= 2e-6 * h, "%s entropy %g, not %g", name,
             double(entropy[i]), h);
      for (int64_t j = 0; j < shape_.vocab; ++j) {
        const double d = k * (Logit(r, j) - max), q = std::exp(d - log_z);
        const double hard = j == ids_[i] ? -std::expm1(want) : -q;
        const double slope = k * (up_[i] * hard - up_entropy_[i] * q * (d + depth));
        const float g = decode(At(grad, r * shape_.stride + j), dtype_);
        const double allowed = dtype_ == DType::kF32 ? 2e-6 : 5e-3;
        EXPECT(std::fabs(g - slope) <= allowed * (0.01 + std::fabs(slope)),
               "%s gradient %g, not %g at %d", name, double(g), slope, int(j));
        const float in_tile = decode(At(tiled, r * shape_.stride + j), dtype_);
        EXPECT(g == in_tile, "%s gradient %g, of a tile %g at %d", name, double(g), double(in_tile),
               int(j));
      }
    }
  }

 private:
  unsigned char* At(Bytes& bytes, int64_t i) const {
    return bytes.data() + static_cast<size_t>(i) * size_of(dtype_);
  }
  const unsigned char* At(const Bytes& bytes, int64_t i) const {
    return bytes.data() + static_cast<size_t>(i) * size_of(dtype_);
  }
  double Logit(int64_t r, int64_t j) const {
    return decode(At(logits_, r * shape_.stride + j), dtype_);
  }

  // Backward over tiles of columns, each a block of its own, written over the logits.
  void Tiles(int capability, TokenArgs a, Bytes& out) const {
    for (int64_t begin = 0; begin < shape_.vocab;) {
      const int64_t end = std::min(shape_.vocab, begin + 1 + begin * 2), width = end - begin;
      Bytes tile(static_cast<size_t>(shape_.rows * width) * size_of(dtype_));
      Exact<int64_t> ids(ids_);
      for (int64_t r = 0; r < shape_.rows; ++r) {
        std::memcpy(At(tile, r * width), At(logits_, r * shape_.stride + begin),
                    static_cast<size_t>(width) * size_of(dtype_));
        ids[static_cast<size_t>(r)] -= begin;
      }
      a.logits = {tile.data(), dtype_, shape_.rows, width, width};
      a.ids = ids.data(), a.grad = tile.data(), a.grad_stride = width;
      token_logprob_backward_table[capability](a, 0, shape_.rows);
      for (int64_t r = 0; r < shape_.rows; ++r) {
        std::memcpy(At(out, r * shape_.stride + begin), At(tile, r * width),
                    static_cast<size_t>(width) * size_of(dtype_));
      }
      begin = end;
    }
  }

  Shape shape_;
  DType dtype_;
  bool tempered_;
  Bytes logits_;
  Exact<int64_t> ids_;
  Exact<float> temperatures_, up_, up_entropy_;
};

int Main() {
  const Shape shapes[] = {
      {1, 1, 1},       {3, 2, 3},       {4, 17, 17},     {3, 67, 71},
      {3, 1024, 1024}, {3, 1025, 1031}, {4, 2113, 2113}, {2, 4096, 4097},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const bool tempered : {false, true}) {
        const Problem problem(shape, dtype, tempered);
        for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) problem.Check(i);
      }
    }
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
