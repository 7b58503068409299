// Which instruction sets this machine runs, and which one every kernel of this process uses.
//
// A capability is a whole target: a kernel compiled for it may use all of the capability's
// instructions. The operating system must also save the wider registers (XGETBV), or the first such
// instruction would crash.
#pragma once

namespace pd {

enum class Capability { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx };
inline constexpr int kCapabilities = 5;

// The widest capability of this machine.
Capability detected_capability();

// The capability in use: the detected one unless set_capability chose another.
Capability active_capability();

// "scalar", "avx2", "avx512", "avx512_bf16" or "amx".
const char* capability_name(Capability capability);

// Switches every kernel to the named capability ("default" is scalar). Returns nullptr, or a
// sentence that says why not; the string lives forever.
const char* set_capability(const char* name);

}  // namespace pd
