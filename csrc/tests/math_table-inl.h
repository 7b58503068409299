// Arrays through the vector maths, in the blocks of rows-inl.h, so that its tails are tested too.
#if defined(PD_MATH_TABLE_INL_H) == defined(PD_TOGGLE)
#ifdef PD_MATH_TABLE_INL_H
#undef PD_MATH_TABLE_INL_H
#else
#define PD_MATH_TABLE_INL_H
#endif

#include "cpu/rows-inl.h"
#include "tests/math_table.h"

namespace pd::PD_NAMESPACE {

PD_INLINE V Apply(Math function, V x) {
  V minus_one;
  switch (function) {
    case Math::kExp:
      return Exp(x);
    case Math::kExpNonPositive:
      return ExpNonPositive(x);
    case Math::kExpNormal:
      return ExpNormal(x);
    case Math::kExpLess:
      return ExpLess(x, ExpNormal(Set(-87.0f)));
    case Math::kExpNonPositiveOfTwo:
      return ExpNonPositive(x, minus_one);
    case Math::kExpm1NonPositive:
      ExpNonPositive(x, minus_one);
      return minus_one;
    case Math::kExpm1:
      return Expm1(x);
    case Math::kLog:
      return Log(x);
    case Math::kLog1p:
      return Log1p(x, Set(1.0f) + x);
    case Math::kExpClamped:
      return ExpClamped(x);
    case Math::kLogNormal:
      return LogNormal(x);
    case Math::kReciprocal:
      return Reciprocal(x);
    case Math::kPhiSmall:
      return PhiSmall(x);
  }
  return x;
}

inline void math_map(Math function, const float* in, int64_t size, float* out) {
  Row row{reinterpret_cast<const char*>(in), DType::kF32};
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = size - begin < kBlock ? size - begin : kBlock, padded = Padded(n);
    const float* x = row.Block(begin, n);
    for (int64_t i = 0; i < padded; i += kLanes) Store(Apply(function, Load(x + i)), buffer + i);
    StoreBlock(buffer, n, DType::kF32, reinterpret_cast<char*>(out), begin);
  }
}

inline void widen(DType dtype, const void* in, int64_t size, float* out) {
  Row row{static_cast<const char*>(in), dtype};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = size - begin < kBlock ? size - begin : kBlock;
    StoreBlock(row.Block(begin, n), n, DType::kF32, reinterpret_cast<char*>(out), begin);
  }
}

inline void narrow(DType dtype, const float* in, int64_t size, void* out) {
  Row row{reinterpret_cast<const char*>(in), DType::kF32};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = size - begin < kBlock ? size - begin : kBlock;
    StoreBlock(row.Block(begin, n), n, dtype, static_cast<char*>(out), begin);
  }
}

}  // namespace pd::PD_NAMESPACE
#endif
