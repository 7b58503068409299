// What the C++ tests of kernels share: expectations that count, heap blocks of exactly their size
// (under the address sanitizer a read beside one is an error), and logits of any dtype.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cpu/rows.h"

namespace pd {

inline int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      ++failures;                                                          \
    }                                                                      \
  } while (false)

// A block of exactly `count` elements; a vector might own spare capacity.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count, T value = T()) : count_(count), data_(new T[count]) {
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  Exact(const Exact& other) : Exact(other.count_) {
    std::memcpy(data_.get(), other.data_.get(), count_ * sizeof(T));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  size_t count_;
  std::unique_ptr<T[]> data_;
};

using Bytes = Exact<unsigned char>;

inline size_t size_of(DType dtype) { return static_cast<size_t>(ElementSize(dtype)); }

// Logits are multiples of 1/8 in (-8, 8): exact in every dtype, and simple to encode.
inline void encode(float x, DType dtype, unsigned char* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::kF32) {
    std::memcpy(out, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kF16) {
    const auto sign = static_cast<uint16_t>(half & 0x8000);
    const uint32_t rest = bits & 0x7fffffffu;
    half = static_cast<uint16_t>(sign | (rest == 0             ? 0
                                         : rest == 0x7f800000u ? 0x7c00
                                                               : (rest - 0x38000000u) >> 13));
  }
  std::memcpy(out, &half, 2);
}

inline float decode(const unsigned char* in, DType dtype) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, in, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, in, 2);
  if (dtype == DType::kBf16) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const float magnitude =
      exponent == 0 ? std::ldexp(float(fraction), -24)
                    : (exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(float(fraction + 1024), exponent - 25));
  return half & 0x8000 ? -magnitude : magnitude;
}

}  // namespace pd
