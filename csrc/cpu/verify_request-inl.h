// What the verification of a request is made of: coins, the comparison of two rows, and the draw of
// a token from p or from what is left of it.
//
// A comparison is one pass over both rows in cache that sums min(p, q) and the residual, block by
// block. So sampling has no pass of its own: the sums of the blocks are walked, and one block is
// opened. Odds are fp64; only sums of whole blocks are fp32.
#if defined(PD_VERIFY_REQUEST_INL_H) == defined(PD_TOGGLE)
#ifdef PD_VERIFY_REQUEST_INL_H
#undef PD_VERIFY_REQUEST_INL_H
#else
#define PD_VERIFY_REQUEST_INL_H
#endif

#include "cpu/verify_warp-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// A uniform number in [0, 1) by Philox4x32-10.
inline double Coin(int64_t seed, int64_t position, int64_t slot, VerifyStream stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                   static_cast<uint32_t>(slot), static_cast<uint32_t>(stream)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t{0xD2511F53} * c[0], y = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(y >> 32) ^ c[1] ^ k0;
    c[2] = static_cast<uint32_t>(x >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(y), c[3] = static_cast<uint32_t>(x);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return double((uint64_t{c[0] >> 5} << 26) + (c[1] >> 6)) * 0x1p-53;
}

// A slot that was read. The residual is [scale p - q]+.
struct Slot {
  Warped p, q;
  double* residual;  // its mass in each block; unused where p is a point
  double scale = 1, px = 0, qx = 0, overlap = 0, rest = 0, bias = 0;
  const int64_t* tried = nullptr;  // further tokens that the residual is without
  int64_t tried_count = 0;
  bool exact = false;  // see Refine
};
static_assert(sizeof(Slot) <= kVerifySlotBytes && std::is_trivially_destructible_v<Slot>);

// p and q of two rows, and their residual.
struct Pair {
  explicit Pair(const Slot& s)
      : p(s.p),
        q(s.q),
        by_p(Set(static_cast<float>(1 / s.p.total))),
        by_q(Set(static_cast<float>(1 / s.q.total))),
        scale(Set(static_cast<float>(s.scale))) {}
  PD_INLINE V P(V x) const { return p(x) * by_p; }
  PD_INLINE V Q(V x) const { return q(x) * by_q; }
  PD_INLINE V Residual(V px, V qx) const { return Max(scale * px - qx, Set(0.0f)); }
  WeightAt p, q;
  V by_p, by_q, scale;
};

// min(p, q) and the residual of both rows, and as `extra` a sum of extra(x, px, qx) of the caller's
// choice, x being the target's logit; where q is 0, that is `beside` px. Of blocks where the draft
// has no token, the target's masses are known.
template <class Extra>
PD_INLINE double Compare(Slot& s, VerifySpread spread, const Search& search, const Extra& extra,
                         double beside = 0) {
  const int64_t blocks = s.p.place.Blocks();
  constexpr int kHalf = kParts / 2;
  const Pair pair(s);
  double *overlaps = search.counts, *extras = search.masses;
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader target(s.p.place), draft(s.q.place);
    for (int64_t b = begin; b < end; ++b) {
      if (draft.Empty(b)) {
        const double mass = s.p.masses[b] / s.p.total;
        overlaps[b] = 0, s.residual[b] = s.scale * mass, extras[b] = beside * mass;
        continue;
      }
      const float *xp = target.Block(b), *xq = draft.Block(b);
      V same[kHalf], left[kHalf], more[kHalf];
      for (int u = 0; u < kHalf; ++u) same[u] = left[u] = more[u] = Set(0.0f);
      for (int64_t i = 0; i < target.Width(b); i += kHalf * kLanes) {
        for (int u = 0; u < kHalf; ++u) {
          const V x = Load(xp + i + u * kLanes);
          const V p = pair.P(x), q = pair.Q(Load(xq + i + u * kLanes));
          same[u] = same[u] + Min(p, q);
          left[u] = left[u] + pair.Residual(p, q);
          more[u] = more[u] + extra(x, p, q);
        }
      }
      overlaps[b] = Total(same, kHalf);
      s.residual[b] = Total(left, kHalf);
      extras[b] = Total(more, kHalf);
    }
  });
  s.overlap = SumOf(overlaps, blocks);
  s.rest = SumOf(s.residual, blocks);
  return SumOf(extras, blocks);
}

