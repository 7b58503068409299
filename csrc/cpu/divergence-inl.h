// Divergence of two rows of logits: forward (loss and what backward needs), backward, and both at
// once over the student's own memory. docs/ops/divergence.md has the maths.
//
// A row pair is read from memory once. Each step is a sweep over blocks of kBlock columns that stay
// in the second-level cache between sweeps, so a sweep costs arithmetic and not bandwidth:
//
//   KlSweep      normalisers and both KLs                     divergence_kl-inl.h
//   ValueSweep   value and centre of the kinds without a KL   divergence_sweeps-inl.h
//   StatsSweep   entropies, acceptance, arg-max agreement     divergence_sweeps-inl.h
//   HeadShare    adaptive_kl's weight                         divergence_head-inl.h
//   GradBlock    the gradient of one block, from the normalisers
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
// clang-format on

inline void Fill(float* x, int n, float value) {
  if (x == nullptr) return;
  for (int i = 0; i < n; ++i) x[i] = value;
}

inline const char* RowAt(const Logits& logits, int64_t row) {
  const int64_t size = logits.dtype == DType::kF32 ? 4 : 2;
  return static_cast<const char*>(logits.data) + row * logits.stride * size;
}

// A pair's parameters; false if they are out of range.
inline bool ReadParams(const DivergenceArgs& a, int64_t pair, float& k, float& t2, Shape& shape) {
  const float* p = a.params == nullptr ? nullptr : a.params + 3 * pair;
  const float temperature = p ? p[0] : a.temperature;
  shape = {p ? p[1] : a.alpha, p ? p[2] : a.beta, 0.0f};
  k = static_cast<float>(1.0 / temperature);
  t2 = a.scale_t2 ? temperature * temperature : 1.0f;
  const auto inside = [](float x) { return x > 0.0f && x < 1.0f; };
  if (!(temperature > 0.0f) || std::isinf(temperature)) return false;
  if (a.kind == Kind::kJsd) return inside(shape.beta);
  if (a.kind == Kind::kSkewForwardKl || a.kind == Kind::kSkewReverseKl) return inside(shape.alpha);
  return std::isfinite(shape.alpha) && std::isfinite(shape.beta);
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

// What backward needs of a pair: gradient = soft * (q h - q c) + hard * softmax(s) - [label]
// one_hot.
struct Upstream {
  Constants at;
  float k, soft, soft_far, centre, hard, one_hot, max_s, inverse_z_1;
  int64_t label;
};

inline Upstream MakeUpstream(const DivergenceArgs& a, int64_t r, const float* saved, float grad) {
  Upstream u;
  float k, t2;
  Shape shape;
  if (!ReadParams(a, r, k, t2, shape)) grad = NAN;
  shape.head = saved[kHead];
  u.at = MakeConstants(k, saved[kMaxS], saved[kLogZS], saved[kMaxT], saved[kLogZT], shape);
  u.k = k;
  u.soft = grad * (1.0f - a.label_weight) * t2 * k;
  u.soft_far = static_cast<float>(u.soft * FarUnit(a.kind, shape, saved[kLogZT]));
  u.centre = saved[kCentre];
  u.max_s = saved[kMaxS];
  u.inverse_z_1 = static_cast<float>(std::exp(-double(saved[kLogZ1])));
  u.label = a.labels ? a.labels[r] : -1;
  u.one_hot = a.labels ? grad * a.label_weight : 0.0f;
  u.hard = u.one_hot + grad * 2.0f * a.z_loss * (saved[kMaxS] + saved[kLogZ1]);
  return u;
}

// put(g, i) for the gradient g of each of `padded` columns from `begin`, which xs and xt read. They
// may be overwritten as they are put.
template <Kind kind, bool kFar, class S, class T, class Put>
PD_INLINE void GradBlock(const Upstream& up, const Row& s_row, const Row& t_row, const S& xs,
                         const T& xt, int64_t begin, int64_t padded, const Put& put) {
  constexpr bool kKl =
      kind == Kind::kForwardKl || kind == Kind::kReverseKl || kind == Kind::kAdaptiveKl;
  const Constants at = up.at;
  const V soft = Set(up.soft), centre = Set(up.centre);
  const V soft_p = soft * at.inverse_z_t, soft_q = soft * at.inverse_z_s;
  const V head = Set(at.shape.head), tail = Set(1.0f - at.shape.head);
  TokenBlock<kind, kFar> tokens;
  if constexpr (!kKl) tokens.Fill(at, xs, xt, padded);
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    s_row.Prefetch(begin + kBlock + i);
    t_row.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const int64_t j = i + u * kLanes;
      const V s = xs(j), t = xt(j);
      V g;
      if constexpr (kind == Kind::kForwardKl) {
        g = ExpNonPositive(at.k * (s - at.max_s)) * soft_q -
            ExpNonPositive(at.k * (t - at.max_t)) * soft_p;
      } else if constexpr (kind == Kind::kReverseKl) {
        g = ExpNonPositive(at.k * (s - at.max_s)) * soft_q * (Neg(at.LogRatio(s, t)) - centre);
      } else if constexpr (kind == Kind::kAdaptiveKl) {
        const V q = at.Q(s);
        g = soft * Fma(head, q - at.P(t), tail * q * (Neg(at.LogRatio(s, t)) - centre));
      } else {
        const auto x = tokens.At(at, s, t, j);
        const V qh = TermOf<kind>(at.shape, x).qh;
        if constexpr (kFar) {
          g = Fnma(x.q, soft_p * centre, Set(up.soft_far) * qh);
        } else {
          g = soft * Fnma(x.Q(), centre, qh);
        }
      }
      if (up.hard != 0.0f) {
        g = Fma(ExpNonPositive(s - Set(up.max_s)) * Set(up.inverse_z_1), Set(up.hard), g);
      }
      put(g, j);
    }
  }
}

