// topk_logprobs on the CPU: from torch tensors to the torch-free kernel. Schema and checks with
// readable messages are in pydistill/ops/topk_logprobs.py; here only what memory safety needs.
#include "cpu/topk_logprobs.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;

void topk_logprobs_fwd(Tensor input, int64_t k, double temperature, Tensor ids, Tensor logprobs,
                       Tensor tail, Tensor lse) {
  TopkLogprobsArgs a{};
  a.logits = logits("logits", input);
  a.k = k;
  a.temperature = temperature;
  const int64_t rows = a.logits.rows;
  STD_TORCH_CHECK(k >= 1 && k <= a.logits.width, "k is ", k, ", of ", a.logits.width, " columns");
  STD_TORCH_CHECK(a.logits.width <= int64_t{1} << 32, "logits has more than 2^32 columns");
  a.ids = vector<int64_t>("ids", ids, rows * k);
  a.logprobs = vector<float>("logprobs", logprobs, rows * k);
  a.tail = vector<float>("tail", tail, rows);
  a.lse = vector<float>("lse", lse, rows);
  const TopkLogprobsRows kernel =
      topk_logprobs_forward_table[static_cast<int>(active_capability())];
  parallel_rows(rows, a.logits.width, [&](int64_t begin, int64_t end) {
    const Scratch memory(topk_logprobs_scratch_bytes(a));
    kernel(a, begin, end, memory.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("topk_logprobs_fwd", TORCH_BOX(&topk_logprobs_fwd));
}

}  // namespace pd
