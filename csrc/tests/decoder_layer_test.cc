// Every instruction set's parts of a decoder layer on small, odd shapes: what the scalar code
// makes, columns that nobody may read, and, under the sanitizers, nothing outside its memory.
#include "cpu/decoder_layer.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t batch, tokens, heads, groups, size, columns, window, width;
};

// Multiples of 1/8 in [-1, 1].
class Numbers {
 public:
  Numbers(int64_t count, DType dtype, unsigned seed)
      : dtype_(dtype), bytes_(static_cast<size_t>(count) * size_of(dtype)) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < count; ++i) set(i, static_cast<float>(int(random() % 17) - 8) / 8.0f);
  }
  void set(int64_t i, float x) {
    encode(x, dtype_, bytes_.data() + static_cast<size_t>(i) * size_of(dtype_));
  }
  void poison(int64_t i) {  // NaN in every dtype
    std::memset(bytes_.data() + static_cast<size_t>(i) * size_of(dtype_), 0xff, size_of(dtype_));
  }
  float operator[](int64_t i) const {
    return decode(bytes_.data() + static_cast<size_t>(i) * size_of(dtype_), dtype_);
  }
  void* data() { return bytes_.data(); }
  int64_t count() const { return static_cast<int64_t>(bytes_.size() / size_of(dtype_)); }

 private:
  DType dtype_;
  Bytes bytes_;
};

float error_of(DType dtype) {
  return dtype == DType::kF32 ? 4e-6f : dtype == DType::kBf16 ? 1.0f / 128.0f : 1.0f / 1024.0f;
}

void compare(const char* what, const Numbers& got, const Numbers& want, DType dtype,
             int capability) {
  for (int64_t i = 0; i < want.count(); ++i) {
    const float x = got[i], y = want[i];
    const bool near = std::fabs(x - y) <= error_of(dtype) * std::fmax(1.0f, std::fabs(y));
    EXPECT(near || (std::isnan(x) && std::isnan(y)), "%s of %s: %g, not %g at %d", what,
           capability_name(static_cast<Capability>(capability)), x, y, int(i));
  }
}

struct Result {
  Numbers keys, values, out;
};

Result run(const Shape& s, DType dtype, int capability, bool more, bool together) {
  const int64_t rows = s.batch * s.tokens, seen = s.columns + s.tokens;
  const int64_t cached = s.batch * s.groups * seen * s.size;
  Result r{Numbers(cached, dtype, 1), Numbers(cached, dtype, 2),
           Numbers(rows * s.heads * s.size, dtype, 3)};
  Exact<int64_t> starts(static_cast<size_t>(s.batch));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t start = b * 2 < seen ? b * 2 : seen;
    starts[static_cast<size_t>(b)] = start;
    for (int64_t g = 0; g < s.groups; ++g) {  // nobody reads what is before
      const int64_t first = (b * s.groups + g) * seen * s.size;
      for (int64_t i = 0; i < (start < s.columns ? start : s.columns) * s.size; ++i) {
        r.keys.poison(first + i), r.values.poison(first + i);
      }
    }
  }
  Numbers q(rows * s.heads * s.size, DType::kF32, 4), k(rows * s.groups * s.size, DType::kF32, 5);
  Numbers v(rows * s.groups * s.size, DType::kF32, 6);
  Numbers cos(rows * s.size, dtype, 7), sin(rows * s.size, dtype, 8);
  Numbers q_bias(s.heads * s.size, dtype, 9), k_bias(s.groups * s.size, dtype, 10);
  Numbers q_norm(s.size, dtype, 11), k_norm(s.size, dtype, 12);
  HeadsArgs a{};
  a.batch = s.batch, a.tokens = s.tokens, a.heads = s.heads, a.groups = s.groups, a.size = s.size;
  a.columns = s.columns, a.window = s.window, a.dtype = dtype, a.scale = 0.25f, a.eps = 1e-5f;
  a.q = static_cast<float*>(q.data()), a.k = static_cast<float*>(k.data());
  a.v = static_cast<float*>(v.data()), a.cos = cos.data(), a.sin = sin.data();
  if (more) {
    a.q_bias = q_bias.data(), a.k_bias = k_bias.data(), a.v_bias = k_bias.data();
    a.q_norm = q_norm.data(), a.k_norm = k_norm.data();
  }
  a.together = together ? s.heads / s.groups : 1;
  a.rotary_token = s.size, a.rotary_batch = s.tokens * s.size;
  a.keys = r.keys.data(), a.values = r.values.data(), a.out = r.out.data();
  a.key_column = a.value_column = s.size, a.key_head = a.value_head = seen * s.size;
  a.key_batch = a.value_batch = s.groups * seen * s.size;
  a.starts = starts.data();
  decoder_place_table[capability](a, 0, rows);
  Exact<float> scratch(static_cast<size_t>(attend_scratch(a)), nan);
  decoder_attend_table[capability](a, 0, s.batch * s.heads / a.together, scratch.data());
  return r;
}

void check(const Shape& s, DType dtype, int capability) {
  for (const bool more : {false, true}) {
    const Result want = run(s, dtype, 0, more, false), got = run(s, dtype, capability, more, more);
    compare("keys", got.keys, want.keys, dtype, capability);
    compare("values", got.values, want.values, dtype, capability);
    compare("heads", got.out, want.out, dtype, capability);
    for (int64_t i = 0; i < got.out.count(); ++i) EXPECT(!std::isnan(got.out[i]), "NaN was read");
  }
  const int64_t n = s.batch * s.tokens * s.width;
  Numbers x(n, dtype, 20), weight(s.width, dtype, 21), out(n, dtype, 22), want(n, dtype, 23);
  Numbers product(n, DType::kF32, 24), up(n, DType::kF32, 25);
  const auto* y = static_cast<const float*>(product.data());
  const auto* z = static_cast<const float*>(up.data());
  for (const bool scalar : {true, false}) {
    const int c = scalar ? 0 : capability;
    Numbers& to = scalar ? want : out;
    decoder_norm_table[c]({x.data(), weight.data(), to.data(), dtype, s.width, 1e-5f}, 0,
                          s.batch * s.tokens);
  }
  compare("norm", out, want, dtype, capability);
  for (const void* bias :
       {static_cast<const void*>(nullptr), static_cast<const void*>(weight.data())}) {
    for (const bool scalar : {true, false}) {
      const int c = scalar ? 0 : capability;
      Numbers& to = scalar ? want : out;
      decoder_residual_table[c]({x.data(), bias, y, to.data(), dtype, s.width}, 0,
                                s.batch * s.tokens);
    }
    compare("sum", out, want, dtype, capability);
  }
  for (const bool scalar : {true, false}) {
    const int c = scalar ? 0 : capability;
    decoder_gate_table[c]({y, z, (scalar ? want : out).data(), dtype}, 0, n);
  }
  compare("gate", out, want, dtype, capability);
}

int Main() {
  const Shape shapes[] = {{1, 1, 1, 1, 2, 0, 0, 1},    {2, 3, 4, 2, 6, 5, 0, 17},
                          {3, 1, 3, 1, 16, 33, 0, 64}, {1, 5, 2, 2, 64, 20, 7, 130},
                          {2, 2, 5, 1, 34, 9, 1, 33},  {4, 4, 2, 1, 80, 3, 0, 7}};
  for (int c = 0; c <= static_cast<int>(detected_capability()); ++c) {
    for (const Shape& s : shapes) {
      for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) check(s, dtype, c);
    }
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
