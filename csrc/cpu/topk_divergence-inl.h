// Divergence of a row of student logits from a teacher known on a support S of K tokens, forward,
// backward, and both at once over the student's own memory. docs/ops/topk_divergence.md has the
// maths.
//
// The row is swept once for its exponentials, which stay in scratch. The support's are taken out of
// them, and what is left is summed: the student's tail, exact also where the support holds all but
// 1e-10 of its mass, which 1 - Q would lose. Cells (S, and one for the tail) are few; their terms
// are those of divergence_terms-inl.h. Off S the gradient is one number times q.
#include "cpu/divergence_terms-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/topk_divergence.h"

namespace pd::PD_NAMESPACE {
namespace {

constexpr float kHuge = 1e30f;

struct RowParams {
  float k, t2, beta;  // k = 1 / T
};

// A row's parameters; false if they are out of range.
inline bool ReadParams(const TopkArgs& a, int64_t r, RowParams& p) {
  const float temperature = a.params ? a.params[2 * r] : a.temperature;
  p = {static_cast<float>(1.0 / temperature), a.scale_t2 ? temperature * temperature : 1.0f,
       a.params ? a.params[2 * r + 1] : a.beta};
  if (!(temperature > 0.0f) || std::isinf(temperature)) return false;
  return a.kind != Kind::kJsd || (p.beta > 0.0f && p.beta < 1.0f);
}

inline const char* StudentRow(const TopkArgs& a, int64_t r) {
  return static_cast<const char*>(a.student.data) +
         r * a.student.stride * ElementSize(a.student.dtype);
}

// Scratch: exponentials e [padded V] about a maximum a block, and K + 1 cells, padded.
struct Memory {
  float *e, *max, *s, *log_p;

  Memory(float* scratch, int64_t vocab, int64_t k)
      : e(scratch), max(e + Padded(vocab)), s(max + vocab / kBlock + 1), log_p(s + Padded(k + 1)) {}
};

inline float FiniteOr0(float x) { return x == -INFINITY ? 0.0f : x; }

// A row's maximum and the sum of exp(k (x - max)). `max` may be up to log(kBlock) / k below the
// true one.
struct RowSum {
  float max = -INFINITY;
  double z = 0;
};

// Keeps the exponentials of a block in scratch; returns their sum.
template <class X>
PD_INLINE float KeepBlock(const Row& row, const X& x, int64_t begin, int64_t padded, float k,
                          float max, const Memory& m) {
  const V about = Set(FiniteOr0(max)), scale = Set(k), least = ExpNormal(Set(-87.0f));
  V z[2] = {Set(0), Set(0)};
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    row.Prefetch(begin + kBlock + i);
    for (int u = 0; u < 2; ++u) {
      const V e = ExpLess(scale * (x(i + u * kLanes) - about), least);
      z[u] = z[u] + e;
      Store(e, m.e + begin + i + u * kLanes);
    }
  }
  m.max[begin / kBlock] = FiniteOr0(max);
  return Sum(z[0] + z[1]);
}

// Keeps the row's exponentials in scratch, each block's about the maximum so far.
inline RowSum KeepExps(Row& row, int64_t vocab, float k, const Memory& m) {
  RowSum sum;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    // Whole blocks are read once, about the maximum so far; their sum tells if an element was far
    // above it, where exp loses digits, or not finite.
    if (n == kBlock && row.dtype != DType::kF16 && std::isfinite(sum.max)) {
      const float z =
          row.dtype == DType::kF32
              ? KeepBlock(row, Fp32At{row.At<float>(begin)}, begin, padded, k, sum.max, m)
              : KeepBlock(row, Bf16At{row.At<uint16_t>(begin)}, begin, padded, k, sum.max, m);
      if (z >= 0 && z <= kBlock) {
        sum.z += z;
        continue;
      }
    }
    float top;
    const Fp32At x{row.Block(begin, n, top)};
    if (top > sum.max) {
      sum.z *= sum.max == -INFINITY ? 0.0 : std::exp(double(k) * (sum.max - top));
      sum.max = top;
    }
    sum.z += KeepBlock(row, x, begin, padded, k, sum.max, m);
  }
  return sum;
}

