// The torch-free face of the cache_decode kernel. docs/ops/cache_decode.md has the format, and
// pydistill/reference/cache_decode.py the same layout.
#pragma once

#include <cstdint>

namespace pd {

inline constexpr int64_t kCacheHeaderBytes = 12;  // offset, scale and tail, fp32, at a row's end
inline constexpr int kCacheMaxLowBits = 24;

// Where the parts of a packed row are: low bits, high bits, codes, header.
struct CacheLayout {
  int64_t k, low_bits, low, high_bits, high, code;

  int64_t stride() const { return low + high + k * code + kCacheHeaderBytes; }
};

// For 1 <= k <= vocab <= 2^31 and code of 1 or 2 bytes.
inline CacheLayout cache_layout(int64_t vocab, int64_t k, int64_t code) {
  CacheLayout at{k, 0, 0, 0, 0, code};
  while (at.low_bits < kCacheMaxLowBits && (vocab / k) >> (at.low_bits + 1)) ++at.low_bits;
  at.low = (k * at.low_bits + 7) / 8;
  at.high_bits = k + ((vocab - 1) >> at.low_bits);
  at.high = (at.high_bits + 7) / 8;
  return at;
}

struct CacheArgs {
  const uint8_t* packed;  // rows of layout.stride() bytes
  const int64_t* rows;    // [R], which of them, or null: the first R
  CacheLayout layout;
  int64_t* ids;     // [R, K]
  float* log_p;     // [R, K]
  float* log_tail;  // [R]
};

using CacheRows = void (*)(const CacheArgs&, int64_t begin, int64_t end);

// A function per Capability, over rows [begin, end). Whatever the bytes are, it reads inside the
// rows and writes inside the outputs.
extern const CacheRows cache_decode_table[];

}  // namespace pd