// The residual in fp64.
struct PairExactly {
  explicit PairExactly(const Slot& s)
      : p(s.p), q(s.q), by_p(s.scale / s.p.total), by_q(1 / s.q.total) {}
  PD_INLINE double operator()(float x, float y) const {
    const double left = p(x) * by_p - q(y) * by_q;
    return left > 0 ? left : 0.0;
  }
  WeightExactly p, q;
  double by_p, by_q;
};

// A small residual is a difference of nearly equal numbers, and rounding would choose its tokens:
// once more in fp64, with `residual` as shares of `rest`. Returns what q has beside `tokens`.
inline double Refine(Slot& s, VerifySpread spread, const Search& search,
                     const int64_t* tokens = nullptr, int64_t count = 0) {
  if (!s.exact) {
    s.p.total = PassExactly(s.p, spread, nullptr, 0, search, nullptr);
    s.q.total = PassExactly(s.q, spread, nullptr, 0, search, nullptr);
  }
  const int64_t blocks = s.p.place.Blocks();
  const PairExactly pair(s);
  Spread(spread, blocks, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
    Reader target(s.p.place), draft(s.q.place);
    double left[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const float *x = target.Block(b), *y = draft.Block(b);
      const int64_t width = target.Width(b);
      for (int64_t i = 0; i < width; ++i) left[i] = pair(x[i], y[i]);
      s.residual[b] = SumOf(left, width);
      if (count == 0) continue;
      for (int64_t i = 0; i < width; ++i) left[i] = pair.q(y[i]);
      for (int64_t j = 0; j < count; ++j) {
        if (tokens[j] / kBlock == b) left[tokens[j] % kBlock] = 0;
      }
      search.counts[b] = SumOf(left, width);
    }
  });
  s.rest = SumOf(s.residual, blocks);
  s.exact = true;
  for (int64_t b = 0; b < blocks; ++b) s.residual[b] /= s.rest;
  return count == 0 ? 1 : SumOf(search.counts, blocks) / s.q.total;
}

// The weights that a token is drawn from, by id: those of p, or a slot's residual.
class Weights {
 public:
  Weights(const Slot& slot, bool residual)
      : slot_(slot), residual_(residual), target_(slot.p.place) {}

  const double* Sums() const { return residual_ ? slot_.residual : slot_.p.masses; }

  // Of one block, to `out`; returns its number of columns.
  int64_t Block(int64_t block, float* out) {
    const WeightAt weight(slot_.p);
    const float* x = target_.Block(block);
    const int64_t width = target_.Width(block), point = slot_.q.point - block * kBlock;
    if (!residual_ || slot_.q.point >= 0) {
      for (int64_t i = 0; i < width; i += kLanes) Store(weight(Load(x + i)), out + i);
      if (residual_ && point >= 0 && point < width) out[point] = 0;
      for (int64_t j = 0; residual_ && j < slot_.tried_count; ++j) {
        if (slot_.tried[j] / kBlock == block) out[slot_.tried[j] % kBlock] = 0;
      }
    } else {
      const Pair pair(slot_);
      Reader draft(slot_.q.place);
      const float* y = draft.Block(block);
      if (slot_.exact) {
        const PairExactly exactly(slot_);
        for (int64_t i = 0; i < width; ++i) {
          out[i] = static_cast<float>(exactly(x[i], y[i]) / slot_.rest);
        }
        return target_.Columns(block);
      }
      for (int64_t i = 0; i < width; i += kLanes) {
        Store(pair.Residual(pair.P(Load(x + i)), pair.Q(Load(y + i))), out + i);
      }
    }
    return target_.Columns(block);
  }

