// Divergence of two rows of logits, forward: loss, and what backward needs
// (divergence_backward-inl.h). docs/ops/divergence.md has the maths.
//
// A row pair is read from memory once. Each step is a sweep over blocks of kBlock columns that stay
// in the second-level cache between sweeps, so a sweep costs arithmetic and not bandwidth:
//
//   KlSweep      normalisers and both KLs                     divergence_kl-inl.h
//   ValueSweep   value and centre of the kinds without a KL   divergence_sweeps-inl.h
//   StatsSweep   entropies, acceptance, arg-max agreement     divergence_sweeps-inl.h
//   HeadShare    adaptive_kl's weight                         divergence_head-inl.h
//   GradBlock    the gradient of one block, from the          divergence_backward-inl.h
//                normalisers
//
// What one token adds is in divergence_terms-inl.h, and for rows far from agreement, where shorter
// formulas are as exact, in divergence_far-inl.h; divergence_tokens-inl.h makes either's tokens.
// Sums are fp32 within a block and fp64 across blocks.
#include "cpu/divergence_far-inl.h"
#include "cpu/divergence_terms-inl.h"
#include "cpu/rows-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// clang-format off: each uses those above it
#include "cpu/divergence_kl-inl.h"
#include "cpu/divergence_tokens-inl.h"
#include "cpu/divergence_sweeps-inl.h"
#include "cpu/divergence_head-inl.h"
#include "cpu/divergence_call-inl.h"
// clang-format on

inline void Fill(float* x, int n, float value) {
  if (x == nullptr) return;
  for (int i = 0; i < n; ++i) x[i] = value;
}

inline bool Infinite(Kind kind, const Pair& pair, const Shape& shape) {
  const float a = shape.alpha, b = shape.beta, s = a + b;
  switch (kind) {
    case Kind::kForwardKl:
    case Kind::kChi2:
      return pair.NoQ();
    case Kind::kReverseKl:
      return pair.NoP();
    case Kind::kAdaptiveKl:
    case Kind::kTodi:
      return pair.NoQ() || pair.NoP();
    case Kind::kAlphaBeta:
      return (pair.NoQ() && (b <= 0 || s <= 0)) || (pair.NoP() && (a <= 0 || s <= 0));
    default:
      return false;
  }
}

