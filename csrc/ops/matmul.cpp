// matmul on the CPU: from torch tensors to the torch-free kernels. The schema and checks with
// readable messages are in pydistill/ops/matmul.py; here only what memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/multiply.h"

namespace pd {
namespace {

using torch::stable::Tensor;

// The rows of x, or its columns.
Lines lines(const char* name, const Tensor& x, bool columns) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix");
  const int64_t line = columns ? 1 : 0, depth = 1 - line;
  Lines out{x.data_ptr(),  dtype_of(name, x), x.size(line),
            x.size(depth), x.stride(line),    x.stride(depth)};
  if (out.lines <= 1) out.line_stride = 1;  // strides that nobody takes may be anything
  if (out.depth <= 1) out.depth_stride = 1;
  STD_TORCH_CHECK(out.line_stride == 1 || out.depth_stride == 1, name,
                  " must have a unit stride, not ", x.stride(0), " and ", x.stride(1));
  return out;
}

// The bytes from the first to the last element.
std::pair<const char*, const char*> span(const Tensor& x) {
  const auto* data = static_cast<const char*>(x.data_ptr());
  if (x.numel() == 0) return {data, data};
  const int64_t last = (x.size(0) - 1) * x.stride(0) + (x.size(1) - 1) * x.stride(1);
  return {data, data + (last + 1) * static_cast<int64_t>(x.element_size())};
}

void matmul_out(Tensor a, Tensor b, bool accumulate, bool narrow, Tensor out) {
  GemmArgs g{};
  g.a = lines("a", a, false);
  g.b = lines("b", b, true);
  STD_TORCH_CHECK(g.a.depth == g.b.depth && out.dim() == 2 && out.size(0) == g.a.lines &&
                      out.size(1) == g.b.lines,
                  "shapes of a, b and out do not agree");
  g.out_dtype = dtype_of("out", out);
  STD_TORCH_CHECK(!accumulate || g.out_dtype == DType::kF32, "accumulate needs an fp32 out");
  g.accumulate = accumulate;
  g.narrow = narrow;
  if (out.numel() == 0) return;
  for (const Tensor* x : {&a, &b}) {
    const auto [begin, end] = span(*x);
    const auto [first, last] = span(out);
    STD_TORCH_CHECK(end <= first || last <= begin, "out must not share memory with an operand");
  }
  int64_t row = out.stride(0), column = out.size(1) > 1 ? out.stride(1) : 1;
  if (column != 1) {  // out^T = b^T a^T
    std::swap(g.a, g.b);
    row = std::exchange(column, out.size(0) > 1 ? row : 1);  // a stride that nobody takes is any
  }
  STD_TORCH_CHECK(column == 1 && (g.a.lines <= 1 || row >= g.b.lines),
                  "out must have a unit stride and no element twice, not strides ", out.stride(0),
                  " and ", out.stride(1));
  g.out = out.data_ptr();
  g.out_stride = row;
  if (!accumulate) ask_for_huge_pages(g.out, out.numel() * out.element_size());

  multiply(g);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("matmul_out", TORCH_BOX(&matmul_out)); }

}  // namespace pd
