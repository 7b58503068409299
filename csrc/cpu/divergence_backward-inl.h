// Divergence of two rows of logits: backward, and forward and backward at once over the student's
// own memory. A source of its own beside divergence-inl.h, so that two compilers share the kinds;
// both meet in `divergence_keep`, forward of one pair.
#include "cpu/divergence_far-inl.h"
#include "cpu/divergence_terms-inl.h"
#include "cpu/rows-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// clang-format off: each uses those above it
#include "cpu/divergence_kl-inl.h"
#include "cpu/divergence_tokens-inl.h"
#include "cpu/divergence_call-inl.h"
// clang-format on

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

// The gradient of forward_kl from the exponentials that forward kept: two products a token.
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
    divergence_keep_table[PD_TARGET](a, r, saved, scratch);
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
    if (kind == Kind::kForwardKl && up.hard == 0.0f && !std::isnan(saved[kLogZS])) {
      GradRowKept(a, Kept(scratch, a.vocab), saved, up, out);
    } else {
      GradRow<kind>(a, s, t, up, out);
    }
  }
}

}  // namespace

inline void divergence_backward(const DivergenceArgs& a, int64_t begin, int64_t end,
                                float* scratch) {
  PD_FOR_KIND(Backward, a, begin, end, scratch)
}

inline void divergence_overwrite(const DivergenceArgs& a, int64_t begin, int64_t end,
                                 float* scratch) {
  PD_FOR_KIND(Overwrite, a, begin, end, scratch)
}

#undef PD_FOR_KIND

}  // namespace pd::PD_NAMESPACE
