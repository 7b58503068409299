// Every instruction set's causal convolution on small, odd shapes: equal to fp64 sums written out
// here, and, under the sanitizers, inside their memory.
#include "cpu/causal_conv1d.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t tokens, channels, stride, width;
  std::vector<int64_t> ends;
};

class Problem {
 public:
  Problem(const Shape& shape, DType dtype, bool silu, bool full)
      : shape_(shape),
        dtype_(dtype),
        silu_(silu),
        full_(full),
        x_(Made(shape.tokens * shape.stride, dtype)),
        weight_(Made(shape.channels * shape.width, dtype)),
        bias_(Made(shape.channels, DType::kF32)),
        state_(Made(Sequences() * (shape.width - 1) * shape.channels, dtype)),
        up_(Made(shape.tokens * shape.channels, dtype)),
        starts_(static_cast<size_t>(Sequences() + 1)) {
    for (size_t i = 0; i < shape.ends.size(); ++i) starts_[i + 1] = shape.ends[i];
  }

  void Check(int capability) const {
    const int64_t m = shape_.tokens, d = shape_.channels, w = shape_.width;
    Bytes out(static_cast<size_t>(m * d) * size_of(dtype_)), grad(out), grad_state(state_);
    for (size_t i = 0; i < grad_state.size(); ++i) grad_state[i] = 0;
    Exact<float> parts(static_cast<size_t>((m + kConvTokens - 1) / kConvTokens * (w + 1) * d));
    ConvArgs a{};
    a.x = {x_.data(), dtype_, m, d, shape_.stride};
    a.width = w, a.weight = {weight_.data(), dtype_}, a.silu = silu_;
    a.starts = starts_.data(), a.sequences = Sequences();
    if (full_) a.bias = {bias_.data(), DType::kF32}, a.state = state_.data();
    a.out = out.data();
    causal_conv1d_forward_table[capability](a, 0, conv_units(a));
    a.grad_out = {up_.data(), dtype_, m, d, d};
    a.grad_x = grad.data();
    if (full_) a.grad_state = grad_state.data(), a.parts = parts.data();
    causal_conv1d_backward_table[capability](a, 0, conv_units(a));

    std::vector<double> slope(static_cast<size_t>(m * d)), sums(static_cast<size_t>((w + 1) * d));
    for (int64_t n = 0; n < Sequences(); ++n) {
      const int64_t first = starts_[Index(n)], last = starts_[Index(n + 1)];
      for (int64_t c = 0; c < d; ++c) {
        for (int64_t t = first; t < last; ++t) {
          double pre = full_ ? At(bias_, c, DType::kF32) : 0;
          for (int64_t j = 0; j < w; ++j) pre += Tap(c, j) * Token(n, t - w + 1 + j, c);
          const double gate = 1 / (1 + std::exp(-pre)), up = At(up_, t * d + c, dtype_);
          Near(At(out, t * d + c, dtype_), silu_ ? pre * gate : pre, capability, "out");
          const double s = silu_ ? up * gate * (1 + pre * (1 - gate)) : up;
          slope[Index(t * d + c)] = s;
          for (int64_t j = 0; j < w; ++j) sums[Index(j * d + c)] += s * Token(n, t - w + 1 + j, c);
          sums[Index(w * d + c)] += s;
        }
        for (int64_t t = first - w + 1; t < last; ++t) {
          double want = 0;
          for (int64_t j = 0; j < w; ++j) {
            const int64_t at = t + w - 1 - j;
            if (at >= first && at < last) want += Tap(c, j) * slope[Index(at * d + c)];
          }
          if (t >= first) {
            Near(At(grad, t * d + c, dtype_), want, capability, "gradient");
          } else if (full_) {
            const int64_t row = n * (w - 1) + t - first + w - 1;
            Near(At(grad_state, row * d + c, dtype_), want, capability, "state's gradient");
          }
        }
      }
    }
    for (size_t i = 0; full_ && i < sums.size(); ++i) {
      double total = 0;
      for (size_t k = i; k < parts.size(); k += sums.size()) total += parts[k];
      EXPECT(std::fabs(total - sums[i]) <= 1e-4 * (1 + std::fabs(sums[i])), "%s sums %g, not %g",
             capability_name(static_cast<Capability>(capability)), total, sums[i]);
    }
  }

 private:
  int64_t Sequences() const { return static_cast<int64_t>(shape_.ends.size()); }
  static size_t Index(int64_t i) { return static_cast<size_t>(i); }

  // Multiples of 1/8 in [-1, 1].
  static Bytes Made(int64_t count, DType dtype) {
    static std::mt19937 random(1);
    Bytes out(Index(count) * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
      encode(static_cast<float>(int(random() % 17) - 8) / 8, dtype,
             out.data() + Index(i) * size_of(dtype));
    }
    return out;
  }
  static double At(const Bytes& bytes, int64_t i, DType dtype) {
    return decode(bytes.data() + Index(i) * size_of(dtype), dtype);
  }
  double Tap(int64_t c, int64_t j) const { return At(weight_, c * shape_.width + j, dtype_); }
  double Token(int64_t n, int64_t t, int64_t c) const {
    const int64_t first = starts_[Index(n)], w = shape_.width;
    if (t >= first) return At(x_, t * shape_.stride + c, dtype_);
    if (!full_) return 0;
    return At(state_, (n * (w - 1) + t - first + w - 1) * shape_.channels + c, dtype_);
  }
  void Near(double got, double want, int capability, const char* what) const {
    const double allowed = dtype_ == DType::kF32 ? 2e-6 : dtype_ == DType::kF16 ? 2e-3 : 1.6e-2;
    EXPECT(std::fabs(got - want) <= allowed * (1 + std::fabs(want)), "%s %s %g, not %g",
           capability_name(static_cast<Capability>(capability)), what, got, want);
  }

  Shape shape_;
  DType dtype_;
  bool silu_, full_;
  Bytes x_, weight_, bias_, state_, up_;
  Exact<int64_t> starts_;
};

int Main() {
  const Shape shapes[] = {
      {1, 1, 1, 1, {1}},
      {5, 3, 4, 4, {5}},
      {3, 17, 17, 7, {3}},
      {9, 37, 41, 4, {4, 4, 9}},
      {300, 16, 16, 3, {1, 256, 300}},
      {4, 530, 530, 2, {2, 4}},
      {0, 5, 5, 4, {0, 0}},
  };
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const bool silu : {false, true}) {
        const Problem problem(shape, dtype, silu, silu || dtype == DType::kF32);
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
