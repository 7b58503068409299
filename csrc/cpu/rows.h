// Rows of logits as kernels see them: pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace pd {

enum class DType : int { kF32 = 0, kBf16 = 1, kF16 = 2 };

// Bytes of an element.
inline constexpr int64_t ElementSize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// `rows` rows of `width` columns with unit stride, `stride` elements apart.
struct Logits {
  const void* data;
  DType dtype;
  int64_t rows, width, stride;
};

}  // namespace pd