// The gradient of one pair, written to `out` (which may be the student's row itself).
template <Kind kind, bool kFar>
void GradRow(const DivergenceArgs& a, Row& s, Row& t, const Upstream& up, char* out) {
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    const bool labelled = up.label >= begin && up.label < begin + n;
    WithColumns(s, t, begin, n, [&](const auto& xs, const auto& xt) PD_INLINE_LAMBDA {
      if constexpr (std::is_same_v<decltype(xs), const Bf16At&>) {
        if (!labelled) {
          uint16_t* to = reinterpret_cast<uint16_t*>(out) + begin;
          const auto put = [&](V g, int64_t i) PD_INLINE_LAMBDA { StoreBf16(g, to + i); };
          return GradBlock<kind, kFar>(up, s, t, xs, xt, begin, padded, put);
        }
      }
      const bool in_place = a.student.dtype == DType::kF32 && n == padded;
      float* to = in_place ? reinterpret_cast<float*>(out) + begin : buffer;
      const auto put = [&](V g, int64_t i) PD_INLINE_LAMBDA { Store(g, to + i); };
      GradBlock<kind, kFar>(up, s, t, xs, xt, begin, padded, put);
      if (labelled) to[up.label - begin] -= up.one_hot;
      StoreBlock(to, n, a.student.dtype, out, begin);
    });
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

template <Kind kind>
void GradRow(const DivergenceArgs& a, Row& s, Row& t, const Upstream& up, char* out) {
  constexpr bool kOwnSweep =
      kind == Kind::kForwardKl || kind == Kind::kReverseKl || kind == Kind::kAdaptiveKl;
  if constexpr (!kOwnSweep) {
    if (up.at.shape.head == 1.0f) return GradRow<kind, true>(a, s, t, up, out);
  }
  GradRow<kind, false>(a, s, t, up, out);
}

// The gradient of forward_kl from the exponentials that ForwardPair kept: two products a token.
void GradRowKept(const DivergenceArgs& a, const Kept& kept, const float* saved, const Upstream& up,
                 char* out) {
  alignas(64) float buffer[kBlock];
  const auto weight = [&](float max, float row_max, float log_z) {
    return Set(static_cast<float>(up.soft * std::exp(double(up.k) * (max - row_max) - log_z)));
  };
  V of_q = Set(0.0f), of_p = Set(0.0f);
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    const bool in_place = a.student.dtype == DType::kF32 && n == padded;
    float* to = in_place ? reinterpret_cast<float*>(out) + begin : buffer;
    // Most blocks share the row's maximum, and with it the weights.
    if (begin == 0 || kept.max_s[begin / kBlock] != kept.max_s[begin / kBlock - 1] ||
        kept.max_t[begin / kBlock] != kept.max_t[begin / kBlock - 1]) {
      of_q = weight(kept.max_s[begin / kBlock], saved[kMaxS], saved[kLogZS]);
      of_p = weight(kept.max_t[begin / kBlock], saved[kMaxT], saved[kLogZT]);
    }
    const auto grad = [&](int64_t i) PD_INLINE_LAMBDA {
      return Load(kept.e_s + begin + i) * of_q - Load(kept.e_t + begin + i) * of_p;
    };
    const bool labelled = up.label >= begin && up.label < begin + n;
    if (a.student.dtype == DType::kBf16 && n == padded && !labelled) {
      uint16_t* narrow = reinterpret_cast<uint16_t*>(out) + begin;
      for (int64_t i = 0; i < padded; i += kLanes) StoreBf16(grad(i), narrow + i);
      continue;
    }
    for (int64_t i = 0; i < padded; i += kLanes) Store(grad(i), to + i);
    if (labelled) to[up.label - begin] -= up.one_hot;
    StoreBlock(to, n, a.student.dtype, out, begin);
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

// The summed gradients of the pairs of one student row, rounded once.
template <Kind kind>
void GradRows(const DivergenceArgs& a, int64_t row, const int64_t* pairs, int64_t count,
              char* out) {
  alignas(64) float buffer[kBlock];
  Row s(RowAt(a.student, row), a.student.dtype);
  for (int64_t begin = 0; begin < a.vocab; begin += kBlock) {
    const int64_t n = a.vocab - begin < kBlock ? a.vocab - begin : kBlock, padded = Padded(n);
    for (int64_t i = 0; i < padded; ++i) buffer[i] = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t r = pairs[j], row_t = a.teacher_rows ? a.teacher_rows[r] : r;
      const float grad = a.grad_rows[r];
      if (grad == 0.0f) continue;
      const bool known = row_t >= 0 && row_t < a.teacher.rows;
      const Upstream up = MakeUpstream(a, r, a.saved + r * kSaved, known ? grad : NAN);
      Row t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
      const Fp32At xs{s.Block(begin, n)}, xt{t.Block(begin, n)};
      const auto add = [&](V g, int64_t i)
                           PD_INLINE_LAMBDA { Store(g + Load(buffer + i), buffer + i); };
      GradBlock<kind, false>(up, s, t, xs, xt, begin, padded, add);
      if (up.label >= begin && up.label < begin + n) buffer[up.label - begin] -= up.one_hot;
    }
    StoreBlock(buffer, n, a.student.dtype, out, begin);
  }
  ZeroColumns(out, a.student.dtype, a.vocab, a.student.width);
}

template <Kind kind>
void Forward(const DivergenceArgs& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; ++r) ForwardPair<kind>(a, r, a.saved + r * kSaved, scratch);
}