 private:
  const Slot& slot_;
  bool residual_;
  Reader target_;
};

// The first id whose cumulative weight exceeds coin times the sum; the last of positive weight
// where rounding leaves none.
inline int64_t Draw(const Slot& slot, bool residual, double coin) {
  if (slot.p.point >= 0) return slot.p.point;
  const int64_t blocks = slot.p.place.Blocks();
  Weights weights(slot, residual);
  const double* sums = weights.Sums();
  const double bound = coin * SumOf(sums, blocks);
  double sum = 0, before = 0;
  int64_t block = 0;
  for (int64_t b = 0; b < blocks && sum <= bound; ++b) {
    if (!(sums[b] > 0)) continue;
    block = b, before = sum;
    sum += sums[b];
  }
  alignas(64) float w[kBlock];
  const int64_t n = weights.Block(block, w);
  sum = before;
  int64_t last = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (!(w[i] > 0)) continue;
    sum += w[i], last = i;
    if (sum > bound) break;
  }
  if (last < 0) {  // the block's mass is below fp32's range beside the row's: its likeliest token
    Reader reader(slot.p.place);
    const float* x = reader.Block(block);
    last = std::max_element(x, x + n) - x;
  }
  return block * kBlock + last;
}

// What a request of either kind, chain or tree, is made of.
class RequestBase {
 protected:
  RequestBase(const VerifyArgs& a, int64_t index, VerifySpread spread, float* scratch)
      : a_(a), index_(index), spread_(spread), blocks_(verify_blocks(a)) {
    double* numbers = reinterpret_cast<double*>(scratch);
    search_.counts = numbers, numbers += kVerifyPivots * blocks_;
    search_.masses = numbers, numbers += kVerifyPivots * blocks_;
    masses_ = numbers, numbers += (a.slots + 1) * kVerifyBlockNumbers * blocks_;
    supports_ = reinterpret_cast<char*>(numbers);
    numbers += (a.slots + 1) * verify_support_bytes(a) / 8;
    slots_ = reinterpret_cast<Slot*>(numbers);
    more_ = reinterpret_cast<char*>(slots_ + a.slots + 1);
    search_.candidates = reinterpret_cast<float*>(
        more_ + (a.parent == nullptr ? 0 : (a.slots + 1) * kVerifyNodeBytes));
    warpers_ = a.warpers + index * a.warper_step;
    seed_ = a.seed[index * a.seed_step];
    position_ = a.position[index * a.position_step];
    drafted_ = std::min(a.num_drafted[index * a.drafted_step], a.slots);
    pointed_ = a.draft.data == nullptr || warpers_[kTemperature] == 0 ||
               warpers_[kWarpers + kTemperature] == 0;
    Clear();
  }

  int64_t At(int64_t row) const { return index_ * (a_.slots + 1) + row; }
  int64_t DraftAt(int64_t slot) const { return index_ * a_.slots + slot; }

  // The target's row of a place.
  void ReadTarget(Slot& s, int64_t row) {
    double* masses = masses_ + row * kVerifyBlockNumbers * blocks_;
    new (&s) Slot{};
    s.residual = masses + 2 * blocks_;
    const float* bias = a_.bias == nullptr ? nullptr : a_.bias + index_ * a_.bias_step;
    s.p = Warp(PlaceOf(a_.target, row, bias), warpers_, spread_, masses, search_);
  }

  void ReadDraft(Slot& s, int64_t row) {
    double* masses = masses_ + (row * kVerifyBlockNumbers + 1) * blocks_;
    Place place = PlaceOf(a_.draft, row, nullptr);
    if (a_.support != nullptr && !Sorted(place, row)) {
      s.q.sound = false;
      return;
    }
    s.q = Warp(place, warpers_ + kWarpers, spread_, masses, search_);
  }

