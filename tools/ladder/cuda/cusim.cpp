// Scheduler of cusim: runs the blocks of a launch one after another, the threads of a block as
// fibers, and checks every collective.
//
// A fiber runs until it waits or exits. When no fiber can run, either all threads stand at the same
// __syncthreads, which releases them, or the launch has failed. A failure records its message and
// abandons the fibers, so that the launcher returns 719 (cudaErrorLaunchFailure) as a GPU would,
// and the process lives on; later launches of the same call are refused with the same code.
#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include "cusim_runtime.h"

namespace cusim {

Sim sim;
const Observer* observer = nullptr;

namespace {

// CUDA's error codes.
constexpr int kInvalidValue = 1;
constexpr int kMemoryAllocation = 2;
constexpr int kInvalidConfiguration = 9;
constexpr int kLaunchFailure = 719;

thread_local volatile char
    shared_anchor;  // its address makes the loader allocate our thread-local block

void record(const char* error_kind, const std::string& message) {
  sim.error_kind = error_kind;
  sim.error = sim.kernel + ": " + message;
}

std::string format_site(Site site) {
  const char* base = strrchr(site.file, '/');
  return std::string(base ? base + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string format_thread(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " waits at " + fiber.kind + " (" +
         format_site(fiber.site) + ")";
}

void yield_to_scheduler() {
  Fiber* self = sim.current;
  swapcontext(&self->context, &sim.main);
}

void fiber_main() {
  sim.run(reinterpret_cast<const void*>(sim.parameters.begin));
  sim.current->state = State::kExited;
  yield_to_scheduler();
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!sim.current) {
    signal(number, SIG_DFL);  // the host code's own fault: let it be reported as usual
    return;
  }
  char text[96];
  snprintf(text, sizeof text, number == SIGFPE ? "arithmetic fault at %p" : "invalid address %p",
           info->si_addr);
  record("fault", where(*sim.current) + ": " + text);
  setcontext(&sim.main);
}

// A wild pointer in a kernel must not take the process down.
class CatchFaults {
 public:
  CatchFaults() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &saved_[i]);
  }
  ~CatchFaults() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &saved_[i], nullptr);
  }

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction saved_[3];
};

int find_static_shared(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&sim);
  const ElfW(Phdr)* tls = nullptr;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) tls = &header;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz) ours = true;
  }
  if (!ours || !tls) return 0;
  const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  sim.static_shared = {begin, begin + tls->p_memsz};
  return 1;
}

uint32_t next_random(uint32_t bound) {
  sim.random = sim.random * 1664525u + 1013904223u;
  return static_cast<uint32_t>((static_cast<uint64_t>(sim.random) * bound) >> 32);
}

template <class T>
void shuffle_order(std::vector<T>& order) {
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[next_random(static_cast<uint32_t>(i))]);
}

template <class T>
std::vector<T> make_order(T count) {
  std::vector<T> order(static_cast<size_t>(count));
  for (T i = 0; i < count; ++i) order[i] = sim.order == 1 ? count - 1 - i : i;
  if (sim.order == 2) shuffle_order(order);
  return order;
}

