// The coins of `verify`: Philox4x32-10, bit for bit as on every other backend (docs/ops/verify.md).
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace pydistill {

enum Stream : uint32_t { kAcceptStream = 0, kResampleStream = 1 };

// A uniform number in [0, 1), exact in fp64.
__device__ inline double coin(int64_t seed, int64_t position, int64_t slot, uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = static_cast<uint32_t>(slot), c3 = stream;
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t{0xD2511F53} * c0, y = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(y >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(x >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(y);
    c3 = static_cast<uint32_t>(x);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint64_t bits = (static_cast<uint64_t>(c0 >> 5) << 26) + (c1 >> 6);
  return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

}  // namespace pydistill
