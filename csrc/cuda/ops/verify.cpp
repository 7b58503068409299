// verify on CUDA: from torch tensors to the torch-free launcher. Schemas and checks with readable
// messages are in pydistill/ops/verify.py; here only what memory safety needs.
#include "cuda/verify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/check.h"
#include "cuda/ops/launch.h"

namespace pydistill {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kWarperColumns = 8, kMethods = 6, kFirstTree = 3, kLeniences = 6;

// The data of rows of logits, and the distances of requests and rows.
const void* rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows, int64_t width,
                    int64_t& request_stride, int64_t& row_stride) {
  STD_TORCH_CHECK(x.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == rows && x.size(2) == width &&
                      (x.stride(2) == 1 || width == 1),
                  name, " must be [", batch, ", ", rows, ", ", width, "] with unit last stride");
  request_stride = x.stride(0);
  row_stride = x.stride(1);
  return x.data_ptr();
}

// A row of `width` numbers for all requests, or one a request; `step` from one to the next.
template <class T>
const T* each(const char* name, const Tensor& x, int64_t batch, int64_t width, int64_t& step) {
  const bool one = x.dim() > 0 && x.size(0) == 1;
  step = one ? 0 : width;
  return pd::vector<T>(name, x, (one ? 1 : batch) * width);
}

const double* warpers_of(const Tensor& x, int64_t batch, int64_t& step) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Double && x.is_contiguous() &&
                      x.dim() == 2 && (x.size(0) == 1 || x.size(0) == batch) &&
                      x.size(1) == kWarperColumns,
                  "warpers must be contiguous fp64 [1 or ", batch, ", ", kWarperColumns, "]");
  step = x.size(0) == 1 ? 0 : kWarperColumns;
  return static_cast<const double*>(x.data_ptr());
}

void verify_fwd(Tensor target, MaybeTensor draft, Tensor ids, Tensor num_drafted, Tensor warpers,
                Tensor seed, Tensor position, MaybeTensor bias, MaybeTensor parent,
                MaybeTensor support, int64_t method, int64_t lenience, double strength,
                double alpha, bool /*check*/, Tensor tokens, Tensor num_accepted, Tensor logprobs,
                Tensor overlap, Tensor tv, Tensor target_lse, Tensor draft_lse, Tensor flags,
                Tensor path) {
  STD_TORCH_CHECK(target.dim() == 3 && target.size(1) >= 1 && target.size(2) >= 1,
                  "target must be [B, K + 1, V]");
  const int64_t batch = target.size(0), rows = target.size(1), slots = rows - 1;
  // Columns are 32-bit in the kernels, and a grid has fewer than 2^31 blocks.
  constexpr int64_t kMost = INT32_MAX - 4096;
  STD_TORCH_CHECK(target.size(2) <= kMost && batch <= kMost && slots <= kMost, "at most ", kMost,
                  " requests, drafted tokens and columns");
  VerifyCall call{};
  call.batch = batch;
  call.slots = slots;
  call.vocab = target.size(2);
  call.dtype = static_cast<int32_t>(pd::dtype_of("target", target));
  call.target = rows_of("target", target, batch, rows, call.vocab, call.target_request_stride,
                        call.target_row_stride);
  if (support.has_value()) {
    STD_TORCH_CHECK(draft.has_value() && support->dim() == 3 && support->size(2) <= kMost,
                    "support must be [B or 1, K or 1, S] and come with draft");
    const int64_t requests = support->size(0), places = support->size(1), size = support->size(2);
    STD_TORCH_CHECK((requests == 1 || requests == batch) && (places == 1 || places == slots),
                    "support must have one row, or one a request and drafted token");
    call.support = pd::vector<int64_t>("support", *support, requests * places * size);
    call.support_size = size;
    call.support_row_step = places == slots ? size : 0;
    call.support_request_step = requests == batch ? places * size : 0;
  }
  if (draft.has_value()) {
    STD_TORCH_CHECK(draft->scalar_type() == target.scalar_type(), "draft must have target's dtype");
    call.draft =
        rows_of("draft", *draft, batch, slots, call.support ? call.support_size : call.vocab,
                call.draft_request_stride, call.draft_row_stride);
  }
  call.ids = pd::vector<int64_t>("ids", ids, batch * slots);
  call.num_drafted = each<int64_t>("num_drafted", num_drafted, batch, 1, call.drafted_step);
  call.seed = each<int64_t>("seed", seed, batch, 1, call.seed_step);
  call.position = each<int64_t>("position", position, batch, 1, call.position_step);
  call.warpers = warpers_of(warpers, batch, call.warper_step);
  if (bias.has_value())
    call.logit_bias = each<float>("logit_bias", *bias, batch, call.vocab, call.bias_step);
  if (parent.has_value())
    call.parent = each<int32_t>("parent", *parent, batch, slots, call.parent_step);
  STD_TORCH_CHECK(method >= 0 && method < kMethods, "method is ", method);
  STD_TORCH_CHECK(lenience >= 0 && lenience < kLeniences, "lenience is ", lenience);
  STD_TORCH_CHECK((method >= kFirstTree) == parent.has_value(),
                  "parent must be given for trees, and only there");
  call.method = static_cast<int32_t>(method);
  call.lenience = static_cast<int32_t>(lenience);
  call.strength = strength;
  call.alpha = alpha;
  call.tokens = pd::vector<int64_t>("tokens", tokens, batch * rows);
  call.num_accepted = pd::vector<int64_t>("num_accepted", num_accepted, batch);
  call.logprobs = pd::vector<float>("logprobs", logprobs, batch * rows);
  call.overlap = pd::vector<float>("overlap", overlap, batch * slots);
  call.bias = pd::vector<float>("bias", tv, batch * slots);
  call.target_lse = pd::vector<float>("target_lse", target_lse, batch * rows);
  call.draft_lse = pd::vector<float>("draft_lse", draft_lse, batch * slots);
  call.flags = pd::vector<int32_t>("flags", flags, batch * rows);
  call.path = pd::vector<int64_t>("path", path, batch * slots);
  int64_t bytes = 0;
  pyd_verify_scratch(&call, &bytes);
  Tensor scratch = torch::stable::new_empty(tokens, {bytes / 8});
  call.scratch = scratch.data_ptr();
  launch_on(target.get_device_index(), "verify_fwd",
            [&](void* stream) { return pyd_verify(&call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill_cuda, CUDA, m) { m.impl("verify_fwd", TORCH_BOX(&verify_fwd)); }

}  // namespace pydistill
