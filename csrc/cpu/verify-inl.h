// Verification of a drafted block: which tokens are accepted, and the token that follows them.
// docs/ops/verify.md has the maths.
//
// A request walks its slots: the target's row, the draft's row, and once both are known their
// comparison. Trees are in verify_tree-inl.h.
#include "cpu/verify_tree-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

class Chain : RequestBase {
 public:
  Chain(const VerifyArgs& a, int64_t index, VerifySpread spread, float* scratch)
      : RequestBase(a, index, spread, scratch) {}

  void Run() {
    int64_t read = 0;  // slots whose rows of the target are known
    int64_t length = 0;
    double ratio = 1;  // of the whole prefix, for `block`
    const bool whole = a_.method == kVerifyBlock;
    bool rejected = false;
    for (; length < drafted_ && !rejected; ++length) {
      Slot& s = slots_[length];
      const int32_t fault = Open(s, length, read);
      if (fault != 0) {
        if (fault != kNoToken) a_.flags[index_ * (a_.slots + 1) + length] = fault;
        break;
      }
      if (whole) {
        s.scale = ratio;
        Weigh(s);
        const bool sure = s.rest == 0 && ratio == 1;
        const double den = s.rest + (1 - ratio);
        if (length > 0 && Flip(length - 1, sure ? 1 : s.rest, sure ? 1 : den)) accepted_ = length;
        ratio = std::fmin(1.0, ratio * s.px / s.qx);
      } else {
        const double odds = Weigh(s);
        rejected = !Flip(length, odds, a_.method == kVerifyTypical ? 1 : s.qx);
        accepted_ += !rejected;
      }
      Report(s, length);
    }
    if (whole && length > 0 && Flip(length - 1, ratio, 1)) accepted_ = length;
    Finish(read, length);
  }

 private:
  static constexpr int32_t kNoToken = -1;

  // The target's row of a slot, once.
  void OpenTarget(Slot& s, int64_t slot, int64_t& read) {
    if (slot < read) return;
    ReadTarget(s, slot);
    read = slot + 1;
  }

  // Both rows of a slot; 0, kNoToken or the flag of what is wrong with it.
  int32_t Open(Slot& s, int64_t slot, int64_t& read) {
    const int64_t id = a_.ids[DraftAt(slot)];
    if (id < 0 || id >= a_.vocab) return id == -1 ? kNoToken : kBadId;
    OpenTarget(s, slot, read);
    if (!s.p.sound) return kBadTarget;
    if (pointed_) {
      s.q.point = id;
    } else {
      ReadDraft(s, slot);
      if (!s.q.sound) return kBadDraft;
    }
    s.px = ProbabilityOf(s.p, id), s.qx = ProbabilityOf(s.q, id);
    return s.qx > 0 ? 0 : kImpossible;
  }

  // The comparison of a slot's rows; returns what its coin is tested against.
  double Weigh(Slot& s) {
    if (a_.method == kVerifyTypical) return WeighTypical(s);
    if (s.q.point >= 0) {
      AgainstPoint(s);
      const double odds = Odds(s);
      s.bias = std::fmin(1.0, odds) - s.px;
      if (a_.method == kVerifyBlock || a_.lenience == kStrict) s.bias = 0;
      return odds;
    }
    const V factor = Set(static_cast<float>(std::fmin(Factor(), 1e38))),
            e = Set(static_cast<float>(a_.strength));
    const V floor = Set(-105.0f), log_total = Set(static_cast<float>(std::log(s.p.total)));
    const WeightAt weight(s.p);
    if (a_.lenience == kLinear || a_.lenience == kSquare) {
      s.bias = Compare(s, spread_, search_, [&](V, V p, V q) PD_INLINE_LAMBDA {
        return Min(q, factor * p) - Min(q, p);
      });
    } else if (a_.lenience == kExponential) {
      s.bias = Compare(s, spread_, search_, [&](V x, V p, V q) PD_INLINE_LAMBDA {
        const V power = ExpNonPositive(e * Max(weight.Distance(x) - log_total, floor));
        return Max(Min(q, Where(Lt(Set(0.0f), p), power)) - Min(q, p), Set(0.0f));
      });
    } else {
      CompareRows(s);
      s.bias = a_.lenience == kStrict ? 0 : (1 - Weight(s.rest)) * s.rest;
    }
    return Odds(s);
  }

  double Factor() const {
    return a_.lenience == kSquare ? 1 / (a_.strength * a_.strength) : 1 / a_.strength;
  }

