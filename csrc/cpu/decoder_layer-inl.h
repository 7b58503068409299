// A decoder layer between its products: norms, rotary positions, the cache, attention, the gate.
//
// All sums and functions are fp32; numbers are rounded where they are written. Attention takes up
// to four queries of one key head at a time, so that a key is loaded and widened once for them: the
// scores of all columns that they see, four columns at once, their softmaxes, and the weighted sums
// of the values. Columns that a request does not see are never read: what lies there (padding, what
// was rolled back) may be anything.
#include "cpu/decoder_layer.h"
#include "cpu/gemm_pack-inl.h"
#include "cpu/math-inl.h"
#include "cpu/numbers-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

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

// What a token's query attends to, columns [first, end), and where the result goes.
template <class Type>
struct Query {
  const float* q;
  typename Type::T* out;
  int64_t first, end;
};

constexpr int kQueries = kLanes > 8 ? 4 : 2;  // at once: sums with four keys stay in registers

// scores[i * stride + j] = scale q[i] . key j, of kRows queries with kKeys keys.
template <class Type, int kRows, int kKeys>
PD_INLINE void Scores(const float* q, int64_t padded, Pointer<Type> key, int64_t key_stride,
                      int64_t size, float scale, float* scores, int64_t stride) {
  V sum[kRows][kKeys];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kKeys; ++j) sum[i][j] = Set(0.0f);
  }
  const auto add = [&](int64_t d, const V(&part)[kKeys]) PD_INLINE_LAMBDA {
    for (int i = 0; i < kRows; ++i) {
      const V query = Load(q + i * padded + d);  // 0 behind its last
      for (int j = 0; j < kKeys; ++j) sum[i][j] = Fma(query, part[j], sum[i][j]);
    }
  };
  V part[kKeys];
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int j = 0; j < kKeys; ++j) part[j] = Type::Along(key + j * key_stride + d);
    add(d, part);
  }
  if (d < size) {
    for (int j = 0; j < kKeys; ++j) part[j] = Get<Type>(key + j * key_stride, d, size);
    add(d, part);
  }
  for (int i = 0; i < kRows; ++i) {
    float* to = scores + i * stride;
    if constexpr (kKeys == 4) {
      FourSums(sum[i], to);
    } else {
      for (int j = 0; j < kKeys; ++j) to[j] = Sum(sum[i][j]);
    }
    for (int j = 0; j < kKeys; ++j) to[j] *= scale;
  }
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

// sums[i * padded + d] += weights[i * stride + c] value[c, d] over `columns` columns, for kRows
// queries and the kVectors vectors of `size` numbers from d on.
template <class Type, int kRows, int kVectors>
PD_INLINE void MixPart(const float* weights, int64_t stride, int64_t columns, Pointer<Type> value,
                       int64_t value_stride, int64_t d, int64_t size, float* sums, int64_t padded) {
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int u = 0; u < kVectors; ++u) sum[i][u] = Load(sums + i * padded + d + u * kLanes);
  }
  for (int64_t c = 0; c < columns; ++c) {
    V part[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      part[u] = Get<Type>(value + c * value_stride, d + u * kLanes, size);
    }
    for (int i = 0; i < kRows; ++i) {
      const V weight = Set(weights[i * stride + c]);
      for (int u = 0; u < kVectors; ++u) sum[i][u] = Fma(weight, part[u], sum[i][u]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int u = 0; u < kVectors; ++u) Store(sum[i][u], sums + i * padded + d + u * kLanes);
  }
}

template <class Type, int kRows>
PD_INLINE void Mix(const float* weights, int64_t stride, int64_t columns, Pointer<Type> value,
                   int64_t value_stride, int64_t size, float* sums, int64_t padded) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) {
    // Of whole vectors, so that nothing is asked for each column.
    MixPart<Type, kRows, 4>(weights, stride, columns, value, value_stride, d, d + 4 * kLanes, sums,
                            padded);
  }
  for (; d < size; d += kLanes) {
    MixPart<Type, kRows, 1>(weights, stride, columns, value, value_stride, d, size, sums, padded);
  }
}

