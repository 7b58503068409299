// A decoder layer between its products: norms, rotary positions, the cache, attention, the gate.
//
// All sums and functions are fp32; numbers are rounded where they are written. Attention takes one
// head at a time: the scores of all columns that a token sees, four columns at once, their softmax,
// and the weighted sum of the values. Columns it does not see are never read, so that what lies
// there (padding, what was rolled back) may be anything.
#include "cpu/decoder_layer.h"
#include "cpu/gemm_pack-inl.h"
#include "cpu/math-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// Calls f with how numbers of `dtype` are read.
template <class F>
PD_INLINE void WithNumbers(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(F32{});
    case DType::kBf16:
      return f(Bf16{});
    case DType::kF16:
      return f(F16{});
  }
}

template <class Type>
using Pointer = const typename Type::T*;

// The numbers [i, i + kLanes) of n, 0 behind the last.
template <class Type>
PD_INLINE V Get(Pointer<Type> x, int64_t i, int64_t n) {
  if (i + kLanes <= n) return Type::Along(x + i);
  typename Type::T last[kLanes] = {};
  std::memcpy(last, x + i, static_cast<size_t>(n - i) * sizeof(*last));
  return Type::Along(last);
}

template <class Type>
PD_INLINE void PutAll(V a, typename Type::T* x) {
  if constexpr (std::is_same_v<Type, F32>) {
    Store(a, x);
  } else if constexpr (std::is_same_v<Type, Bf16>) {
    StoreBf16(a, x);
  } else {
    StoreF16(a, x);
  }
}

template <class Type>
PD_INLINE void Put(V a, typename Type::T* x, int64_t i, int64_t n) {
  if (i + kLanes <= n) return PutAll<Type>(a, x + i);
  typename Type::T last[kLanes];
  PutAll<Type>(a, last);
  std::memcpy(x + i, last, static_cast<size_t>(n - i) * sizeof(*last));
}

// 1 / sqrt(mean(x^2) + eps)
template <class Type>
PD_INLINE float InverseNorm(Pointer<Type> x, int64_t n, float eps) {
  V sum[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const V part = Type::Along(x + i + u * kLanes);
      sum[u] = Fma(part, part, sum[u]);
    }
  }
  for (; i < n; i += kLanes) {
    const V part = Get<Type>(x, i, n);
    sum[0] = Fma(part, part, sum[0]);
  }
  const float square = Sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return 1.0f / std::sqrt(square / static_cast<float>(n) + eps);
}

// What is added to a head, its norm, and its place: x becomes the head that attention takes.
template <class Type>
inline void Turn(const HeadsArgs& a, float* x, Pointer<Type> bias, Pointer<Type> norm,
                 Pointer<Type> cos, Pointer<Type> sin) {
  const int64_t n = a.size, half = n / 2;
  if (bias) {
    for (int64_t i = 0; i < n; i += kLanes) {
      Put<F32>(Get<F32>(x, i, n) + Get<Type>(bias, i, n), x, i, n);
    }
  }
  if (norm) {
    const V scale = Set(InverseNorm<F32>(x, n, a.eps));
    for (int64_t i = 0; i < n; i += kLanes) {
      Put<F32>(Get<F32>(x, i, n) * scale * Get<Type>(norm, i, n), x, i, n);
    }
  }
  for (int64_t i = 0; i < half; i += kLanes) {
    const V low = Get<F32>(x, i, half), high = Get<F32>(x + half, i, half);
    const V first = Fnma(high, Get<Type>(sin, i, half), low * Get<Type>(cos, i, half));
    const V second =
        Fma(low, Get<Type>(sin + half, i, half), high * Get<Type>(cos + half, i, half));
    Put<F32>(first, x, i, half);
    Put<F32>(second, x + half, i, half);
  }
}

