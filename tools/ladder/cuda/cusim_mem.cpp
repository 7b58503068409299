// Memory hooks of cusim: what every load and store of a kernel does.
//
// The kernel is compiled with -fsanitize=thread, which makes the compiler announce each access, but
// linked with the functions below in place of the sanitizer's runtime. They check that an access
// lies in a registered buffer, a shared variable, the thread's own stack or the kernel's arguments,
// and is aligned; count bytes and 32-byte sectors; and find data races.
//
// Races. Each element remembers who has read, written and atomically updated it, as a set of
// threads (ThreadSet). Two accesses of different threads, at least one of them not a read and not
// both atomic, race unless they are ordered: by a block barrier, or, inside a warp, by a __syncwarp
// that names all its lanes. (Shuffles and votes do not order memory.) Nothing orders two blocks of
// one launch; launches are ordered, as in a stream. A race is found whatever the order in which the
// fibers really ran.
//
// Requests. The k-th access of each lane of a warp at one place of the code counts as one request
// of that warp; its sectors are the distinct 32-byte pieces of memory that the lanes touch.
#include <link.h>
#include <sys/mman.h>

#include <memory>
#include <unordered_map>

#include "cusim_runtime.h"

namespace {

using cusim::Access;
using cusim::Fiber;
using cusim::Range;
using cusim::sim;

constexpr uint32_t kNone = 0;
constexpr uint32_t kMany = 0xffffffffu;
constexpr uintptr_t kSector = 32;
constexpr size_t kMaxMessages = 16;

struct Actor {
  uint32_t block;  // number + 1
  uint32_t interval, generation;
  int warp, lane;
};

// The threads that did one kind of access to one element: exact for the current barrier interval of
// the latest block, a mere "several blocks" beyond it, which is all that ordering can depend on.
struct ThreadSet {
  uint32_t block = kNone, interval = 0, generation = 0, warps = 0, lanes = 0;

  bool unordered_with(const Actor& actor) const {
    if (block == kNone) return false;
    if (block != actor.block) return true;
    if (interval != actor.interval) return false;
    if (warps & ~(1u << actor.warp)) return true;
    return generation == actor.generation && (lanes & ~(1u << actor.lane));
  }

  void add(const Actor& actor) {
    const uint32_t warp = 1u << actor.warp, lane = 1u << actor.lane;
    if (block == kMany) return;
    if (block != kNone && block != actor.block) {
      block = kMany;
    } else if (block == kNone || interval != actor.interval) {
      *this = {actor.block, actor.interval, actor.generation, warp, lane};
    } else if (warps != warp) {
      warps |= warp;
    } else if (generation != actor.generation) {
      generation = actor.generation;
      lanes = lane;
    } else {
      lanes |= lane;
    }
  }

  std::string describe() const {
    if (block == kMany) return "several blocks";
    if (block != sim.block_number + 1) return "block " + std::to_string(block - 1);
    const bool one_warp = (warps & (warps - 1)) == 0;
    const int warp = __builtin_ctz(warps);
    if (!one_warp) return "several warps of the same block";
    if (lanes & (lanes - 1)) return "warp " + std::to_string(warp) + " of the same block";
    return "thread " + std::to_string(warp * 32 + __builtin_ctz(lanes)) + " of the same block";
  }
};

struct Cell {
  ThreadSet reads, writes, atomics;
};

// Zero pages that the system hands out on first touch: most elements of a view with big holes never
// are.
class Shadow {
 public:
  Shadow() = default;
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;
  ~Shadow() { release(); }

  bool reset(size_t count) {
    release();
    bytes_ = (count + 1) * sizeof(Cell);
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    cells_ = static_cast<Cell*>(memory);
    return true;
  }
  Cell& operator[](size_t i) { return cells_[i]; }

 private:
  void release() {
    if (cells_) munmap(cells_, bytes_);
    cells_ = nullptr;
  }
  Cell* cells_ = nullptr;
  size_t bytes_ = 0;
};

struct Traffic {
  int64_t bytes = 0, requests = 0, sectors = 0;
};

struct Buffer {
  std::string name;
  Range range;
  size_t element = 1;
  const uint8_t* valid = nullptr;  // one flag an element for views with holes, else null
  Traffic loads, stores;
  int64_t atomic_bytes = 0;
  Shadow shadow;

