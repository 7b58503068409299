// verify on the CPU: from torch tensors to the torch-free kernel. Schema and checks with readable
// messages are in pydistill/ops/verify.py; here only what memory safety needs.
#include "cpu/verify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"

namespace pd {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

VerifyRows rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows, int64_t vocab) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == rows && x.size(2) == vocab &&
                      (x.stride(2) == 1 || vocab == 1),
                  name, " must be [", batch, ", ", rows, ", ", vocab, "] with unit last stride");
  return {static_cast<const char*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

const double* warpers_of(const Tensor& x, int64_t batch) {
  STD_TORCH_CHECK(
      x.scalar_type() == torch::headeronly::ScalarType::Double && x.is_contiguous() &&
          x.dim() == 2 && (x.size(0) == 1 || x.size(0) == batch) && x.size(1) == 2 * kWarpers,
      "warpers must be contiguous fp64 [1 or ", batch, ", ", 2 * int64_t{kWarpers}, "]");
  return static_cast<const double*>(x.data_ptr());
}

// A number for all requests, or one a request; `step` from one to the next.
const int64_t* each(const char* name, const Tensor& x, int64_t batch, int64_t& step) {
  step = x.numel() == 1 && batch != 1 ? 0 : 1;
  return vector<int64_t>(name, x, step == 0 ? 1 : batch);
}

// Whether the ids of every drafted row are inside the vocabulary, each once; below 0 are empty
// slots.
bool sound_support(const VerifyArgs& a, int64_t batch) {
  std::vector<uint64_t> seen(static_cast<size_t>(a.vocab / 64 + 1));
  for (int64_t b = 0; b < (a.support_request_step == 0 ? 1 : batch); ++b) {
    const int64_t drafted = a.support_row_step == 0 ? 1 : a.num_drafted[b * a.drafted_step];
    for (int64_t i = 0; i < drafted; ++i) {
      const int64_t* ids = a.support + b * a.support_request_step + i * a.support_row_step;
      std::fill(seen.begin(), seen.end(), 0);
      for (int64_t j = 0; j < a.support_size; ++j) {
        if (ids[j] < 0) continue;
        if (ids[j] >= a.vocab) return false;
        uint64_t& word = seen[static_cast<size_t>(ids[j] / 64)];
        const uint64_t bit = uint64_t{1} << (ids[j] % 64);
        if (word & bit) return false;
        word |= bit;
      }
    }
  }
  return true;
}

// Values that pydistill/ops/_verify_call.py explains when this throws.
void check_values(const VerifyArgs& a, int64_t batch) {
  bool good = true;
  const auto inside = [](double x, double low, double high) { return x >= low && x <= high; };
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t drafted = a.num_drafted[b * a.drafted_step];
    good = good && drafted >= 0 && drafted <= a.slots && a.position[b * a.position_step] >= 0;
    const int64_t* ids = a.ids + b * a.slots;
    const int32_t* parent = a.parent == nullptr ? nullptr : a.parent + b * a.parent_step;
    for (int64_t i = 0; i < a.slots; ++i) {
      good = good && ids[i] >= -1 && ids[i] < a.vocab;
      if (parent == nullptr || ids[i] == -1 || i >= drafted) continue;
      good = good && parent[i] >= -1 && parent[i] < i;
    }
    const double* w = a.warpers + b * a.warper_step;
    for (int side = 0; side < 2; ++side, w += kWarpers) {
      good = good && (w[kTemperature] == 0 || inside(w[kTemperature], 1e-30, 1e30)) &&
             inside(w[kTopK], 0, 0x1p53) && w[kTopK] == std::floor(w[kTopK]) &&
             inside(w[kTopP], 1e-30, 1) && w[kLogMinP] <= 0;
    }
  }
  if (good && a.support != nullptr) good = sound_support(a, batch);
  STD_TORCH_CHECK(good,
                  "a value of draft_ids, num_drafted, position, tree, draft_topk_ids or a warper is"
                  " wrong");
}

void spread(int64_t blocks, void (*body)(void*, int64_t, int64_t), void* state) {
  torch::stable::parallel_for(0, blocks, 16,
                              [&](int64_t begin, int64_t end) { body(state, begin, end); });
}