template <class Type>
inline void Place(const HeadsArgs& a, int64_t begin, int64_t end) {
  using T = typename Type::T;
  const auto at = [](const void* x, int64_t i) {
    return x ? static_cast<const T*>(x) + i : nullptr;
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.tokens, t = row % a.tokens;
    const int64_t rotary = b * a.rotary_batch + t * a.rotary_token;
    const T *cos = at(a.cos, rotary), *sin = at(a.sin, rotary);
    for (int64_t h = 0; h < a.heads; ++h) {
      Turn<Type>(a, a.q + (row * a.heads + h) * a.size, at(a.q_bias, h * a.size), at(a.q_norm, 0),
                 cos, sin);
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t column = a.columns + t, head = (row * a.groups + g) * a.size;
      Turn<Type>(a, a.k + head, at(a.k_bias, g * a.size), at(a.k_norm, 0), cos, sin);
      T* key = static_cast<T*>(a.keys) + b * a.key_batch + g * a.key_head + column * a.key_column;
      T* value = static_cast<T*>(a.values) + b * a.value_batch + g * a.value_head +
                 column * a.value_column;
      const T* bias = at(a.v_bias, g * a.size);
      for (int64_t i = 0; i < a.size; i += kLanes) {
        V v = Get<F32>(a.v + head, i, a.size);
        if (bias) v = v + Get<Type>(bias, i, a.size);
        Put<Type>(Get<F32>(a.k + head, i, a.size), key, i, a.size);
        Put<Type>(v, value, i, a.size);
      }
    }
  }
}

// scores[i] = scale q . key i, for kCount keys.
template <class Type, int kCount>
PD_INLINE void Scores(const float* q, Pointer<Type> key, int64_t stride, int64_t size, float scale,
                      float* scores) {
  V sum[kCount];
  for (int j = 0; j < kCount; ++j) sum[j] = Set(0.0f);
  for (int64_t d = 0; d < size; d += kLanes) {
    const V part = Load(q + d);  // 0 behind its last
    for (int j = 0; j < kCount; ++j) {
      sum[j] = Fma(part, Get<Type>(key + j * stride, d, size), sum[j]);
    }
  }
  for (int j = 0; j < kCount; ++j) scores[j] = Sum(sum[j]) * scale;
}

// x becomes e^(x - max x), of which the sum is returned. Behind x there is room for a vector.
PD_INLINE float Weights(float* x, int64_t n) {
  for (int64_t i = n; i % kLanes; ++i) x[i] = -INFINITY;
  V top = Set(-INFINITY), sum = Set(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) top = Max(Load(x + i), top);
  const V max = Set(MaxOf(top));
  for (int64_t i = 0; i < n; i += kLanes) {
    const V weight = ExpNonPositive(Load(x + i) - max);
    Store(weight, x + i);
    sum = sum + weight;
  }
  return Sum(sum);
}

// out[d ...] = sum over columns of weight times value, over `sum`, for kVectors vectors.
template <class Type, int kVectors>
PD_INLINE void Mix(const float* weights, int64_t columns, Pointer<Type> value, int64_t stride,
                   float sum, int64_t d, int64_t size, typename Type::T* out) {
  V even[kVectors], odd[kVectors];
  for (int u = 0; u < kVectors; ++u) even[u] = odd[u] = Set(0.0f);
  int64_t c = 0;
  for (; c + 2 <= columns; c += 2) {
    const V first = Set(weights[c]), second = Set(weights[c + 1]);
    for (int u = 0; u < kVectors; ++u) {
      even[u] = Fma(first, Get<Type>(value + c * stride, d + u * kLanes, size), even[u]);
      odd[u] = Fma(second, Get<Type>(value + (c + 1) * stride, d + u * kLanes, size), odd[u]);
    }
  }
  for (int u = 0; u < kVectors; ++u) {
    if (c < columns) {
      even[u] = Fma(Set(weights[c]), Get<Type>(value + c * stride, d + u * kLanes, size), even[u]);
    }
    Put<Type>((even[u] + odd[u]) / Set(sum), out, d + u * kLanes, size);
  }
}