// The factor that brings a block's exponentials to `max`.
inline double Rescale(const Memory& m, int64_t block, float k, float max) {
  return std::exp(double(k) * (double(m.max[block]) - max));
}

// A row's support in scratch, without the empty slots.
struct Support {
  int64_t count = 0;
  double z = 0;  // sum of exp(k (s - max)), in fp64: one token may outweigh the rest of the row
  TopkStatus status = kSound;
};

// Takes the support's exponentials out of the row's, which a negative number marks, and collects
// its logits and the teacher's log-probabilities.
inline Support TakeSupport(const TopkArgs& a, int64_t r, Row& row, float k, float max,
                           const Memory& m) {
  const int64_t* ids = a.ids + r * a.k;
  const float* log_p = a.log_p + r * a.k;
  Support support;
  for (int64_t j = 0; j < a.k; ++j) {
    const int64_t id = ids[j];
    if (id < 0) continue;
    if (id >= a.student.width) return {0, 0, kIdOutOfRange};
    if (m.e[id] == -1.0f) {
      support.status = kIdTwice;
      continue;
    }
    const int64_t block = id / kBlock;
    support.z += m.e[id] * (m.max[block] == max ? 1.0 : Rescale(m, block, k, max));
    m.e[id] = -1.0f;
    m.s[support.count] = row.Element(id);
    m.log_p[support.count++] = log_p[j];
  }
  return support;
}

// log of the mass outside the support: of the sum of exp(k (x - tail_max)) over the unmarked, with
// `tail_max` the row's maximum, or where the exponentials about that have underflowed the tail's
// own.
inline double LogTail(Row& row, int64_t vocab, float k, float max, const Memory& m,
                      float& tail_max) {
  double tail = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock, padded = Padded(n);
    V sum[2] = {Set(0), Set(0)};
    for (int64_t i = 0; i < padded; i += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        sum[u] = sum[u] + Max(Load(m.e + begin + i + u * kLanes), Set(0));
      }
    }
    const float block = Sum(sum[0] + sum[1]);
    if (block > 0) tail += block * Rescale(m, begin / kBlock, k, max);
  }
  if (tail > 1e-25) return std::log(tail);
  RowSum own;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
      const float* x = row.Block(begin, n);
      for (int64_t i = 0; i < n; ++i) {
        if (m.e[begin + i] < 0) continue;
        if (pass == 0) {
          own.max = x[i] > own.max ? x[i] : own.max;
        } else {
          own.z += std::exp(double(k) * (double(x[i]) - own.max));
        }
      }
    }
    if (own.max == -INFINITY) return -INFINITY;
  }
  tail_max = own.max;
  return std::log(own.z);
}

PD_INLINE Tokens TokensOf(V log_p, V log_q) {
  const V d = Min(Set(kHuge), Max(log_p - log_q, Set(-kHuge))), a = Abs(d);
  const M teacher_larger = Le(Set(0.0f), d);
  V e;
  const V ratio = ExpNonPositive(Neg(a), e);
  return {log_p, log_q, d, a, teacher_larger, Exp(Select(teacher_larger, log_p, log_q)), ratio, e};
}

// A cell's share of D and of sum q h. The terms are Bregman's, -p + q or its mirror included, which
// cancel where both sides are distributions; truncated sums take them back.
template <Kind kind>
PD_INLINE Term CellTerm(const Shape& shape, const Tokens& t, bool truncated) {
  [[maybe_unused]] const V p = t.P(), q = t.Q();
  if constexpr (kind == Kind::kForwardKl) {
    const V gap = Select(t.teacher_larger, Neg(t.larger * t.e), t.larger * t.e);  // p - q
    const V value = WeightedPhi(p, t.d, q);
    return truncated ? Term{value + gap, Neg(p)} : Term{value, Neg(gap)};
  } else if constexpr (kind == Kind::kReverseKl) {
    const V gap = Select(t.teacher_larger, t.larger * t.e, Neg(t.larger * t.e));  // q - p
    const V value = WeightedPhi(q, Neg(t.d), p), qh = Neg(q * t.d);
    return truncated ? Term{value + gap, qh + q} : Term{value, qh};
  } else {
    return TermOf<kind>(shape, t);
  }
}