  size_t index(uintptr_t address) const { return (address - range.begin) / element; }
  bool holds(uintptr_t address, size_t bytes) const {
    if (!range.holds(address, bytes)) return false;
    if (!valid) return true;
    for (size_t i = index(address); i <= index(address + bytes - 1); ++i)
      if (!valid[i]) return false;
    return true;
  }
};

struct SharedVariable {
  std::string name;
  uintptr_t offset;
  size_t bytes;
};

// The requests of one place in the code to one buffer, by warp and by how often each thread has
// been there in this block.
struct AccessSite {
  Traffic* traffic;
  std::vector<uint32_t> visits;
  std::vector<std::vector<std::vector<uintptr_t>>> sectors;
};

struct SiteKey {
  const void* code;
  const Traffic* traffic;
  bool operator==(const SiteKey& other) const {
    return code == other.code && traffic == other.traffic;
  }
};

struct HashSite {
  size_t operator()(const SiteKey& key) const {
    return reinterpret_cast<uintptr_t>(key.code) * 31 + reinterpret_cast<uintptr_t>(key.traffic);
  }
};

std::vector<std::unique_ptr<Buffer>> buffers;
std::vector<SharedVariable> shared_variables;
std::vector<Range> constants;  // read-only segments of this library
std::unordered_map<SiteKey, AccessSite, HashSite> sites;
Shadow static_shadow, dynamic_shadow;
int64_t shared_loaded = 0, shared_stored = 0, shared_atomic = 0;
int64_t race_count = 0;
std::vector<std::string> race_messages;
Buffer* last_buffer = nullptr;

const char* verb(Access access) {
  return access == Access::kLoad ? "load" : access == Access::kStore ? "store" : "atomic update";
}

Actor current_actor() {
  const Fiber& fiber = *sim.current;
  return {static_cast<uint32_t>(sim.block_number + 1), sim.interval, sim.generation[fiber.warp],
          fiber.warp, fiber.lane};
}

void report_race(const std::string& place, Access access, const char* earlier,
                 const ThreadSet& others) {
  ++race_count;
  if (race_messages.size() == kMaxMessages) return;
  race_messages.push_back(sim.kernel + ": data race on " + place + ": " + verb(access) + " by " +
                          cusim::where(*sim.current) + " is not ordered after the " + earlier +
                          " by " + others.describe());
}

template <class Place>
void check_cell(Cell& cell, Access access, const Actor& actor, const Place& place) {
  if (cell.writes.unordered_with(actor))
    report_race(place(), access, "store", cell.writes);
  else if (access != Access::kAtomic && cell.atomics.unordered_with(actor))
    report_race(place(), access, "atomic update", cell.atomics);
  else if (access != Access::kLoad && cell.reads.unordered_with(actor))
    report_race(place(), access, "load", cell.reads);
  ThreadSet& mine = access == Access::kLoad    ? cell.reads
                    : access == Access::kStore ? cell.writes
                                               : cell.atomics;
  mine.add(actor);
}

void count_request(const void* code, Traffic& traffic, uintptr_t address, size_t bytes) {
  AccessSite& site = sites[{code, &traffic}];
  if (site.visits.empty()) {
    site.traffic = &traffic;
    site.visits.resize(sim.fibers.size());
    site.sectors.resize((sim.fibers.size() + 31) / 32);
  }
  const Fiber& fiber = *sim.current;
  const uint32_t visit = site.visits[fiber.thread]++;
  auto& requests = site.sectors[fiber.warp];
  if (requests.size() <= visit) requests.resize(visit + 1);
  auto& sectors = requests[visit];
  for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s)
    if (std::find(sectors.rbegin(), sectors.rend(), s) == sectors.rend()) sectors.push_back(s);
}

Buffer* find_buffer(uintptr_t address, size_t bytes) {
  if (last_buffer && last_buffer->holds(address, bytes)) return last_buffer;
  for (auto& buffer : buffers)
    if (buffer->holds(address, bytes)) return last_buffer = buffer.get();
  return nullptr;
}