template <class Type>
inline void Attend(const HeadsArgs& a, int64_t begin, int64_t end, float* scratch) {
  using T = typename Type::T;
  constexpr int64_t kStep = 4 * kLanes;
  float *q = scratch, *scores = scratch + Ceil(a.size, 64) * 64;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.heads, h = unit % a.heads, g = h / (a.heads / a.groups);
    const T* keys = static_cast<const T*>(a.keys) + b * a.key_batch + g * a.key_head;
    const T* values = static_cast<const T*>(a.values) + b * a.value_batch + g * a.value_head;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t head = ((b * a.tokens + t) * a.heads + h) * a.size, last = a.columns + t;
      T* out = static_cast<T*>(a.out) + head;
      int64_t first = a.starts[b];
      if (a.window > 0 && last - a.window + 1 > first) first = last - a.window + 1;
      const int64_t n = last + 1 - first;
      if (n <= 0) {  // padding
        std::memset(out, 0, static_cast<size_t>(a.size) * sizeof(T));
        continue;
      }
      std::memcpy(q, a.q + head, static_cast<size_t>(a.size) * sizeof(float));
      for (int64_t i = a.size; i % kLanes; ++i) q[i] = 0.0f;
      const T* key = keys + first * a.key_column;
      int64_t c = 0;
      for (; c + 4 <= n; c += 4) {
        Scores<Type, 4>(q, key + c * a.key_column, a.key_column, a.size, a.scale, scores + c);
      }
      for (; c < n; ++c) {
        Scores<Type, 1>(q, key + c * a.key_column, a.key_column, a.size, a.scale, scores + c);
      }
      const float sum = Weights(scores, n);
      const T* value = values + first * a.value_column;
      int64_t d = 0;
      for (; d + kStep <= a.size; d += kStep) {
        Mix<Type, 4>(scores, n, value, a.value_column, sum, d, a.size, out);
      }
      for (; d < a.size; d += kLanes) {
        Mix<Type, 1>(scores, n, value, a.value_column, sum, d, a.size, out);
      }
    }
  }
}

}  // namespace

void decoder_norm(const NormArgs& a, int64_t begin, int64_t end) {
  WithNumbers(a.dtype, [&]<class Type>(Type) {
    using T = typename Type::T;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.width;
      T* out = static_cast<T*>(a.out) + row * a.width;
      const V scale = Set(InverseNorm<Type>(x, a.width, a.eps));
      for (int64_t i = 0; i < a.width; i += kLanes) {
        const V weight = Get<Type>(static_cast<const T*>(a.weight), i, a.width);
        Put<Type>(Get<Type>(x, i, a.width) * scale * weight, out, i, a.width);
      }
    }
  });
}

void decoder_residual(const ResidualArgs& a, int64_t begin, int64_t end) {
  WithNumbers(a.dtype, [&]<class Type>(Type) {
    using T = typename Type::T;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.width;
      const float* y = a.y + row * a.width;
      T* out = static_cast<T*>(a.out) + row * a.width;
      for (int64_t i = 0; i < a.width; i += kLanes) {
        V sum = Get<F32>(y, i, a.width);
        if (a.bias) sum = sum + Get<Type>(static_cast<const T*>(a.bias), i, a.width);
        Put<Type>(sum + Get<Type>(x, i, a.width), out, i, a.width);
      }
    }
  });
}

void decoder_gate(const GateArgs& a, int64_t begin, int64_t end) {
  WithNumbers(a.dtype, [&]<class Type>(Type) {
    auto* out = static_cast<typename Type::T*>(a.out);
    for (int64_t i = begin; i < end; i += kLanes) {
      const V gate = Get<F32>(a.gate, i, end), one = Set(1.0f);
      Put<Type>(gate / (one + Exp(Neg(gate))) * Get<F32>(a.up, i, end), out, i, end);
    }
  });
}

void decoder_place(const HeadsArgs& a, int64_t begin, int64_t end) {
  WithNumbers(a.dtype, [&]<class Type>(Type) { Place<Type>(a, begin, end); });
}

void decoder_attend(const HeadsArgs& a, int64_t begin, int64_t end, float* scratch) {
  WithNumbers(a.dtype, [&]<class Type>(Type) { Attend<Type>(a, begin, end, scratch); });
}

}  // namespace pd::PD_NAMESPACE
