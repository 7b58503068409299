// Numbers of fp32, bf16 or fp16 as vectors of fp32, and back: what a kernel of several dtypes is a
// template over.
#if defined(PD_NUMBERS_INL_H) == defined(PD_TOGGLE)
#ifdef PD_NUMBERS_INL_H
#undef PD_NUMBERS_INL_H
#else
#define PD_NUMBERS_INL_H
#endif

#include <type_traits>

#include "cpu/rows.h"
#include "cpu/vec-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// How numbers of a dtype are read, kLanes at a time; as a step of a matrix product's depth, too:
//   Along   kLanes steps of one line, whose numbers lie one after the other
//   Across  one step of kLanes lines, whose numbers lie side by side, `next` from one to the next
//   One     one step of one line; of a pair (gemm_pack-inl.h) the second may not be `there`
// and, for products that widen in place, half of 2 kLanes numbers, for bf16 every other one.
struct F32 {
  using T = float;
  static constexpr int kStep = 1;      // numbers a step
  static constexpr bool kAsIs = true;  // a step is packed as it lies
  static PD_INLINE V Along(const T* p) { return Load(p); }
  static PD_INLINE V Across(const T* p, int64_t) { return Load(p); }
  static PD_INLINE float One(const T* p, int64_t, bool) { return *p; }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return Load(p + kHalf * kLanes);
  }
};
struct Bf16 {
  using T = uint16_t;
  static constexpr int kStep = 1;
  static constexpr bool kAsIs = false;
  static PD_INLINE V Along(const T* p) { return LoadBf16(p); }
  static PD_INLINE V Across(const T* p, int64_t) { return LoadBf16(p); }
  static PD_INLINE float One(const T* p, int64_t, bool) {  // without a detour through memory
    const uint32_t bits = uint32_t(*p) << 16;
    float wide_bits;
    std::memcpy(&wide_bits, &bits, sizeof(bits));
    return wide_bits;
  }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return kHalf ? SecondBf16(LoadPairs(p)) : FirstBf16(LoadPairs(p));
  }
};
struct F16 {
  using T = uint16_t;
  static constexpr int kStep = 1;
  static constexpr bool kAsIs = false;
  static PD_INLINE V Along(const T* p) { return LoadF16(p); }
  static PD_INLINE V Across(const T* p, int64_t) { return LoadF16(p); }
  static PD_INLINE float One(const T* p, int64_t, bool) {
    T alone[kLanes] = {*p};
    float wide[kLanes];
    Store(LoadF16(alone), wide);
    return wide[0];
  }
  template <int kHalf>
  static PD_INLINE V Half(const T* p) {
    return LoadF16(p + kHalf * kLanes);
  }
};
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

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
