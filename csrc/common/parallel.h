// Rows over torch's threads, and memory that a thread keeps between rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace pd {

constexpr int64_t ceil_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Calls body(begin, end) over [0, n) in whole units. Where they are many, threads take some at a
// time as they are ready for them, so that one which is held up does not hold up the others.
template <class Body>
void parallel_pieces(int64_t n, int64_t grain, int64_t unit, const Body& body) {
  constexpr int64_t kPieces = 8, kFew = 4;  // of a thread
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t piece = ceil_to(ceil_to(n, kPieces * threads) / (kPieces * threads), unit);
  if (threads == 1 || piece < grain || n < kFew * threads * piece) {
    return torch::stable::parallel_for(0, n, grain, body);
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, n, grain, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < n;) {
      body(begin, begin + piece < n ? begin + piece : n);
    }
  });
}

// Calls body(begin, end) over [0, rows). A row is the unit, so results do not depend on the number
// of threads; small calls stay on one thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  const int64_t grain = columns > kElementsWorthAThread ? 1 : kElementsWorthAThread / columns + 1;
  parallel_pieces(rows, grain, 1, body);
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