// q (h - c) of the tail's cell, with the constants of CellTerm. Where q is next to nothing, h may
// be beyond fp64, and q h is not.
template <Kind kind>
double TailSlope(double log_p, double log_q, double centre, double beta) {
  const double d = log_p - log_q, q = std::exp(log_q);
  if (kind == Kind::kForwardKl) {
    return d > 30 ? q - std::exp(log_p) - q * centre : q * (-std::expm1(d) - centre);
  }
  if (q == 0) return 0;
  if (kind == Kind::kReverseKl) return q * (-d - centre);
  if (kind == Kind::kJsd) {
    const double ratio = d > 700 ? d + std::log(beta) : std::log1p(beta * std::expm1(d));
    return q * ((1 - beta) * -ratio - centre);
  }
  return q * ((d > 0 ? -0.5 : (d < 0 ? 0.5 : 0.0)) - centre);
}

// c = sum q h over the cells, of which q and q h are in scratch, and one of h = 0 if `outside` is
// its -q. Taken about h of the likeliest cell: on a peaked row h - c of that cell is next to
// nothing, and a plain sum of c would drown it.
inline double Centre(const Memory& m, int64_t cells, double outside) {
  const float *q = m.s, *qh = m.log_p;
  int64_t top = 0;
  for (int64_t j = 1; j < cells; ++j) top = q[j] > q[top] ? j : top;
  if (cells == 0 || !(q[top] > 0) || q[top] < 0.5f) {
    double sum = 0;
    for (int64_t j = 0; j < cells; ++j) sum += qh[j];
    return sum;
  }
  const double h = double(qh[top]) / q[top];
  double sum = outside * h;
  for (int64_t j = 0; j < cells; ++j) sum += qh[j] - q[j] * h;
  return h + sum;
}

// What forward finds of a row. log q = k (s - max) - log_q_scale on the support; the gradient is
// outside_slope exp(k (s - outside_max)) outside it.
struct Found {
  float max, outside_max;
  double log_q_scale, value, centre, outside_slope;
};

template <Kind kind>
TopkStatus ForwardRow(const TopkArgs& a, int64_t r, Row& row, const RowParams& p, const Memory& m,
                      Found& found) {
  const int64_t vocab = a.student.width;
  const RowSum sum = KeepExps(row, vocab, p.k, m);
  found.value = NAN;
  const Support taken = TakeSupport(a, r, row, p.k, sum.max, m);
  if (taken.status != kSound) return taken.status;
  if (!(sum.z > 0) || !std::isfinite(sum.z)) return kSound;
  found.max = found.outside_max = sum.max;
  found.log_q_scale = std::log(sum.z);
  const int64_t support = taken.count;
  int64_t cells = support;
  double log_q_tail = -INFINITY, log_p_tail = -INFINITY, log_outside = -INFINITY;
  double log_sum = -INFINITY;  // outside the support, of the exponentials that backward takes there
  if (a.mode == TailMode::kSupportOnly) {
    float top = -INFINITY;
    for (int64_t j = 0; j < support; ++j) top = m.s[j] > top ? m.s[j] : top;
    double z = 0;
    for (int64_t j = 0; j < support; ++j) z += std::exp(double(p.k) * (double(m.s[j]) - top));
    found.log_q_scale = std::log(z) + double(p.k) * (double(top) - sum.max);
    if (!std::isfinite(found.log_q_scale)) return kSound;  // nothing to normalise
  } else if (support < vocab) {
    // Where the tail is half of the row or more, subtracting loses nothing. A peaked row's own sum
    // has lost its small terms in fp32: the normaliser is made of the two parts.
    const bool plain = taken.z <= 0.5 * sum.z;
    log_sum =
        plain ? std::log(sum.z - taken.z) : LogTail(row, vocab, p.k, sum.max, m, found.outside_max);
    const double log_tail = log_sum + double(p.k) * (double(found.outside_max) - found.max);
    found.log_q_scale = std::log(taken.z + std::exp(log_tail));
    log_outside = log_tail - found.log_q_scale;
    if (a.mode == TailMode::kWithTail) {
      log_q_tail = log_outside;
      log_p_tail = a.log_tail == nullptr ? -INFINITY : a.log_tail[r];
      m.log_p[cells] = static_cast<float>(log_p_tail);
      m.s[cells++] = static_cast<float>(log_q_tail);
    }
  }
  // As backward will: where p and q all but agree, tvd's sign must come out the same.
  found.log_q_scale = static_cast<float>(found.log_q_scale);
  for (int64_t j = 0; j < support; ++j) {
    const double log_q = double(p.k) * (double(m.s[j]) - sum.max) - found.log_q_scale;
    m.s[j] = static_cast<float>(log_q);
  }
  const int64_t padded = Padded(cells);
  for (int64_t j = cells; j < padded; ++j) m.s[j] = m.log_p[j] = -INFINITY;

  const Shape shape{0.0f, p.beta, 0.0f};
  const bool truncated = a.mode == TailMode::kTruncated;
  double value = 0;
  unsigned infinite = 0;
  const V none = Set(-INFINITY), zero = Set(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const V log_p = Load(m.log_p + i), log_q = Load(m.s + i);
    const Tokens t = TokensOf(log_p, log_q);
    const Term term = CellTerm<kind>(shape, t, truncated);
    value += Sum(term.value);
    if (kind == Kind::kForwardKl) infinite |= Bits(And(Eq(log_q, none), Lt(zero, t.P())));
    if (kind == Kind::kReverseKl) infinite |= Bits(And(Eq(log_p, none), Lt(zero, t.Q())));
    if (std::isnan(Sum(log_p))) value = NAN;
    Store(t.Q(), m.s + i);
    Store(term.qh, m.log_p + i);
  }
  found.value = value;
  found.centre = Centre(m, cells, truncated ? -std::exp(log_outside) : 0.0);
  found.outside_slope = 0;
  if (infinite) {
    found.value = std::isnan(value) ? NAN : INFINITY;
    found.centre = found.outside_slope = NAN;
  } else if (log_outside > -INFINITY) {
    const double slope = truncated ? -std::exp(log_outside) * found.centre
                                   : TailSlope<kind>(log_p_tail, log_q_tail, found.centre, p.beta);
    found.outside_slope = slope * std::exp(-log_sum);
  }
  return kSound;
}