std::string nearest_buffer(uintptr_t address) {
  const Buffer* nearest = nullptr;
  uintptr_t distance = 1 << 20;
  for (const auto& buffer : buffers) {
    const Range& range = buffer->range;
    const uintptr_t away = address < range.begin  ? range.begin - address
                           : address >= range.end ? address - range.end
                                                  : 0;
    if (away < distance) {
      distance = away;
      nearest = buffer.get();
    }
  }
  if (!nearest) return "far from every registered buffer";
  const auto element = static_cast<int64_t>(nearest->element);
  const int64_t offset = static_cast<int64_t>(address - nearest->range.begin);
  const int64_t index = offset >= 0 ? offset / element : -((element - 1 - offset) / element);
  const auto count = static_cast<int64_t>(nearest->range.end - nearest->range.begin) / element;
  return "at " + nearest->name + "[" + std::to_string(index) + "] (" + std::to_string(count) +
         " elements" + (nearest->valid ? ", a view with holes)" : ")");
}

bool access_shared(uintptr_t address, size_t bytes, Access access) {
  const auto dynamic = reinterpret_cast<uintptr_t>(sim.dynamic_shared.data());
  Shadow* shadow = nullptr;
  size_t first = 0, begin = 0;
  const SharedVariable* variable = nullptr;
  if (sim.static_shared.holds(address, 1)) {
    const uintptr_t offset = address - sim.static_shared.begin;
    for (const auto& candidate : shared_variables)
      if (offset >= candidate.offset && offset < candidate.offset + candidate.bytes)
        variable = &candidate;
    if (variable && variable->name.rfind("guard variable", 0) == 0) return true;
    if (!variable || offset + bytes > variable->offset + variable->bytes)
      cusim::fail("bounds", std::string("out of bounds ") + verb(access) + " of " +
                                std::to_string(bytes) + " bytes in shared memory, " +
                                (variable ? "across the end of " + variable->name
                                          : "outside every shared variable"));
    shadow = &static_shadow;
    first = offset;
    begin = variable->offset;
  } else if (address >= dynamic && address + bytes <= dynamic + sim.dynamic_shared.size()) {
    shadow = &dynamic_shadow;
    first = address - dynamic;
  } else {
    return false;
  }
  (access == Access::kLoad    ? shared_loaded
   : access == Access::kStore ? shared_stored
                              : shared_atomic) += static_cast<int64_t>(bytes);
  const Actor actor = current_actor();
  for (size_t i = first; i < first + bytes; ++i) {
    Cell& cell = (*shadow)[i];
    for (ThreadSet* set : {&cell.reads, &cell.writes, &cell.atomics})
      if (set->block != actor.block) *set = {};  // each block has its own shared memory
    check_cell(cell, access, actor, [&] {
      return "byte " + std::to_string(i - begin) + " of " +
             (variable ? variable->name : "dynamic shared memory");
    });
  }
  return true;
}

void access_memory(uintptr_t address, size_t bytes, Access access, bool aligned, const void* code) {
  const Fiber* self = sim.current;
  if (!self || !bytes) return;
  const auto stack = reinterpret_cast<uintptr_t>(sim.stacks) + self->thread * cusim::kStackBytes;
  if (Range{stack, stack + cusim::kStackBytes}.holds(address, bytes)) return;
  if (aligned && address % bytes)
    cusim::fail("bounds", std::string("misaligned ") + verb(access) + " of " +
                              std::to_string(bytes) + " bytes " + nearest_buffer(address));
  if (Buffer* buffer = find_buffer(address, bytes)) {
    if (access == Access::kAtomic) {
      buffer->atomic_bytes += static_cast<int64_t>(bytes);
    } else {
      Traffic& traffic = access == Access::kLoad ? buffer->loads : buffer->stores;
      traffic.bytes += static_cast<int64_t>(bytes);
      count_request(code, traffic, address, bytes);
    }
    const Actor actor = current_actor();
    for (size_t i = buffer->index(address); i <= buffer->index(address + bytes - 1); ++i)
      check_cell(buffer->shadow[i], access, actor,
                 [&] { return buffer->name + "[" + std::to_string(i) + "]"; });
    return;
  }
  if (access_shared(address, bytes, access)) return;
  if (access == Access::kLoad) {
    if (sim.parameters.holds(address, bytes)) return;
    for (const Range& range : constants)
      if (range.holds(address, bytes)) return;
  }
  cusim::fail("bounds", std::string("out of bounds ") + verb(access) + " of " +
                            std::to_string(bytes) + " bytes " + nearest_buffer(address));
}

int find_constants(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&buffers);
  std::vector<Range> found;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    const Range range{begin, begin + header.p_memsz};
    ours |= range.holds(here, 1);
    if (!(header.p_flags & PF_W)) found.push_back(range);
  }
  if (ours) constants = found;
  return ours;
}