// The target's rows, and what warps both sides' rows.
VerifyArgs target_rows(const Tensor& target, const Tensor& warpers, const MaybeTensor& bias) {
  VerifyArgs a{};
  STD_TORCH_CHECK(target.dim() == 3 && target.size(1) >= 1 && target.size(2) >= 1,
                  "target must be [B, K + 1, V]");
  const int64_t batch = target.size(0), rows = target.size(1);
  a.dtype = dtype_of("target", target);
  a.slots = rows - 1;
  a.vocab = target.size(2);
  a.target = rows_of("target", target, batch, rows, a.vocab);
  a.warpers = warpers_of(warpers, batch);
  a.warper_step = warpers.size(0) == 1 ? 0 : 2 * kWarpers;
  if (bias.has_value()) {
    const bool one = bias->numel() == a.vocab;
    a.bias = vector<float>("logit_bias", *bias, one ? a.vocab : batch * a.vocab);
    a.bias_step = one ? 0 : a.vocab;
  }
  return a;
}

void verify_fwd(Tensor target, MaybeTensor draft, Tensor ids, Tensor num_drafted, Tensor warpers,
                Tensor seed, Tensor position, MaybeTensor bias, MaybeTensor parent,
                MaybeTensor support, int64_t method, int64_t lenience, double strength,
                double alpha, bool check, Tensor tokens, Tensor num_accepted, Tensor logprobs,
                Tensor overlap, Tensor tv, Tensor target_lse, Tensor draft_lse, Tensor flags,
                Tensor path) {
  VerifyArgs a = target_rows(target, warpers, bias);
  const int64_t batch = target.size(0), rows = target.size(1);
  if (draft.has_value()) {
    STD_TORCH_CHECK(draft->scalar_type() == target.scalar_type(), "draft must have target's dtype");
    const bool all = !support.has_value();
    STD_TORCH_CHECK(all || support->dim() == 3, "support must be [B or 1, K or 1, S]");
    a.draft = rows_of("draft", *draft, batch, a.slots, all ? a.vocab : support->size(2));
  }
  if (support.has_value()) {
    STD_TORCH_CHECK(draft.has_value(), "support must come with draft");
    STD_TORCH_CHECK(a.vocab < (int64_t{1} << 31), "support must be of fewer than 2^31 tokens");
    a.support_size = support->size(2);
    const int64_t requests = support->size(0), each_row = support->size(1);
    STD_TORCH_CHECK((requests == 1 || requests == batch) && (each_row == 1 || each_row == a.slots),
                    "support must have one row, or one a request and drafted token");
    a.support = vector<int64_t>("support", *support, requests * each_row * a.support_size);
    a.support_row_step = each_row == a.slots ? a.support_size : 0;
    a.support_request_step = requests == batch ? each_row * a.support_size : 0;
  }
  a.ids = vector<int64_t>("ids", ids, batch * a.slots);
  a.num_drafted = each("num_drafted", num_drafted, batch, a.drafted_step);
  a.position = each("position", position, batch, a.position_step);
  a.seed = each("seed", seed, batch, a.seed_step);
  if (parent.has_value()) {
    const bool one = parent->numel() == a.slots && batch != 1;
    a.parent = vector<int32_t>("parent", *parent, one ? a.slots : batch * a.slots);
    a.parent_step = one ? 0 : a.slots;
  }
  STD_TORCH_CHECK(method >= 0 && method < kVerifyMethods, "method is ", method);
  STD_TORCH_CHECK(lenience >= 0 && lenience < kLeniences, "lenience is ", lenience);
  STD_TORCH_CHECK((method >= kVerifyTargetOnly) == parent.has_value(),
                  "parent must be given for trees, and only there");
  a.method = static_cast<VerifyMethod>(method);
  a.lenience = static_cast<Lenience>(lenience);
  a.strength = strength;
  a.alpha = alpha;
  a.tokens = vector<int64_t>("tokens", tokens, batch * rows);
  a.num_accepted = vector<int64_t>("num_accepted", num_accepted, batch);
  a.logprobs = vector<float>("logprobs", logprobs, batch * rows);
  a.overlap = vector<float>("overlap", overlap, batch * a.slots);
  a.tv = vector<float>("bias", tv, batch * a.slots);
  a.target_lse = vector<float>("target_lse", target_lse, batch * rows);
  a.draft_lse = vector<float>("draft_lse", draft_lse, batch * a.slots);
  a.flags = vector<int32_t>("flags", flags, batch * rows);
  a.path = vector<int64_t>("path", path, batch * a.slots);
  if (check) check_values(a, batch);
  const VerifyRequests kernel = verify_requests_table[static_cast<int>(active_capability())];
  const int64_t bytes = verify_scratch_bytes(a);
  if (batch < 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    const Scratch memory(bytes);
    kernel(a, 0, batch, &spread, memory.data());
    return;
  }
  parallel_rows(batch, rows * a.vocab, [&](int64_t begin, int64_t end) {
    const Scratch memory(bytes);
    kernel(a, begin, end, nullptr, memory.data());
  });
}

