// Every instruction set's cache_decode on rows packed here bit by bit, and on noise: what was
// packed comes back, all targets agree to the bit, and, under the sanitizers, none leaves its
// memory.
#include "cpu/cache_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t vocab, k, code, rows;
};

struct Decoded {
  Exact<int64_t> ids;
  Exact<float> log_p, tail;
};

void set_bit(unsigned char* to, int64_t bit) {
  to[bit / 8] = static_cast<unsigned char>(to[bit / 8] | 1 << bit % 8);
}

Decoded decode(const Bytes& packed, const Shape& s, int capability, bool backwards) {
  const auto rows = static_cast<size_t>(s.rows), slots = static_cast<size_t>(s.rows * s.k);
  Decoded out{Exact<int64_t>(slots), Exact<float>(slots), Exact<float>(rows)};
  Exact<int64_t> order(rows);
  for (int64_t r = 0; r < s.rows; ++r) order[static_cast<size_t>(r)] = s.rows - 1 - r;
  const CacheArgs a{packed.data(),
                    backwards ? order.data() : nullptr,
                    cache_layout(s.vocab, s.k, s.code),
                    out.ids.data(),
                    out.log_p.data(),
                    out.tail.data()};
  cache_decode_table[capability](a, 0, s.rows);
  return out;
}

// Rows of ascending random ids, the last ones empty in some, codes from 0 up and one infinite.
void check(const Shape& s, int capability) {
  const char* name = capability_name(static_cast<Capability>(capability));
  const CacheLayout at = cache_layout(s.vocab, s.k, s.code);
  const int64_t stride = at.stride();
  Bytes packed(static_cast<size_t>(s.rows * stride));
  Exact<int64_t> want(static_cast<size_t>(s.rows * s.k), -1);
  std::mt19937 random(static_cast<unsigned>(s.vocab + s.k));
  const float header[3] = {-0.5f, 0.25f, -3.0f};
  for (int64_t r = 0; r < s.rows; ++r) {
    unsigned char* row = packed.data() + r * stride;
    std::set<int64_t> chosen{0, s.vocab - 1};
    while (static_cast<int64_t>(chosen.size()) > s.k) chosen.erase(chosen.begin());
    const int64_t full = std::max<int64_t>(s.k - r % 3, static_cast<int64_t>(chosen.size()));
    while (static_cast<int64_t>(chosen.size()) < full) {
      chosen.insert(static_cast<int64_t>(random()) % s.vocab);
    }
    int64_t i = 0;
    for (const int64_t id : chosen) {
      want[static_cast<size_t>(r * s.k + i)] = id;
      for (int64_t b = 0; b < at.low_bits; ++b) {
        if (id >> b & 1) set_bit(row, i * at.low_bits + b);
      }
      set_bit(row + at.low, (id >> at.low_bits) + i);
      row[at.low + at.high + i * at.code] = static_cast<unsigned char>(i % 7);
      ++i;
    }
    std::memset(row + at.low + at.high, 0xff, static_cast<size_t>(at.code));
    std::memcpy(row + stride - kCacheHeaderBytes, header, sizeof header);
  }
  for (const bool backwards : {false, true}) {
    const Decoded got = decode(packed, s, capability, backwards);
    for (int64_t r = 0; r < s.rows; ++r) {
      EXPECT(got.tail[static_cast<size_t>(r)] == -3.0f, "%s tail", name);
      for (int64_t i = 0; i < s.k; ++i) {
        const auto from = static_cast<size_t>((backwards ? s.rows - 1 - r : r) * s.k + i);
        const auto to = static_cast<size_t>(r * s.k + i);
        const float c = static_cast<float>(i % 7), x = -0.5f - 0.25f * (c * c);
        const float log_p = i == 0 || want[from] < 0 ? -INFINITY : x;
        EXPECT(got.ids[to] == want[from], "%s id %lld, packed %lld", name,
               static_cast<long long>(got.ids[to]), static_cast<long long>(want[from]));
        EXPECT(got.log_p[to] == log_p, "%s log p %g, packed %g", name, got.log_p[to], log_p);
      }
    }
  }
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<unsigned char>(random());
  const Decoded noise = decode(packed, s, capability, false), scalar = decode(packed, s, 0, false);
  for (size_t i = 0; i < noise.ids.size(); ++i) {
    EXPECT(noise.ids[i] == scalar.ids[i], "%s differs from scalar on noise", name);
    EXPECT(std::memcmp(&noise.log_p[i], &scalar.log_p[i], 4) == 0 || std::isnan(scalar.log_p[i]),
           "%s differs from scalar on noise", name);
  }
}

int Main() {
  const Shape shapes[] = {{1, 1, 1, 2},
                          {2, 1, 1, 3},
                          {5, 5, 2, 4},
                          {257, 20, 1, 5},
                          {151936, 64, 1, 7},
                          {262144, 64, 2, 3},
                          {262144, 1, 1, 3},
                          {262144, 1024, 1, 3},
                          {49152, 100, 2, 3},
                          {1 << 24, 3, 1, 2},
                          {int64_t(1) << 31, 2, 1, 2}};
  for (int c = 0; c <= static_cast<int>(detected_capability()); ++c) {
    for (const Shape& shape : shapes) check(shape, c);
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