// Attention of kRows queries of one key head, each of which sees some column. Values that one of
// them does not see are not taken times zero: they may be NaN.
template <class Type, int kRows>
inline void AttendRows(const HeadsArgs& a, Pointer<Type> keys, Pointer<Type> values,
                       const Query<Type>* rows, float* scratch) {
  const int64_t padded = Ceil(a.size, 64) * 64, stride = scores_stride(a);
  float *q = scratch, *sums = q + kRows * padded, *scores = sums + kRows * padded;
  int64_t low = rows[0].first, high = rows[0].end, begin = low, end = high;  // all, and common
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(q + i * padded, rows[i].q, static_cast<size_t>(a.size) * sizeof(float));
    for (int64_t d = a.size; d % kLanes; ++d) q[i * padded + d] = 0.0f;
    for (int64_t d = 0; d < a.size; d += kLanes) Store(Set(0.0f), sums + i * padded + d);
    low = Least(low, rows[i].first), end = Least(end, rows[i].end);
    begin = Most(begin, rows[i].first), high = Most(high, rows[i].end);
  }
  int64_t c = low;
  for (; c + 4 <= high; c += 4) {
    Scores<Type, kRows, 4>(q, padded, keys + c * a.key_column, a.key_column, a.size, a.scale,
                           scores + c - low, stride);
  }
  for (; c < high; ++c) {
    Scores<Type, kRows, 1>(q, padded, keys + c * a.key_column, a.key_column, a.size, a.scale,
                           scores + c - low, stride);
  }
  float total[kRows];
  for (int i = 0; i < kRows; ++i) {
    total[i] = Weights(scores + i * stride + rows[i].first - low, rows[i].end - rows[i].first);
  }
  // Columns from..to of kMixed queries from row i on.
  const auto mix = [&]<int kMixed>(int i, int64_t from, int64_t to) PD_INLINE_LAMBDA {
    Mix<Type, kMixed>(scores + i * stride + from - low, stride, to - from,
                      values + from * a.value_column, a.value_column, a.size, sums + i * padded,
                      padded);
  };
  if (begin > end) begin = end = high;  // nothing in common
  for (int i = 0; i < kRows; ++i) {
    mix.template operator()<1>(i, rows[i].first, Least(begin, rows[i].end));
  }
  mix.template operator()<kRows>(0, begin, end);
  for (int i = 0; i < kRows; ++i) {
    mix.template operator()<1>(i, end, rows[i].end);
    for (int64_t d = 0; d < a.size; d += kLanes) {
      Put<Type>(Load(sums + i * padded + d) / Set(total[i]), rows[i].out, d, a.size);
    }
  }
}

// Rows of `tokens` queries of each of `together` heads of a key head.
template <class Type>
inline void Attend(const HeadsArgs& a, int64_t begin, int64_t end, float* scratch) {
  using T = typename Type::T;
  const int64_t parts = a.heads / a.together;
  Query<Type> rows[kQueries];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / parts, h = unit % parts * a.together, g = h / (a.heads / a.groups);
    const T* keys = static_cast<const T*>(a.keys) + b * a.key_batch + g * a.key_head;
    const T* values = static_cast<const T*>(a.values) + b * a.value_batch + g * a.value_head;
    int count = 0;
    const auto attend = [&] {
      switch (std::exchange(count, 0)) {
        case 1:
          return AttendRows<Type, 1>(a, keys, values, rows, scratch);
        case 2:
          return AttendRows<Type, 2>(a, keys, values, rows, scratch);
        case 3:
          return AttendRows<Type, (kQueries < 3 ? kQueries : 3)>(a, keys, values, rows, scratch);
        case 4:
          return AttendRows<Type, kQueries>(a, keys, values, rows, scratch);
      }
    };
    for (int64_t i = 0; i < a.tokens * a.together; ++i) {
      const int64_t t = i / a.together, head = h + i % a.together, last = a.columns + t;
      const int64_t at = ((b * a.tokens + t) * a.heads + head) * a.size;
      T* out = static_cast<T*>(a.out) + at;
      int64_t first = a.starts[b];
      if (a.window > 0) first = Most(first, last + 1 - a.window);
      if (first > last) {  // padding
        std::memset(out, 0, static_cast<size_t>(a.size) * sizeof(T));
        continue;
      }
      rows[count++] = {a.q + at, out, first, last + 1};
      if (count == kQueries) attend();
    }
    attend();
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