  // Of the target in an ensemble; `rest` is the residual mass.
  double Weight(double rest) const {
    if (a_.lenience == kEnsemble) return a_.strength;
    return rest > a_.strength ? 1 - a_.strength / rest : 0;
  }

  // f of the drafted token.
  double Odds(const Slot& s) const {
    switch (a_.lenience) {
      case kLinear:
      case kSquare:
        return s.px * Factor();
      case kExponential:
        return s.px > 0 ? std::pow(s.px, a_.strength) : 0;
      case kEnsemble:
      case kTvBudget:
        return Weight(s.rest) * s.px + (1 - Weight(s.rest)) * s.qx;
      default:
        return s.px;
    }
  }

  // min(p, q) and the residual where q is a point: no pass, but for the point's own block.
  void AgainstPoint(Slot& s) {
    s.overlap = s.px;
    if (s.p.point >= 0) {
      s.rest = s.scale * (1 - s.px);
      return;
    }
    for (int64_t b = 0; b < blocks_; ++b) s.residual[b] = s.p.masses[b];
    WeighBlock(s, s.q.point);
    s.rest = s.scale * SumOf(s.residual, blocks_) / s.p.total;
  }

  // 1 where the drafted token is likely enough, else 0; the bias is 1/2 sum |q 1_S - q(S) p|.
  double WeighTypical(Slot& s) {
    if (s.p.point >= 0) {
      const double bound = std::fmin(a_.strength, a_.alpha);  // the entropy is 0
      const bool kept = s.px > bound;
      AgainstPoint(s);
      s.bias = kept ? 1 - s.px : 0;
      return kept;
    }
    const double entropy = Entropy(s.p);
    const double bound = std::fmin(a_.strength, a_.alpha * std::exp(-entropy));
    const bool kept = s.px > bound;
    if (s.q.point >= 0) {
      AgainstPoint(s);
      s.bias = kept ? s.rest : 0;
      return kept;
    }
    const V least = Set(static_cast<float>(bound));
    const double drafted = Compare(
        s, spread_, search_, [&](V, V p, V q) PD_INLINE_LAMBDA { return Where(Lt(least, p), q); });
    const V mass = Set(static_cast<float>(drafted)), half = Set(0.5f);
    s.bias = Compare(
        s, spread_, search_,
        [&](V, V p, V q) PD_INLINE_LAMBDA { return half * Abs(Where(Lt(least, p), q) - mass * p); },
        drafted / 2);
    return kept;
  }

  double Entropy(const Warped& w) {
    const WeightAt weight(w);
    Spread(spread_, blocks_, [&](int64_t begin, int64_t end) PD_INLINE_LAMBDA {
      Reader reader(w.place);
      for (int64_t b = begin; b < end; ++b) {
        const float* x = reader.Block(b);
        V sum[2] = {Set(0.0f), Set(0.0f)};
        for (int64_t i = 0; i < reader.Width(b); i += 2 * kLanes) {
          for (int u = 0; u < 2; ++u) {
            const V logit = Load(x + i + u * kLanes);
            const V depth = Max(weight.Distance(logit), Set(-105.0f));
            sum[u] = Fnma(weight(logit), depth, sum[u]);
          }
        }
        search_.counts[b] = Sum(sum[0] + sum[1]);
      }
    });
    return std::log(w.total) + SumOf(search_.counts, blocks_) / w.total;
  }

  // The accepted tokens and the one that follows them; `length` slots were tested.
  void Finish(int64_t read, int64_t length) {
    for (int64_t i = 0; i < accepted_; ++i) {
      a_.path[DraftAt(i)] = i;
      Emit(slots_[i], i, a_.ids[DraftAt(i)]);
    }
    Slot& s = slots_[accepted_];
    bool residual = accepted_ < length && a_.method != kVerifyTypical && s.rest > 0;
    if (residual && s.rest < 1e-3 && s.q.point < 0) {
      Refine(s, spread_, search_);
      residual = s.rest > 0;
    }
    OpenTarget(s, accepted_, read);
    EmitLast(s, accepted_, residual);
  }
};

}  // namespace

void verify_requests(const VerifyArgs& a, int64_t begin, int64_t end, VerifySpread spread,
                     float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.parent == nullptr) {
      Chain(a, i, spread, scratch).Run();
    } else {
      Tree(a, i, spread, scratch).Run();
    }
  }
}

}  // namespace pd::PD_NAMESPACE