void start_fibers() {
  const dim3 block = sim.block;
  for (int i = 0; i < static_cast<int>(sim.fibers.size()); ++i) {
    Fiber& fiber = sim.fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    fiber.thread = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.state = State::kReady;
    fiber.index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = sim.stacks + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// All threads that still run wait: releases __syncthreads or says why it cannot.
bool release_barrier(int running) {
  int waiting = 0, predicates = 0;
  const Fiber* first = nullptr;
  const Fiber* other = nullptr;
  for (const Fiber& fiber : sim.fibers) {
    if (fiber.state == State::kExited) continue;
    if (!first) first = &fiber;
    const bool same = fiber.state == first->state && fiber.site.line == first->site.line &&
                      strcmp(fiber.site.file, first->site.file) == 0;
    if (!same && !other) other = &fiber;
    if (fiber.state == State::kAtBarrier) {
      ++waiting;
      predicates += fiber.predicate;
    }
  }
  const int threads = static_cast<int>(sim.fibers.size());
  if (other) {
    record("collective", "divergent: " + format_thread(*first) + " while " + format_thread(*other));
    return false;
  }
  if (waiting != running) {
    record("collective", "deadlock: " + format_thread(*first) + " for lanes that never arrive");
    return false;
  }
  if (running != threads) {
    record("collective", "divergent: " + format_thread(*first) + " after " +
                             std::to_string(threads - running) + " of " + std::to_string(threads) +
                             " threads have exited");
    return false;
  }
  for (Fiber& fiber : sim.fibers) {
    fiber.barrier_count = predicates;
    fiber.state = State::kReady;
  }
  ++sim.interval;
  return true;
}

void poison_shared() {
  // 0xff bytes read as NaN in every float format and as -1 in integers.
  memset(reinterpret_cast<void*>(sim.static_shared.begin), 0xff,
         sim.static_shared.end - sim.static_shared.begin);
  std::fill(sim.dynamic_shared.begin(), sim.dynamic_shared.end(), static_cast<char>(0xff));
}

void run_block() {
  ++sim.interval;
  poison_shared();
  start_fibers();
  std::vector<int> order = make_order(static_cast<int>(sim.fibers.size()));
  int running = static_cast<int>(order.size());
  while (running) {
    bool progress = false;
    if (sim.order == 2) shuffle_order(order);
    for (int i : order) {
      Fiber& fiber = sim.fibers[i];
      while (fiber.state == State::kReady) {
        progress = true;
        sim.current = &fiber;
        swapcontext(&sim.main, &fiber.context);
        sim.current = nullptr;
        if (!sim.error.empty()) return;
        if (fiber.state == State::kExited) --running;
      }
    }
    if (running && !progress && !release_barrier(running)) return;
  }
  if (observer) observer->block_end();
}

// Blocks until every lane of the mask has arrived with the same collective.
void meet_warp(const char* kind, unsigned mask, uint64_t bits, Site site) {
  Fiber* self = sim.current;
  if (!(mask >> self->lane & 1))
    fail("collective", std::string(kind) + " (" + format_site(site) +
                           "): the mask does not name the calling lane");
  self->kind = kind;
  self->site = site;
  self->mask = mask;
  self->posted = bits;
  self->state = State::kAtWarp;
  Fiber* lanes = &sim.fibers[self->warp * 32];
  const int count = std::min(32, static_cast<int>(sim.fibers.size()) - self->warp * 32);
  const auto bad = [&](int lane, const char* what) {
    char hex[16];
    snprintf(hex, sizeof hex, "0x%08x", mask);
    fail("collective", std::string(kind) + " (" + format_site(site) + ") with mask " + hex +
                           ": lane " + std::to_string(lane) + " " + what);
  };
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= count) bad(lane, "does not exist in this block");
    const Fiber& other = lanes[lane];
    if (other.state == State::kExited) bad(lane, "has exited");
    if (other.state == State::kAtBarrier) bad(lane, "waits at __syncthreads");
    if (other.state == State::kReady) {
      complete = false;
      continue;
    }
    if (other.mask != mask) bad(lane, "passes a different mask");
    if (strcmp(other.kind, kind) || other.site.line != site.line ||
        strcmp(other.site.file, site.file))
      bad(lane, "executes a different collective");
  }
  if (!complete) {
    yield_to_scheduler();
    return;
  }
  // Of all warp collectives only __syncwarp orders memory; here only when it names the whole warp.
  const unsigned whole = count == 32 ? 0xffffffffu : (1u << count) - 1;
  if (!strcmp(kind, "__syncwarp") && (mask & whole) == whole) ++sim.generation[self->warp];
  uint64_t given[32] = {};
  for (int lane = 0; lane < count; ++lane)
    if (mask >> lane & 1) given[lane] = lanes[lane].posted;
  for (int lane = 0; lane < count; ++lane) {
    if (!(mask >> lane & 1)) continue;
    memcpy(lanes[lane].lanes, given, sizeof given);
    lanes[lane].state = State::kReady;
  }
}

}  // namespace

std::string where(const Fiber& fiber) {
  const uint3 b = sim.block_id;
  return "thread " + std::to_string(fiber.thread) + " of block (" + std::to_string(b.x) + "," +
         std::to_string(b.y) + "," + std::to_string(b.z) + ")";
}

void fail(const char* error_kind, const std::string& message) {
  record(error_kind, where(*sim.current) + ": " + message);
  setcontext(&sim.main);
  __builtin_unreachable();
}

uint3 thread_index() { return sim.current->index; }
uint3 block_index() { return sim.block_id; }
dim3 block_dim() { return sim.block; }
dim3 grid_dim() { return sim.grid; }
void* dynamic_shared() { return sim.dynamic_shared.data(); }
int64_t shared_limit() { return sim.shared_limit; }