inline void Save(const TopkArgs& a, int64_t r, const RowParams& p, const Found& found,
                 TopkStatus status) {
  float* saved = a.saved + r * kTopkSaved;
  const bool sound = !std::isnan(found.value);
  a.loss[r] = sound ? static_cast<float>(found.value * p.t2) : NAN;
  saved[kTopkMaxS] = sound ? found.max : NAN;
  saved[kTopkOutsideMax] = sound ? found.outside_max : NAN;
  saved[kTopkLogQScale] = sound ? static_cast<float>(found.log_q_scale) : NAN;
  saved[kTopkCentre] = sound ? static_cast<float>(found.centre) : NAN;
  saved[kTopkCentreLow] = sound ? static_cast<float>(found.centre - saved[kTopkCentre]) : NAN;
  saved[kTopkOutsideSlope] = sound ? static_cast<float>(found.outside_slope) : NAN;
  saved[kTopkStatus] = static_cast<float>(status);
}

template <Kind kind>
TopkStatus ForwardAndSave(const TopkArgs& a, int64_t r, Row& row, RowParams& p, const Memory& m,
                          Found& found) {
  found = {NAN, NAN, NAN, NAN, NAN, NAN};
  const bool valid = ReadParams(a, r, p);
  const TopkStatus status = valid ? ForwardRow<kind>(a, r, row, p, m, found) : kSound;
  Save(a, r, p, found, status);
  return status;
}

