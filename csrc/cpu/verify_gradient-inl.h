// The divergence of each verified pair of rows, and its gradient with respect to the draft's
// logits. docs/ops/verify.md has the definition.
//
// The maths of a pair is divergence-inl.h's, over the memory of the gradient: what is here makes
// its two rows. As they lie, where nothing but one temperature is asked; else the target's as fp32
// in scratch, brought to the draft's temperature, and -inf on both sides where a filter cut.
#include "cpu/divergence.h"
#include "cpu/verify_warp-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

inline Place PlaceAt(const VerifyArgs& a, const VerifyRows& rows, int64_t request, int64_t row,
                     const float* bias) {
  const int64_t at = request * rows.request_stride + row * rows.row_stride;
  return {rows.data + at * ElementSize(a.dtype), a.dtype, bias, a.vocab};
}

inline bool Filters(const double* warpers, int64_t vocab) {
  const double k = warpers[kTopK];
  return (k > 0 && k < double(vocab)) || warpers[kTopP] < 1 || warpers[kLogMinP] > -INFINITY;
}

class GradientRow {
 public:
  GradientRow(const VerifyArgs& a, const VerifyGradient& g, int64_t index, float* scratch)
      : a_(a), g_(g), index_(index), request_(index / a.slots), slot_(index % a.slots) {
    const int64_t blocks = verify_blocks(a);
    warped_ = scratch, scratch += blocks * kBlock;
    auto* numbers = reinterpret_cast<double*>(scratch);
    search_.counts = numbers, numbers += kVerifyPivots * blocks;
    search_.masses = numbers, numbers += kVerifyPivots * blocks;
    masses_ = numbers, numbers += (blocks + 7) / 8 * 8;
    search_.candidates = reinterpret_cast<float*>(numbers);
    divergence_ = search_.candidates + kVerifyCandidates + kVerifyColumns;
  }

  void Run() {
    const double* warpers = a_.warpers + request_ * a_.warper_step;
    const double t = warpers[kTemperature], t_draft = warpers[kWarpers + kTemperature];
    const int32_t flags = a_.flags[request_ * (a_.slots + 1) + slot_];
    const bool wrong = (flags & (kBadTarget | kBadDraft)) != 0;
    g_.divergence[index_] = NAN;
    if (wrong || std::isnan(a_.overlap[index_]) || t == 0 || t_draft == 0) {
      return Fill(wrong ? NAN : 0.0f);
    }
    const float* bias = a_.bias == nullptr ? nullptr : a_.bias + request_ * a_.bias_step;
    Place target = PlaceAt(a_, a_.target, request_, slot_, bias);
    const bool cut = Filters(warpers, a_.vocab);
    const bool made = cut || bias != nullptr || t != t_draft;
    if (made) {
      const Warped w = Warp(target, warpers, nullptr, masses_, search_);
      Bring(w, t_draft / t);
    }
    CopyDraft(warpers + kWarpers);
    const float one = 1.0f;
    DivergenceArgs d{};
    d.student = {Out(), a_.dtype, 1, a_.vocab, a_.vocab};
    d.teacher = {made ? static_cast<const void*>(warped_) : target.data,
                 made ? DType::kF32 : a_.dtype, 1, a_.vocab, a_.vocab};
    d.pairs = 1;
    d.kind = g_.kind;
    d.temperature = static_cast<float>(t_draft);
    d.alpha = d.beta = g_.beta;
    d.vocab = a_.vocab;
    d.loss = g_.divergence + index_;
    d.grad_rows = &one;
    divergence_overwrite_table[PD_TARGET](d, 0, 1, divergence_);
  }

 private:
  char* Out() const {
    const int64_t at = request_ * g_.gradient.request_stride + slot_ * g_.gradient.row_stride;
    return const_cast<char*>(g_.gradient.data) + at * ElementSize(a_.dtype);
  }

  void Fill(float value) const {
    alignas(64) float block[kBlock];
    std::fill(block, block + kBlock, value);
    for (int64_t begin = 0; begin < a_.vocab; begin += kBlock) {
      StoreBlock(block, std::min(kBlock, a_.vocab - begin), a_.dtype, Out(), begin);
    }
  }

  // The target's row at the draft's temperature.
  void Bring(const Warped& w, double ratio) {
    Reader reader(w.place);
    const auto scale = static_cast<float>(ratio);
    for (int64_t b = 0; b < w.place.Blocks(); ++b) {
      const float* x = reader.Block(b);
      float* out = warped_ + b * kBlock;
      for (int64_t i = 0; i < reader.Columns(b); ++i) {
        out[i] = x[i] >= w.cut ? (x[i] - w.max) * scale : -INFINITY;
      }
    }
  }

  // The draft's row to the gradient's memory, -inf where a filter cut.
  void CopyDraft(const double* warpers) {
    const Place place = PlaceAt(a_, a_.draft, request_, slot_, nullptr);
    if (!Filters(warpers, a_.vocab)) {
      const auto size = static_cast<size_t>(a_.vocab * ElementSize(a_.dtype));
      if (place.data != Out()) std::memcpy(Out(), place.data, size);
      return;
    }
    const Warped w = Warp(place, warpers, nullptr, masses_, search_);
    Reader reader(place);
    alignas(64) float block[kBlock];
    for (int64_t b = 0; b < place.Blocks(); ++b) {
      const float* x = reader.Block(b);
      for (int64_t i = 0; i < reader.Columns(b); ++i) block[i] = x[i] >= w.cut ? x[i] : -INFINITY;
      StoreBlock(block, reader.Columns(b), a_.dtype, Out(), b * kBlock);
    }
  }

  const VerifyArgs& a_;
  const VerifyGradient& g_;
  int64_t index_, request_, slot_;
  float *warped_, *divergence_;
  double* masses_;
  Search search_;
};

}  // namespace

void verify_gradient_rows(const VerifyArgs& a, const VerifyGradient& g, int64_t begin, int64_t end,
                          float* scratch) {
  for (int64_t i = begin; i < end; ++i) GradientRow(a, g, i, scratch).Run();
}

}  // namespace pd::PD_NAMESPACE
