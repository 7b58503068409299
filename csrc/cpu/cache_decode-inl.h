// Packed rows of a teacher cache to ids and log-probabilities. docs/ops/cache_decode.md has the
// format.
//
// Three passes over K slots that stay in L1: the low bits, with one four-byte load a slot; the log-
// probabilities, arithmetic on codes; the high bits, one count of trailing zeros a slot. The first
// two are plain loops, which the compiler makes as wide as the target.
#include "cpu/cache_decode.h"

namespace pd::PD_NAMESPACE {
namespace {

template <class T>
inline T ReadAt(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

// ids[i] = the low bits of slot i. Four bytes from a slot's first one hold them all, and never
// leave the row: high bits, codes and header follow.
inline void ReadLow(const uint8_t* low, const CacheLayout& at, int64_t* ids) {
  const uint32_t mask = (1u << at.low_bits) - 1;
  for (int64_t i = 0; i < at.k; ++i) {
    const int64_t bit = i * at.low_bits;
    ids[i] = (ReadAt<uint32_t>(low + (bit >> 3)) >> (bit & 7)) & mask;
  }
}

// Adds the high bits; returns how many slots are full.
inline int64_t AddHigh(const uint8_t* high, const CacheLayout& at, int64_t* ids) {
  int64_t n = 0;
  for (int64_t begin = 0; begin < at.high_bits; begin += 64) {
    uint64_t word = ReadAt<uint64_t>(high + begin / 8);  // codes and header follow the last byte
    const int64_t left = at.high_bits - begin;
    if (left < 64) word &= (uint64_t(1) << left) - 1;
    for (; word; word &= word - 1) {
      if (n == at.k) return n;  // damaged
      ids[n] |= (begin + __builtin_ctzll(word) - n) << at.low_bits;
      ++n;
    }
  }
  return n;
}

template <class Code>
inline void ReadLogP(const uint8_t* codes, int64_t k, float offset, float scale, float* log_p) {
  constexpr Code kInfinite = static_cast<Code>(~Code(0));
  for (int64_t i = 0; i < k; ++i) {
    const Code code = ReadAt<Code>(codes + i * static_cast<int64_t>(sizeof(Code)));
    const float c = static_cast<float>(static_cast<int32_t>(code)), x = offset - scale * (c * c);
    log_p[i] = code == kInfinite ? -INFINITY : x;
  }
}

}  // namespace

void cache_decode(const CacheArgs& a, int64_t begin, int64_t end) {
  const CacheLayout at = a.layout;
  const int64_t stride = at.stride();
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* low = a.packed + (a.rows ? a.rows[r] : r) * stride;
    const uint8_t *high = low + at.low, *codes = high + at.high, *header = codes + at.k * at.code;
    int64_t* ids = a.ids + r * at.k;
    float* log_p = a.log_p + r * at.k;
    const float offset = ReadAt<float>(header), scale = ReadAt<float>(header + 4);
    ReadLow(low, at, ids);
    if (at.code == 1) {
      ReadLogP<uint8_t>(codes, at.k, offset, scale, log_p);
    } else {
      ReadLogP<uint16_t>(codes, at.k, offset, scale, log_p);
    }
    for (int64_t i = AddHigh(high, at, ids); i < at.k; ++i) {
      ids[i] = -1;
      log_p[i] = -INFINITY;
    }
    a.log_tail[r] = ReadAt<float>(header + 8);
  }
}

}  // namespace pd::PD_NAMESPACE
