// cpuid and XGETBV, read once.
#include "cpu/cpuid.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pd {
namespace {

constexpr const char* kNames[kCapabilities] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
bool bit(unsigned word, int index) { return (word >> index) & 1u; }

unsigned long long xgetbv() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands out the AMX tile registers on request only.
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

Capability detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Capability::kScalar;
  const bool osxsave = bit(c, 27), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !fma || !f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return Capability::kScalar;
  }
  const unsigned long long saved = xgetbv();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  const bool tiles = (saved & 0x60000) == 0x60000;
  const bool avx2 = bit(b, 5), bmi2 = bit(b, 8);
  if (!ymm || !avx2 || !bmi2) return Capability::kScalar;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  if (!zmm || !avx512) return Capability::kAvx2;
  const bool amx = bit(d, 22) && bit(d, 24);  // AMX-BF16, AMX-TILE
  unsigned a1, b1, c1, d1;
  const bool bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && bit(a1, 5);
  if (!bf16) return Capability::kAvx512;
  return amx && tiles && amx_permitted() ? Capability::kAmx : Capability::kAvx512Bf16;
}
#else
Capability detect() { return Capability::kScalar; }
#endif

std::atomic<int> active{-1};

}  // namespace

Capability detected_capability() {
  static const Capability detected = detect();
  return detected;
}

Capability active_capability() {
  const int chosen = active.load(std::memory_order_relaxed);
  return chosen < 0 ? detected_capability() : static_cast<Capability>(chosen);
}

const char* capability_name(Capability capability) { return kNames[static_cast<int>(capability)]; }

const char* set_capability(const char* name) {
  if (std::strcmp(name, "default") == 0) name = kNames[0];
  for (int i = 0; i < kCapabilities; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    if (i > static_cast<int>(detected_capability())) {
      return "this machine lacks that instruction set; `pydistill env` lists those it has";
    }
    active.store(i, std::memory_order_relaxed);
    return nullptr;
  }
  return "it is not a capability; use scalar, avx2, avx512, avx512_bf16 or amx";
}

}  // namespace pd