  bool Flip(int64_t slot, double num, double den) const {
    return Coin(seed_, position_, slot, kAcceptStream) * den < num;
  }

  // min(p, q) and the residual.
  void CompareRows(Slot& s) {
    Compare(s, spread_, search_, [](V, V, V) PD_INLINE_LAMBDA { return Set(0.0f); });
  }

  // The residual's mass in the block of a token, where q is a point.
  void WeighBlock(Slot& s, int64_t token) {
    alignas(64) float w[kBlock];
    const int64_t block = token / kBlock;
    const int64_t n = Weights(s, true).Block(block, w);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += w[i];
    s.residual[block] = sum;
  }

  void Report(const Slot& s, int64_t slot) {
    a_.overlap[DraftAt(slot)] = static_cast<float>(s.overlap);
    a_.tv[DraftAt(slot)] = static_cast<float>(s.bias);
    if (s.q.point < 0) a_.draft_lse[DraftAt(slot)] = static_cast<float>(s.q.LogNormaliser());
    ReportTarget(s, slot);
  }

  void ReportTarget(const Slot& s, int64_t row) {
    if (s.p.point < 0) a_.target_lse[At(row)] = static_cast<float>(s.p.LogNormaliser());
  }

  // The token that follows a row, drawn from it or its residual: the last one.
  void EmitLast(Slot& s, int64_t row, bool residual) {
    a_.num_accepted[index_] = accepted_;
    if (!s.p.sound) {
      a_.flags[At(row)] |= kBadTarget;
      return;
    }
    ReportTarget(s, row);
    Emit(s, accepted_, Draw(s, residual, Coin(seed_, position_, row, kResampleStream)));
  }

  // A token at an offset, of the row of a slot.
  void Emit(const Slot& s, int64_t offset, int64_t id) {
    a_.tokens[At(offset)] = id;
    a_.logprobs[At(offset)] = static_cast<float>(LogProbabilityOf(s.p, id));
  }

  const VerifyArgs& a_;
  int64_t index_;
  VerifySpread spread_;
  int64_t blocks_;
  Search search_;
  double* masses_;  // [K + 1, kVerifyBlockNumbers, blocks]
  char* supports_;  // [K + 1], of drafts known on a few tokens
  Slot* slots_;     // [K + 1]
  char* more_;      // what trees keep
  const double* warpers_;
  int64_t seed_, position_, drafted_, accepted_ = 0;
  bool pointed_;  // drafted tokens are point masses

 private:
  void Clear() {
    for (int64_t i = 0; i <= a_.slots; ++i) {
      a_.tokens[At(i)] = -1, a_.flags[At(i)] = 0;
      a_.logprobs[At(i)] = a_.target_lse[At(i)] = NAN;
      if (i == a_.slots) break;
      a_.overlap[DraftAt(i)] = a_.tv[DraftAt(i)] = a_.draft_lse[DraftAt(i)] = NAN;
      a_.path[DraftAt(i)] = -1;
    }
  }

  // The tokens of a draft's row, if they can be those of a distribution.
  bool Sorted(Place& place, int64_t row) {
    auto* entries = reinterpret_cast<SupportEntry*>(supports_ + row * verify_support_bytes(a_));
    const int64_t* ids = a_.support + index_ * a_.support_request_step + row * a_.support_row_step;
    return SortSupport(place, ids, a_.support_size,
                       reinterpret_cast<int32_t*>(entries + a_.support_size), entries);
  }

  Place PlaceOf(const VerifyRows& rows, int64_t row, const float* bias) const {
    const int64_t at = index_ * rows.request_stride + row * rows.row_stride;
    return {rows.data + at * ElementSize(a_.dtype), a_.dtype, bias, a_.vocab};
  }
};

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