// Uninitialised memory on the CPU.
Tensor fresh(std::initializer_list<int64_t> shape, int32_t dtype) {
  const auto dims = static_cast<int64_t>(shape.size());
  const int64_t strides[] = {dims == 2 ? shape.begin()[1] : 1, 1};
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.begin(), strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// verify_fwd into memory of its own.
Results verify_eager(Tensor target, MaybeTensor draft, Tensor ids, Tensor num_drafted,
                     Tensor warpers, Tensor seed, Tensor position, MaybeTensor bias,
                     MaybeTensor parent, MaybeTensor support, int64_t method, int64_t lenience,
                     double strength, double alpha, bool check) {
  STD_TORCH_CHECK(target.dim() == 3 && target.size(1) >= 1, "target must be [B, K + 1, V]");
  const int64_t batch = target.size(0), rows = target.size(1), slots = rows - 1;
  const int32_t whole = aoti_torch_dtype_int64(), single = aoti_torch_dtype_float32();
  Results out{fresh({batch, rows}, whole),   fresh({batch}, whole),
              fresh({batch, rows}, single),  fresh({batch, slots}, single),
              fresh({batch, slots}, single), fresh({batch, rows}, single),
              fresh({batch, slots}, single), fresh({batch, rows}, aoti_torch_dtype_int32()),
              fresh({batch, slots}, whole)};
  std::apply(
      [&](const auto&... x) {
        verify_fwd(target, draft, ids, num_drafted, warpers, seed, position, bias, parent, support,
                   method, lenience, strength, alpha, check, x...);
      },
      out);
  return out;
}

void gradient(const Tensor& target, const Tensor& draft, const Tensor& warpers,
              const MaybeTensor& bias, const Tensor& overlap, const Tensor& flags, int64_t kind,
              double beta, const Tensor& divergence, const Tensor& out) {
  VerifyArgs a = target_rows(target, warpers, bias);
  const int64_t batch = target.size(0), rows = target.size(1);
  STD_TORCH_CHECK(draft.scalar_type() == target.scalar_type(), "draft must have target's dtype");
  a.draft = rows_of("draft", draft, batch, a.slots, a.vocab);
  a.overlap = vector<float>("overlap", overlap, batch * a.slots);
  a.flags = vector<int32_t>("flags", flags, batch * rows);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kTvd), "kind is ", kind);
  VerifyGradient g{};
  g.kind = static_cast<Kind>(kind);
  g.beta = static_cast<float>(beta);
  g.divergence = vector<float>("divergence", divergence, batch * a.slots);
  STD_TORCH_CHECK(out.scalar_type() == target.scalar_type(), "gradient must have target's dtype");
  g.gradient = rows_of("gradient", out, batch, a.slots, a.vocab);
  if (g.gradient.data != a.draft.data) {
    ask_for_huge_pages(out.data_ptr(), out.numel() * out.element_size());
  }
  const VerifyGradientRows kernel =
      verify_gradient_rows_table[static_cast<int>(active_capability())];
  parallel_rows(batch * a.slots, 2 * a.vocab, [&](int64_t begin, int64_t end) {
    const Scratch memory(verify_gradient_bytes(a));
    kernel(a, g, begin, end, memory.data());
  });
}

void verify_gradient(Tensor target, Tensor draft, Tensor warpers, MaybeTensor bias, Tensor overlap,
                     Tensor flags, int64_t kind, double beta, Tensor divergence, Tensor out) {
  gradient(target, draft, warpers, bias, overlap, flags, kind, beta, divergence, out);
}

void verify_gradient_overwrite(Tensor target, Tensor draft, Tensor warpers, MaybeTensor bias,
                               Tensor overlap, Tensor flags, int64_t kind, double beta,
                               Tensor divergence) {
  gradient(target, draft, warpers, bias, overlap, flags, kind, beta, divergence, draft);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("verify_fwd", TORCH_BOX(&verify_fwd));
  m.impl("verify_eager", TORCH_BOX(&verify_eager));
  m.impl("verify_gradient", TORCH_BOX(&verify_gradient));
  m.impl("verify_gradient_overwrite", TORCH_BOX(&verify_gradient_overwrite));
}

}  // namespace pd