void touch(const volatile void* address, size_t bytes, Access access) {
  if (observer) observer->touch(reinterpret_cast<uintptr_t>(address), bytes, access);
}

int block_barrier(bool predicate, Site site) {
  Fiber* self = sim.current;
  self->kind = "__syncthreads";
  self->site = site;
  self->predicate = predicate;
  self->state = State::kAtBarrier;
  yield_to_scheduler();
  return self->barrier_count;
}

void warp_barrier(unsigned mask, Site site) { meet_warp("__syncwarp", mask, 0, site); }

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Site site) {
  static const char* const kNames[] = {"__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync",
                                       "__shfl_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width <= 0 || width > 32 || (width & (width - 1)))
    fail("collective", std::string(name) + ": width " + std::to_string(width) +
                           " is not a power of two up to 32");
  Fiber* self = sim.current;
  meet_warp(name, mask, bits, site);
  const int segment = self->lane & ~(width - 1);
  int source = self->lane;
  if (kind == Shuffle::kXor && (self->lane ^ operand) < segment + width)
    source = self->lane ^ operand;
  if (kind == Shuffle::kDown && self->lane + operand < segment + width)
    source = self->lane + operand;
  if (kind == Shuffle::kUp && self->lane - operand >= segment) source = self->lane - operand;
  if (kind == Shuffle::kIndex) source = segment + (operand & (width - 1));
  if (!(mask >> source & 1))
    fail("collective", std::string(name) + " (" + format_site(site) + ") reads lane " +
                           std::to_string(source) + ", which is not in the mask");
  return self->lanes[source];
}

void gather(unsigned mask, uint64_t bits, uint64_t (&lanes)[32], Site site) {
  Fiber* self = sim.current;
  meet_warp("__reduce_sync", mask, bits, site);
  memcpy(lanes, self->lanes, sizeof lanes);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  Fiber* self = sim.current;
  meet_warp("__ballot_sync", mask, predicate, site);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (self->lanes[lane]) votes |= 1u << lane;
  return votes;
}

int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(const void*),
           const void* closure, size_t closure_bytes) {
  if (!sim.error.empty()) return kLaunchFailure;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (!threads || threads > kMaxThreads || block.z > 64) return kInvalidConfiguration;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return kInvalidConfiguration;
  if (static_cast<int64_t>(shared_bytes) > sim.shared_limit) return kInvalidValue;
  if (!sim.stacks) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return kMemoryAllocation;
    sim.stacks = static_cast<char*>(memory);
  }
  sim.kernel = name;
  if (sim.kernel.front() == '(') sim.kernel = sim.kernel.substr(1, sim.kernel.size() - 2);
  sim.grid = grid;
  sim.block = block;
  sim.run = run;
  sim.fibers.resize(threads);
  sim.dynamic_shared.assign(shared_bytes, 0);
  sim.parameters.begin = reinterpret_cast<uintptr_t>(closure);
  sim.parameters.end = sim.parameters.begin + closure_bytes;
  shared_anchor = 0;
  dl_iterate_phdr(find_static_shared, nullptr);
  ++sim.launches;
  if (observer && !observer->launch_begin()) return kMemoryAllocation;
  const CatchFaults catch_faults;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  for (int64_t number : make_order(blocks)) {
    sim.block_number = number;
    sim.block_id = {static_cast<unsigned>(number % grid.x),
                    static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / (static_cast<int64_t>(grid.x) * grid.y))};
    run_block();
    sim.current = nullptr;
    if (!sim.error.empty()) return kLaunchFailure;
  }
  return 0;
}

}  // namespace cusim

#define CUSIM_API extern "C" __attribute__((visibility("default")))

CUSIM_API void cusim_begin(int order, uint32_t seed, int64_t shared_limit) {
  cusim::sim.shared_limit = shared_limit < 0 ? cusim::kMaxShared : shared_limit;
  cusim::sim.order = order;
  cusim::sim.random = seed * 2654435761u + 1;
  cusim::sim.error.clear();
  cusim::sim.error_kind.clear();
  cusim::sim.launches = 0;
}
CUSIM_API const char* cusim_error() { return cusim::sim.error.c_str(); }
CUSIM_API const char* cusim_error_kind() { return cusim::sim.error_kind.c_str(); }
CUSIM_API int64_t cusim_launches() { return cusim::sim.launches; }
