// cache_decode on the CPU: from torch tensors to the torch-free kernel. Schema and checks with
// readable messages are in pydistill/ops/cache_decode.py; here only what memory safety needs.
#include "cpu/cache_decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;

void cache_decode_fwd(Tensor packed, std::optional<Tensor> rows, int64_t vocab_size,
                      int64_t code_bytes, Tensor ids, Tensor log_p, Tensor log_tail) {
  STD_TORCH_CHECK(ids.dim() == 2 && packed.dim() == 2, "ids and packed must be matrices");
  const int64_t count = ids.size(0), k = ids.size(1), stored = packed.size(0);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= int64_t(1) << 31 && k >= 1 && k <= vocab_size,
                  "K is ", k, " of a vocabulary of ", vocab_size);
  STD_TORCH_CHECK(code_bytes == 1 || code_bytes == 2, "code_bytes is ", code_bytes);
  CacheArgs a{};
  a.layout = cache_layout(vocab_size, k, code_bytes);
  a.packed = vector<uint8_t>("packed", packed, stored * a.layout.stride());
  a.rows = vector_or_null<int64_t>("rows", rows, count);
  a.ids = vector<int64_t>("ids", ids, count * k);
  a.log_p = vector<float>("log_p", log_p, count * k);
  a.log_tail = vector<float>("log_tail", log_tail, count);
  STD_TORCH_CHECK(a.rows || count <= stored, "packed has ", stored, " rows, ids ", count);
  for (int64_t r = 0; a.rows && r < count; ++r) {
    STD_TORCH_CHECK(a.rows[r] >= 0 && a.rows[r] < stored, "rows holds ", a.rows[r], " of ", stored);
  }
  const CacheRows kernel = cache_decode_table[static_cast<int>(active_capability())];
  parallel_rows(count, k, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("cache_decode_fwd", TORCH_BOX(&cache_decode_fwd));
}

}  // namespace pd
