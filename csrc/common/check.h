// From torch tensors to pointers, with the checks that memory safety needs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/rows.h"

namespace pd {

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
  if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
}

// The data of a contiguous tensor of `size` elements of type T, as Pointed.
template <class T, class Pointed = T>
Pointed* vector(const char* name, const torch::stable::Tensor& x, int64_t size) {
  STD_TORCH_CHECK(x.scalar_type() == scalar_type_of<T>() && x.is_contiguous() && x.numel() == size,
                  name, " must be a contiguous tensor of ", size,
                  " elements of its documented type");
  return reinterpret_cast<Pointed*>(x.data_ptr());
}

template <class T, class Pointed = T>
const Pointed* vector_or_null(const char* name, const std::optional<torch::stable::Tensor>& x,
                              int64_t size) {
  return x.has_value() ? vector<T, Pointed>(name, *x, size) : nullptr;
}

inline DType dtype_of(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, " must be fp32, bf16 or fp16");
      return DType::kF32;
  }
}

// A [rows, width] matrix of fp32, bf16 or fp16 with unit last stride.
inline Logits logits(const char* name, const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), name,
                  " must be a matrix with unit last stride");
  return {x.data_ptr(), dtype_of(name, x), x.size(0), x.size(1), x.stride(0)};
}

}  // namespace pd