// One pair: `saved` is always written. With `kKeep` (forward_kl) the exponentials stay in
// `scratch`.
template <Kind kind, bool kKeep = false>
void ForwardPair(const DivergenceArgs& a, int64_t r, float* saved, float* scratch) {
  float* stats = a.stats == nullptr ? nullptr : a.stats + r * kStats;
  if (a.counted != nullptr && !a.counted[r]) {
    a.loss[r] = 0.0f;
    Fill(saved, kSaved, 0.0f);
    Fill(stats, kStats, NAN);
    return;
  }
  a.loss[r] = NAN;
  Fill(saved, kSaved, NAN);
  Fill(stats, kStats, NAN);
  const int64_t row_s = a.student_rows ? a.student_rows[r] : r;
  const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
  const int64_t label = a.labels ? a.labels[r] : 0;
  float t2;
  Shape shape;
  Pair pair{};
  if (row_s < 0 || row_s >= a.student.rows || row_t < 0 || row_t >= a.teacher.rows || label < 0 ||
      label >= a.vocab || !ReadParams(a, r, pair.k, t2, shape)) {
    return;
  }
  Row s(RowAt(a.student, row_s), a.student.dtype), t(RowAt(a.teacher, row_t), a.teacher.dtype);
  constexpr bool kHead = kind == Kind::kAdaptiveKl;
  constexpr bool kPq = kind == Kind::kForwardKl || kind == Kind::kAdaptiveKl;
  constexpr bool kQp = kind == Kind::kReverseKl || kind == Kind::kAdaptiveKl;
  // The arg-max and a normaliser at another temperature hang on the maximum itself.
  pair.true_max = stats != nullptr || a.labels != nullptr || a.z_loss != 0.0f;
  bool far = false;
  if constexpr (kKeep || kHead) {
    Kl<kPq, kQp, true>(s, t, a.vocab, pair, Kept(scratch, a.vocab));
  } else if constexpr (kPq || kQp) {
    Kl<kPq, kQp>(s, t, a.vocab, pair);
  } else {
    far = Normalise(s, t, a.vocab, pair) && HasFarTerms(kind, shape);
  }
  if (!pair.Defined()) return;

  const double log_z_s = std::log(pair.z_s), log_z_t = std::log(pair.z_t);
  const Constants at = MakeConstants(pair.k, pair.max_s, log_z_s, pair.max_t, log_z_t, shape);
  double value, centre = 0, head = 0;
  if constexpr (kind == Kind::kForwardKl) {
    value = pair.kl_pq;
  } else if constexpr (kind == Kind::kReverseKl) {
    value = centre = pair.kl_qp;
  } else if constexpr (kind == Kind::kAdaptiveKl) {
    head = HeadShare(s, t, a.vocab, pair, at, Kept(scratch, a.vocab));
    value = head * pair.kl_pq + (1 - head) * pair.kl_qp;
    centre = pair.kl_qp;
  } else {
    if (far) {
      ValueSweep<kind, true>(s, t, a.vocab, at, log_z_t, value, centre);
      far = value >= SmallestFarValue(kind, shape);
    }
    if (!far) ValueSweep<kind, false>(s, t, a.vocab, at, log_z_t, value, centre);
    head = far ? 1 : 0;
  }
  if (Infinite(kind, pair, shape)) {
    value = INFINITY;
    centre = NAN;
  }

  double loss = value * t2, log_z_1 = 0;
  if (a.labels != nullptr || a.z_loss != 0.0f) {
    log_z_1 = pair.k == 1.0f ? log_z_s : LogZ1(s, a.vocab, pair.max_s);
    const double lse = double(pair.max_s) + log_z_1;
    double hard = 0;
    if (a.labels != nullptr) {
      const int64_t begin = label / kBlock * kBlock;
      const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock;
      hard = log_z_1 - (double(s.Block(begin, n)[label - begin]) - pair.max_s);
    }
    loss = (1 - double(a.label_weight)) * loss + a.label_weight * hard + a.z_loss * lse * lse;
  }
  a.loss[r] = static_cast<float>(loss);
  const double kept[kSaved] = {pair.max_s, log_z_s, pair.max_t, log_z_t,
                               value,      centre,  log_z_1,    head};
  for (int i = 0; i < kSaved; ++i) saved[i] = static_cast<float>(kept[i]);
  if (stats != nullptr) {
    stats[kLseS] = static_cast<float>(double(pair.k) * pair.max_s + log_z_s);
    stats[kLseT] = static_cast<float>(double(pair.k) * pair.max_t + log_z_t);
    StatsSweep(s, t, a.vocab, at, stats);
  }
}

template <Kind kind>
void Forward(const DivergenceArgs& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; ++r) ForwardPair<kind>(a, r, a.saved + r * kSaved, scratch);
}

template <Kind kind>
void Keep(const DivergenceArgs& a, int64_t pair, float* saved, float* scratch) {
  ForwardPair<kind, kind == Kind::kForwardKl>(a, pair, saved, scratch);
}

}  // namespace

inline void divergence_forward(const DivergenceArgs& a, int64_t begin, int64_t end,
                               float* scratch) {
  PD_FOR_KIND(Forward, a, begin, end, scratch)
}

inline void divergence_keep(const DivergenceArgs& a, int64_t pair, float* saved, float* scratch) {
  PD_FOR_KIND(Keep, a, pair, saved, scratch)
}

#undef PD_FOR_KIND

}  // namespace pd::PD_NAMESPACE
