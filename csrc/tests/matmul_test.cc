// Every instruction set's matrix product on small, odd shapes: exact on whole numbers, the same in
// any cut of its panels, and, under the sanitizers, inside its memory.
#include "cpu/matmul.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t m, k, n;
};

// A block that ends where memory ends: the sanitizers do not see what tile registers are loaded
// from.
class Guarded {
 public:
  Guarded(size_t size, unsigned char value) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (size + page - 1) / page * page + page;
    void* first =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (first == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<unsigned char*>(first);
    mprotect(first_ + mapped_ - page, page, PROT_NONE);
    data_ = first_ + mapped_ - page - size;
    std::memset(data_, value, size);
  }
  ~Guarded() { munmap(first_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() { return data_; }

 private:
  unsigned char *first_, *data_;
  size_t mapped_;
};

// Lines of whole numbers in [-8, 8], `gap` NaN apart.
class Operand {
 public:
  Operand(int64_t lines, int64_t depth, DType dtype, bool along_depth, int64_t gap)
      : values(static_cast<size_t>(lines * depth)),
        bytes_(Size(lines, depth, along_depth, gap) * size_of(dtype), 0xff) {
    const int64_t inner = along_depth ? depth : lines, stride = inner + gap;
    view = {bytes_.data(), dtype, lines, depth, along_depth ? stride : 1, along_depth ? 1 : stride};
    std::mt19937 random(static_cast<unsigned>(lines * 31 + depth));
    for (int64_t i = 0; i < lines; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        const float x = static_cast<float>(int(random() % 17) - 8);
        values[static_cast<size_t>(i * depth + k)] = x;
        const int64_t at = i * view.line_stride + k * view.depth_stride;
        encode(x, dtype, bytes_.data() + static_cast<size_t>(at) * size_of(dtype));
      }
    }
  }

  Lines view;
  Exact<float> values;

 private:
  // The last line has no gap behind it.
  static size_t Size(int64_t lines, int64_t depth, bool along_depth, int64_t gap) {
    const int64_t inner = along_depth ? depth : lines, outer = along_depth ? lines : depth;
    return inner && outer ? static_cast<size_t>((outer - 1) * (inner + gap) + inner) : 0;
  }
  Guarded bytes_;
};

void Run(const GemmArgs& g, int capability, int64_t unit) {
  const GemmPlan p = matmul_plan_table[capability](g);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Exact<float> packed(static_cast<size_t>(p.packed_bytes) / sizeof(float), nan);
  Exact<float> scratch(static_cast<size_t>(p.scratch_bytes) / sizeof(float), nan);
  for (int64_t first = 0; first < p.shared_panels; first += p.shared_block) {
    const int64_t count = std::min(p.shared_block, p.shared_panels - first);
    for (int64_t i = 0; i < count; i += unit) {
      matmul_pack_table[capability](g, p, first, count, i, std::min(i + unit, count),
                                    packed.data());
    }
    for (int64_t j = 0; j < p.split_panels; j += unit) {
      matmul_multiply_table[capability](g, p, first, count, j, std::min(j + unit, p.split_panels),
                                        packed.data(), scratch.data());
    }
  }
}

void Check(const Shape& s, DType a_type, DType b_type, DType out_type, bool a_deep, bool b_deep,
           int64_t gap, bool accumulate, bool narrow) {
  const Operand a(s.m, s.k, a_type, a_deep, gap), b(s.n, s.k, b_type, b_deep, gap);
  const int64_t stride = s.n + gap;
  const auto size = static_cast<size_t>((s.m - 1) * stride + s.n);
  Exact<float> want(size);
  for (size_t at = 0; at < size; ++at) {
    const auto i = static_cast<int64_t>(at) / stride, j = static_cast<int64_t>(at) % stride;
    want[at] = accumulate || j >= s.n ? 3.0f : 0.0f;  // 3 stays 3 beside the result
    for (int64_t k = 0; j < s.n && k < s.k; ++k) {
      want[at] +=
          a.values[static_cast<size_t>(i * s.k + k)] * b.values[static_cast<size_t>(j * s.k + k)];
    }
  }
  for (int capability = 0; capability <= static_cast<int>(detected_capability()); ++capability) {
    for (const int64_t unit : {int64_t{1}, int64_t{1} << 20}) {
      Bytes out(size * size_of(out_type));
      for (size_t i = 0; i < size; ++i) {
        encode(3.0f, out_type, out.data() + i * size_of(out_type));
      }
      Run({a.view, b.view, out.data(), out_type, stride, accumulate, narrow}, capability, unit);
      const float rounded = out_type == DType::kF32    ? 0.0f
                            : out_type == DType::kBf16 ? 1.0f / 256.0f
                                                       : 1.0f / 2048.0f;
      for (size_t at = 0; at < size; ++at) {
        const float got = decode(out.data() + at * size_of(out_type), out_type);
        EXPECT(std::fabs(got - want[at]) <= std::fabs(want[at]) * rounded,
               "%s: %g, not %g at (%d, %d) of %dx%dx%d",
               capability_name(static_cast<Capability>(capability)), got, want[at],
               int(static_cast<int64_t>(at) / stride), int(static_cast<int64_t>(at) % stride),
               int(s.m), int(s.k), int(s.n));
      }
    }
  }
}

int Main() {
  const Shape shapes[] = {{1, 1, 1},    {1, 0, 3},    {5, 17, 3},     {3, 40, 37},   {37, 40, 3},
                          {13, 33, 35}, {2, 530, 98}, {197, 259, 21}, {21, 259, 197}};
  const DType dtypes[] = {DType::kF32, DType::kBf16, DType::kF16};
  for (const Shape& s : shapes) {
    for (const DType a : dtypes) {
      for (const DType b : dtypes) {
        for (int layout = 0; layout < 4; ++layout) {
          Check(s, a, b, DType::kF32, layout & 1, layout & 2, layout == 1 ? 3 : 0, layout & 2,
                false);
          Check(s, a, b, layout & 1 ? DType::kBf16 : DType::kF16, layout & 1, layout & 2, 5, false,
                true);
        }
      }
    }
  }
  // What AMX's tiles tell apart: whole tiles and parts, lines where they lie, copied (powers of two
  // apart, a part of the depth, a ragged end) and side by side, several blocks of the depth.
  for (const Shape& s : {Shape{33, 1152, 64}, Shape{40, 606, 70}, Shape{34, 1024, 33},
                         Shape{160, 590, 33}, Shape{300, 590, 48}}) {
    for (int layout = 0; layout < 4; ++layout) {
      for (const DType a : {DType::kBf16, DType::kF32}) {
        for (const int64_t gap : {0, 2}) {
          Check(s, a, DType::kBf16, DType::kF32, layout & 1, layout & 2, gap, layout & 1, true);
        }
      }
      Check(s, DType::kBf16, DType::kBf16, DType::kBf16, layout & 1, layout & 2, 5, false, false);
    }
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