// The gradient on the support, over what the sweep has written there. `s` are the logits, read
// before an overwriting sweep.
template <Kind kind>
void FixSupport(const TopkArgs& a, int64_t r, const RowParams& p, const float* saved, float soft,
                const float* s, char* out) {
  const int64_t* ids = a.ids + r * a.k;
  const float* log_p = a.log_p + r * a.k;
  const Shape shape{0.0f, p.beta, 0.0f};
  const double centre = double(saved[kTopkCentre]) + saved[kTopkCentreLow];
  alignas(64) float lp[kLanes], lq[kLanes], q[kLanes], g[kLanes];
  int64_t at[kLanes];
  const int64_t size = ElementSize(a.student.dtype);
  int filled = 0;
  const auto flush = [&] {
    for (int i = filled; i < kLanes; ++i) lp[i] = lq[i] = -INFINITY;
    const Tokens t = TokensOf(Load(lp), Load(lq));
    const Term term = CellTerm<kind>(shape, t, a.mode == TailMode::kTruncated);
    Store(t.Q(), q);
    Store(term.qh, g);
    for (int i = 0; i < filled; ++i) g[i] = static_cast<float>(soft * (g[i] - q[i] * centre));
    char rounded[4 * kLanes];
    StoreBlock(g, kLanes, a.student.dtype, rounded, 0);
    for (int i = 0; i < filled; ++i) {
      std::memcpy(out + at[i] * size, rounded + i * size, static_cast<size_t>(size));
    }
    filled = 0;
  };
  for (int64_t j = 0, slot = 0; j < a.k; ++j) {
    if (ids[j] < 0) continue;
    if (ids[j] >= a.student.width) return;  // flagged: the row is NaN
    const double x = double(p.k) * (double(s[slot++]) - saved[kTopkMaxS]);
    lp[filled] = log_p[j];
    lq[filled] = static_cast<float>(x - saved[kTopkLogQScale]);
    at[filled++] = ids[j];
    if (filled == kLanes) flush();
  }
  if (filled) flush();
}

inline void CollectSupport(const TopkArgs& a, int64_t r, Row& row, float* s) {
  const int64_t* ids = a.ids + r * a.k;
  for (int64_t j = 0, slot = 0; j < a.k; ++j) {
    if (ids[j] < 0) continue;
    s[slot++] = ids[j] < a.student.width ? row.Element(ids[j]) : 0.0f;
  }
}

// c exp(k (s - max)) over the whole row, from the logits. `max` is that of the tokens outside the
// support; what comes out on the support FixSupport writes over.
inline void ScaledExps(const TopkArgs& a, Row& row, float k, float max, float c, char* out) {
  alignas(64) float buffer[kBlock];
  const V scale = Set(k), about = Set(max), factor = Set(c), least = ExpNormal(Set(-87.0f));
  for (int64_t begin = 0; begin < a.student.width; begin += kBlock) {
    const int64_t n = a.student.width - begin < kBlock ? a.student.width - begin : kBlock;
    WithColumns(row, row, begin, n, [&](const auto& x, const auto&) PD_INLINE_LAMBDA {
      for (int64_t i = 0; i < Padded(n); i += 2 * kLanes) {
        row.Prefetch(begin + kBlock + i);
        for (int u = 0; u < 2; ++u) {
          const int64_t j = i + u * kLanes;
          Store(ExpLess(scale * (x(j) - about), least) * factor, buffer + j);
        }
      }
    });
    StoreBlock(buffer, n, a.student.dtype, out, begin);
  }
}

// The same from the exponentials that forward kept, marks included.
inline void ScaledKept(const TopkArgs& a, const Memory& m, float k, float max, double c,
                       char* out) {
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < a.student.width; begin += kBlock) {
    const int64_t n = a.student.width - begin < kBlock ? a.student.width - begin : kBlock;
    const V factor = Set(static_cast<float>(c * Rescale(m, begin / kBlock, k, max)));
    if (a.student.dtype == DType::kBf16 && n == Padded(n) && std::isfinite(c)) {
      uint16_t* narrow = reinterpret_cast<uint16_t*>(out) + begin;
      for (int64_t i = 0; i < n; i += 2 * kLanes) {
        const float* e = m.e + begin + i;
        StoreBf16(Load(e) * factor, Load(e + kLanes) * factor, narrow + i);
      }
      continue;
    }
    for (int64_t i = 0; i < Padded(n); i += kLanes) {
      Store(Load(m.e + begin + i) * factor, buffer + i);
    }
    StoreBlock(buffer, n, a.student.dtype, out, begin);
  }
}

inline void FillRow(float x, const TopkArgs& a, char* out) {
  alignas(64) float buffer[kBlock];
  for (float& value : buffer) value = x;
  for (int64_t begin = 0; begin < a.student.width; begin += kBlock) {
    const int64_t n = a.student.width - begin < kBlock ? a.student.width - begin : kBlock;
    StoreBlock(buffer, n, a.student.dtype, out, begin);
  }
}

