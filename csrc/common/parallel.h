// Rows over torch's threads, and memory that a thread keeps between rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace pd {

// Calls body(begin, end) over [0, rows). A row is the unit, so results do not depend on the number
// of threads; small calls stay on one thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  const int64_t grain = columns > kElementsWorthAThread ? 1 : kElementsWorthAThread / columns + 1;
  torch::stable::parallel_for(0, rows, grain, body);
}

// Cache-line aligned memory, freed with the thread or the object that has it.
class Block {
 public:
  Block() = default;
  explicit Block(int64_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ == 0) return;
    data_ = std::aligned_alloc(64, static_cast<size_t>(bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Block(Block&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Block& operator=(Block&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Block() { std::free(data_); }
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Scratch memory for the length of a call. A thread keeps one block from call to call: the C
// library gives one of this size back to the system, and touching its pages anew costs a tenth of a
// sweep.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > 0 && kept_.bytes() >= bytes) {
      block_ = std::move(kept_);
    } else {
      block_ = Block(bytes);
    }
  }
  ~Scratch() {
    constexpr int64_t kMostKept = 4 << 20;
    if (block_.bytes() <= kMostKept && block_.bytes() > kept_.bytes()) kept_ = std::move(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return static_cast<float*>(block_.data()); }

 private:
  static inline thread_local Block kept_;
  Block block_;
};

}  // namespace pd
