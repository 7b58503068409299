// The state that the scheduler (cusim.cpp) shares with the memory hooks (cusim_mem.cpp).
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cusim.h"

namespace cusim {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxShared = 227 * 1024;
inline constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBarrier, kAtWarp, kExited };

struct Fiber {
  ucontext_t context;
  uint3 index;
  int thread, lane, warp;
  State state;
  Site site;           // of the collective it waits at
  const char* kind;    // its name
  unsigned mask;       // of the warp collective
  uint64_t posted;     // what this lane gives
  uint64_t lanes[32];  // what all lanes gave
  bool predicate;
  int barrier_count;
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t address, size_t bytes) const {
    return address >= begin && address + bytes <= end;
  }
};

struct Sim {
  dim3 grid, block;
  uint3 block_id;
  int64_t block_number = 0;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;  // null while host code runs
  ucontext_t main;
  char* stacks = nullptr;
  std::vector<char> dynamic_shared;
  Range static_shared;  // this library's thread-local block
  Range parameters;     // the kernel's arguments
  void (*run)(const void*) = nullptr;
  std::string kernel;
  std::string error;
  std::string error_kind;  // collective, bounds or fault
  int order = 0;           // 0 forward, 1 reverse, 2 random
  uint32_t random = 1;
  int64_t launches = 0;
  int64_t shared_limit = kMaxShared;
  // A barrier begins a new interval; a __syncwarp of the whole warp a new generation of that warp.
  uint32_t interval = 0;
  uint32_t generation[kMaxThreads / 32] = {};
};

extern Sim sim;

// Callbacks of the memory hooks, null without them.
struct Observer {
  bool (*launch_begin)();  // false: out of memory
  void (*block_end)();
  void (*touch)(uintptr_t address, size_t bytes, Access access);
};
extern const Observer* observer;

std::string where(const Fiber& fiber);

// Ends the launch from inside a fiber: records the message and never returns.
[[noreturn]] void fail(const char* error_kind, const std::string& message);

}  // namespace cusim