template <Kind kind>
void Forward(const TopkArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Memory m(scratch, a.student.width, a.k);
  for (int64_t r = begin; r < end; ++r) {
    if (a.counted != nullptr && !a.counted[r]) {
      a.loss[r] = 0.0f;
      for (int i = 0; i < kTopkSaved; ++i) a.saved[r * kTopkSaved + i] = 0.0f;
      continue;
    }
    Row row(StudentRow(a, r), a.student.dtype);
    RowParams p;
    Found found;
    ForwardAndSave<kind>(a, r, row, p, m, found);
  }
}

template <Kind kind>
void Backward(const TopkArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Memory m(scratch, a.student.width, a.k);
  for (int64_t r = begin; r < end; ++r) {
    char* out = static_cast<char*>(a.grad) + r * a.grad_stride * ElementSize(a.student.dtype);
    if (a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    const float* saved = a.saved + r * kTopkSaved;
    RowParams p;
    if (!ReadParams(a, r, p) || std::isnan(saved[kTopkCentre])) {
      FillRow(NAN, a, out);
      continue;
    }
    Row row(StudentRow(a, r), a.student.dtype);
    const float soft = a.grad_rows[r] * p.t2 * p.k;
    CollectSupport(a, r, row, m.s);
    if (saved[kTopkOutsideSlope] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
    } else {
      ScaledExps(a, row, p.k, saved[kTopkOutsideMax], soft * saved[kTopkOutsideSlope], out);
    }
    FixSupport<kind>(a, r, p, saved, soft, m.s, out);
  }
}

template <Kind kind>
void Overwrite(const TopkArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Memory m(scratch, a.student.width, a.k);
  for (int64_t r = begin; r < end; ++r) {
    char* out = const_cast<char*>(StudentRow(a, r));
    float* saved = a.saved + r * kTopkSaved;
    if (a.counted != nullptr && !a.counted[r]) {
      a.loss[r] = 0.0f;
      for (int i = 0; i < kTopkSaved; ++i) saved[i] = 0.0f;
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    Row row(out, a.student.dtype);
    RowParams p;
    Found found;
    ForwardAndSave<kind>(a, r, row, p, m, found);
    if (a.grad_rows[r] == 0.0f) {
      ZeroColumns(out, a.student.dtype, 0, a.student.width);
      continue;
    }
    if (std::isnan(saved[kTopkCentre])) {
      FillRow(NAN, a, out);
      continue;
    }
    const float soft = a.grad_rows[r] * p.t2 * p.k;
    CollectSupport(a, r, row, m.s);
    if (found.outside_max == found.max) {
      ScaledKept(a, m, p.k, found.max, soft * found.outside_slope, out);
    } else {  // those that forward kept have underflowed
      const double c = soft * found.outside_slope;
      ScaledExps(a, row, p.k, found.outside_max, static_cast<float>(c), out);
    }
    FixSupport<kind>(a, r, p, saved, soft, m.s, out);
  }
}

// Turns the kind into a template argument once a call.
#define PD_FOR_TOPK_KIND(FUNCTION)                               \
  switch (a.kind) {                                              \
    case Kind::kForwardKl:                                       \
      return FUNCTION<Kind::kForwardKl>(a, begin, end, scratch); \
    case Kind::kReverseKl:                                       \
      return FUNCTION<Kind::kReverseKl>(a, begin, end, scratch); \
    case Kind::kJsd:                                             \
      return FUNCTION<Kind::kJsd>(a, begin, end, scratch);       \
    default:                                                     \
      return FUNCTION<Kind::kTvd>(a, begin, end, scratch);       \
  }

}  // namespace

inline void topk_divergence_forward(const TopkArgs& a, int64_t begin, int64_t end, float* scratch) {
  PD_FOR_TOPK_KIND(Forward)
}

inline void topk_divergence_backward(const TopkArgs& a, int64_t begin, int64_t end,
                                     float* scratch) {
  PD_FOR_TOPK_KIND(Backward)
}

inline void topk_divergence_overwrite(const TopkArgs& a, int64_t begin, int64_t end,
                                      float* scratch) {
  PD_FOR_TOPK_KIND(Overwrite)
}

#undef PD_FOR_TOPK_KIND

}  // namespace pd::PD_NAMESPACE