bool launch_begin() {
  if (constants.empty()) dl_iterate_phdr(find_constants, nullptr);
  bool reset = static_shadow.reset(sim.static_shared.end - sim.static_shared.begin) &&
               dynamic_shadow.reset(sim.dynamic_shared.size());
  for (auto& buffer : buffers)
    reset &= buffer->shadow.reset((buffer->range.end - buffer->range.begin) / buffer->element);
  return reset;
}

void block_end() {
  for (auto& [key, site] : sites)
    for (auto& warp : site.sectors)
      for (auto& request : warp) {
        ++site.traffic->requests;
        site.traffic->sectors += static_cast<int64_t>(request.size());
      }
  sites.clear();
}

void touch(uintptr_t address, size_t bytes, Access access) {
  access_memory(address, bytes, access, true, nullptr);
}

const cusim::Observer hooks{launch_begin, block_end, touch};
const bool installed = (cusim::observer = &hooks, true);

std::string quote(const std::string& text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

std::string format_traffic(const char* name, const Traffic& traffic) {
  return quote(name) + ": {\"bytes\": " + std::to_string(traffic.bytes) +
         ", \"requests\": " + std::to_string(traffic.requests) +
         ", \"sectors\": " + std::to_string(traffic.sectors) + "}";
}

}  // namespace

#define CUSIM_API extern "C" __attribute__((visibility("default")))

CUSIM_API void cusim_memory_begin() {
  buffers.clear();
  sites.clear();
  last_buffer = nullptr;
  shared_loaded = shared_stored = shared_atomic = race_count = 0;
  race_messages.clear();
}

CUSIM_API void cusim_add_shared_variable(const char* name, uint64_t offset, uint64_t bytes) {
  shared_variables.push_back({name, offset, bytes});
}

CUSIM_API void cusim_add_buffer(const char* name, const void* data, uint64_t bytes,
                                uint64_t element, const uint8_t* valid) {
  auto buffer = std::make_unique<Buffer>();
  buffer->name = name;
  buffer->range = {reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + bytes};
  buffer->element = element;
  buffer->valid = valid;
  buffers.push_back(std::move(buffer));
}

CUSIM_API const char* cusim_memory_report() {
  static std::string json;
  json = "{\"buffers\": {";
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& buffer = *buffers[i];
    json += (i ? ", " : "") + quote(buffer.name) + ": {" + format_traffic("loads", buffer.loads) +
            ", " + format_traffic("stores", buffer.stores) +
            ", \"atomic_bytes\": " + std::to_string(buffer.atomic_bytes) + "}";
  }
  json += "}, \"shared_loaded\": " + std::to_string(shared_loaded) +
          ", \"shared_stored\": " + std::to_string(shared_stored) +
          ", \"shared_atomic\": " + std::to_string(shared_atomic) +
          ", \"race_count\": " + std::to_string(race_count) + ", \"races\": [";
  for (size_t i = 0; i < race_messages.size(); ++i)
    json += (i ? ", " : "") + quote(race_messages[i]);
  json += "]}";
  return json.c_str();
}

extern "C" {
#define CUSIM_HOOK(name, bytes, access, aligned)                                        \
  void __tsan_##name(void* address) {                                                   \
    access_memory(reinterpret_cast<uintptr_t>(address), bytes, Access::access, aligned, \
                  __builtin_return_address(0));                                         \
  }
#define CUSIM_HOOKS(bytes)                               \
  CUSIM_HOOK(read##bytes, bytes, kLoad, true)            \
  CUSIM_HOOK(write##bytes, bytes, kStore, true)          \
  CUSIM_HOOK(volatile_read##bytes, bytes, kLoad, true)   \
  CUSIM_HOOK(volatile_write##bytes, bytes, kStore, true) \
  CUSIM_HOOK(unaligned_read##bytes, bytes, kLoad, false) \
  CUSIM_HOOK(unaligned_write##bytes, bytes, kStore, false)
CUSIM_HOOKS(1)
CUSIM_HOOKS(2)
CUSIM_HOOKS(4)
CUSIM_HOOKS(8)
CUSIM_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  access_memory(reinterpret_cast<uintptr_t>(address), bytes, Access::kLoad, false,
                __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  access_memory(reinterpret_cast<uintptr_t>(address), bytes, Access::kStore, false,
                __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
