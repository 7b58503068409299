// Rows over torch's threads, and memory that a thread keeps between rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pd {

// Calls body(begin, end) over [0, rows). A row is the unit, so results do not depend on the number
// of threads; small calls stay on one thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElementsWorthAThread = 1 << 15;
  const int64_t grain = columns > kElementsWorthAThread ? 1 : kElementsWorthAThread / columns + 1;
  torch::stable::parallel_for(0, rows, grain, body);
}

// Cache-line aligned scratch memory, freed with the object; none for 0 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes == 0) return;
    data_ = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
};

}  // namespace pd