template <Kind kind>
void Backward(const DivergenceArgs& a, int64_t begin, int64_t end, float*) {
  const int64_t size = ElementSize(a.student.dtype);
  for (int64_t row = begin; row < end; ++row) {
    char* out = static_cast<char*>(a.grad) + row * a.grad_stride * size;
    const int64_t first = a.row_start ? a.row_start[row] : row;
    const int64_t count = a.row_start ? a.row_start[row + 1] - first : 1;
    const int64_t r = a.pair_of && count ? a.pair_of[first] : first;
    if (count > 1) {
      GradRows<kind>(a, row, a.pair_of + first, count, out);
      continue;
    }
    if (count == 0 || a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
    const bool known = row_t >= 0 && row_t < a.teacher.rows;
    Row s(RowAt(a.student, row), a.student.dtype);
    Row t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
    const float grad = known ? a.grad_rows[r] : NAN;
    GradRow<kind>(a, s, t, MakeUpstream(a, r, a.saved + r * kSaved, grad), out);
  }
}

template <Kind kind>
void Overwrite(const DivergenceArgs& a, int64_t begin, int64_t end, float* scratch) {
  float saved[kSaved];
  for (int64_t r = begin; r < end; ++r) {
    constexpr bool kKeep = kind == Kind::kForwardKl;
    ForwardPair<kind, kKeep>(a, r, saved, scratch);
    const int64_t row = a.student_rows ? a.student_rows[r] : r;
    const int64_t row_t = a.teacher_rows ? a.teacher_rows[r] : r;
    if (row < 0 || row >= a.student.rows) continue;  // flagged by its loss
    char* out = const_cast<char*>(RowAt(a.student, row));
    if (a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    const bool known = row_t >= 0 && row_t < a.teacher.rows;
    Row s(out, a.student.dtype), t(RowAt(a.teacher, known ? row_t : 0), a.teacher.dtype);
    const Upstream up = MakeUpstream(a, r, saved, known ? a.grad_rows[r] : NAN);
    if (kKeep && up.hard == 0.0f && !std::isnan(saved[kLogZS])) {
      GradRowKept(a, Kept(scratch, a.vocab), saved, up, out);
    } else {
      GradRow<kind>(a, s, t, up, out);
    }
  }
}

// Turns the kind into a template argument once a call.
#define PD_FOR_KIND(FUNCTION)                                        \
  switch (a.kind) {                                                  \
    case Kind::kForwardKl:                                           \
      return FUNCTION<Kind::kForwardKl>(a, begin, end, scratch);     \
    case Kind::kReverseKl:                                           \
      return FUNCTION<Kind::kReverseKl>(a, begin, end, scratch);     \
    case Kind::kJsd:                                                 \
      return FUNCTION<Kind::kJsd>(a, begin, end, scratch);           \
    case Kind::kTvd:                                                 \
      return FUNCTION<Kind::kTvd>(a, begin, end, scratch);           \
    case Kind::kSkewForwardKl:                                       \
      return FUNCTION<Kind::kSkewForwardKl>(a, begin, end, scratch); \
    case Kind::kSkewReverseKl:                                       \
      return FUNCTION<Kind::kSkewReverseKl>(a, begin, end, scratch); \
    case Kind::kAlphaBeta:                                           \
      return FUNCTION<Kind::kAlphaBeta>(a, begin, end, scratch);     \
    case Kind::kAdaptiveKl:                                          \
      return FUNCTION<Kind::kAdaptiveKl>(a, begin, end, scratch);    \
    case Kind::kHellinger:                                           \
      return FUNCTION<Kind::kHellinger>(a, begin, end, scratch);     \
    case Kind::kChi2:                                                \
      return FUNCTION<Kind::kChi2>(a, begin, end, scratch);          \
    case Kind::kTodi:                                                \
      return FUNCTION<Kind::kTodi>(a, begin, end, scratch);          \
  }

}  // namespace

inline void divergence_forward(const DivergenceArgs& a, int64_t begin, int64_t end,
                               float* scratch) {
  PD_FOR_KIND(Forward)
}

inline void divergence_backward(const DivergenceArgs& a, int64_t begin, int64_t end,
                                float* scratch) {
  PD_FOR_KIND(Backward)
}

inline void divergence_overwrite(const DivergenceArgs& a, int64_t begin, int64_t end,
                                 float* scratch) {
  PD_FOR_KIND(Overwrite)
}

#undef PD_FOR_KIND

}  // namespace pd::PD_NAMESPACE
