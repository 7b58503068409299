// Verification of a tree of drafted tokens: which path is accepted, and the token that follows it.
// docs/ops/verify.md has the maths.
//
// A row is read when the walk comes to it and something hangs there. After j failed siblings the
// target's row is [p - rho q]+ / mass: two numbers a row, and one pass over it for each rejection,
// as for the first. Sums of fp32 terms decide as long as what is left is large beside their errors;
// then the row is summed in fp64.
#if defined(PD_VERIFY_TREE_INL_H) == defined(PD_TOGGLE)
#ifdef PD_VERIFY_TREE_INL_H
#undef PD_VERIFY_TREE_INL_H
#else
#define PD_VERIFY_TREE_INL_H
#endif

#include "cpu/verify_request-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// A place of the tree: its children, and what those that failed have left.
struct Branch {
  double ratio, rho, mass;     // p is [p - rho q]+ / mass
  double left;                 // q of what was not tried
  int64_t begin, count, next;  // of the children that can be tested; the next to be
  bool open;                   // the target's row was read
};
static_assert(sizeof(Branch) + 2 * sizeof(int64_t) <= kVerifyNodeBytes);

class Tree : RequestBase {
 public:
  Tree(const VerifyArgs& a, int64_t index, VerifySpread spread, float* scratch)
      : RequestBase(a, index, spread, scratch),
        parent_(a.parent + index * a.parent_step),
        branches_(reinterpret_cast<Branch*>(more_)),
        nodes_(reinterpret_cast<int64_t*>(branches_ + a.slots + 1)),
        tokens_(nodes_ + a.slots) {}

  void Run() {
    Hang();
    Enter(0, 1);
    switch (a_.method) {
      case kVerifyTargetOnly:
        return Finish(AskTarget());
      case kVerifyTree:
        return Finish(Descend());
      default:
        return Finish(Traverse());
    }
  }

 private:
  // What is left where fp32 sums, which are good to about 1e-7, no longer decide.
  static constexpr double kSmall = 0.1;

  // Children by row, in order of index.
  void Hang() {
    for (int64_t r = 0; r <= a_.slots; ++r) branches_[r] = Branch{};
    for (int64_t i = 0; i < drafted_; ++i) {
      if (a_.ids[DraftAt(i)] == -1) continue;
      if (Sane(i)) {
        ++branches_[parent_[i] + 1].count;
      } else {
        a_.flags[At(0)] |= kBadParent;
      }
    }
    for (int64_t r = 1; r <= a_.slots; ++r) {
      branches_[r].begin = branches_[r - 1].begin + branches_[r - 1].count;
      branches_[r - 1].count = 0;
    }
    branches_[a_.slots].count = 0;
    for (int64_t i = 0; i < drafted_; ++i) {
      if (a_.ids[DraftAt(i)] == -1 || !Sane(i)) continue;
      Branch& b = branches_[parent_[i] + 1];
      nodes_[b.begin + b.count] = i;
      tokens_[b.begin + b.count++] = a_.ids[DraftAt(i)];
    }
  }

  bool Sane(int64_t node) const { return parent_[node] >= -1 && parent_[node] < node; }

  // Keeps the children for which `keep(token, number kept)` holds.
  template <class Keep>
  void Filter(Branch& b, const Keep& keep) {
    const int64_t all = b.count;
    b.count = 0;
    for (int64_t j = b.begin; j < b.begin + all; ++j) {
      if (!keep(tokens_[j])) continue;
      nodes_[b.begin + b.count] = nodes_[j];
      tokens_[b.begin + b.count++] = tokens_[j];
    }
  }

  // Comes to a row: reads what is needed of it, and leaves the children that can be tested.
  void Enter(int64_t row, double ratio) {
    Branch& b = branches_[row];
    Slot& s = slots_[row];
    int32_t& flags = a_.flags[At(row)];
    b.ratio = ratio, b.mass = b.left = 1;
    Filter(b, [&](int64_t token) {
      if (token < 0 || token >= a_.vocab) return flags |= kBadId, false;
      const int64_t* first = tokens_ + b.begin;
      return std::find(first, first + b.count, token) == first + b.count;
    });
    if (b.count == 0) return;
    OpenTarget(row);
    if (!s.p.sound) {
      flags |= kBadTarget, b.count = 0;
      return;
    }
    if (pointed_) {
      s.q.point = tokens_[b.begin];
      for (int64_t j = 0; j < b.count; ++j) s.overlap += ProbabilityOf(s.p, tokens_[b.begin + j]);
    } else {
      ReadDraft(s, row);
      if (!s.q.sound) {
        flags |= kBadDraft, b.count = 0;
        return;
      }
      Filter(b, [&](int64_t token) {
        return ProbabilityOf(s.q, token) > 0 || (flags |= kImpossible, false);
      });
      if (b.count == 0) return;
      s.scale = ratio;
      CompareRows(s);
    }
    Report(s, row);
  }

  void OpenTarget(int64_t row) {
    if (branches_[row].open) return;
    ReadTarget(slots_[row], row);
    branches_[row].open = true;
  }

  // Odds of the next child: it passes when coin * den < num.
  void Odds(int64_t row, double& num, double& den) const {
    const Branch& b = branches_[row];
    const Slot& s = slots_[row];
    const int64_t token = tokens_[b.begin + b.next];
    const double px = ProbabilityOf(s.p, token);
    if (pointed_) {
      num = b.ratio * px, den = b.mass;
    } else {
      const double qx = ProbabilityOf(s.q, token);
      num = b.ratio * std::fmax(px - b.rho * qx, 0.0), den = b.mass * qx / b.left;
    }
  }

  // The next child has failed.
  void Reject(int64_t row) {
    Branch& b = branches_[row];
    Slot& s = slots_[row];
    const int64_t token = tokens_[b.begin + b.next++];
    if (pointed_) {
      Remove(row, token);
      Lower(b, b.ratio * s.rest / b.mass);
      b.mass = s.rest;
    } else {
      const bool first = b.next == 1, more = b.next < b.count;
      const double k = b.rho * b.ratio + b.mass / b.left;
      s.scale = b.ratio / k;
      double left = b.left - ProbabilityOf(s.q, token);
      if (!first && !s.exact) CompareRows(s);
      const double z = s.rest * k / b.mass;
      const bool small = (more && (s.rest < kSmall * s.scale || left < kSmall)) ||
                         (b.ratio < 1 && z + (1 - b.ratio) < kSmall);
      if (s.exact || small) left = Refine(s, spread_, search_, tokens_ + b.begin, b.next);
      Lower(b, s.rest * k / b.mass);
      b.mass = s.rest / s.scale, b.rho = 1 / s.scale, b.left = left;
    }
    if (!(s.rest > 0)) b.count = b.next;  // nothing is left for siblings
  }

  // The residual of point masses is without this token too; `rest` is its share of p.
  void Remove(int64_t row, int64_t token) {
    const Branch& b = branches_[row];
    Slot& s = slots_[row];
    if (s.p.point >= 0) {
      s.rest = b.mass - (token == s.p.point);
      return;
    }
    if (b.next == 1) std::copy(s.p.masses, s.p.masses + blocks_, s.residual);
    s.tried = tokens_ + b.begin, s.tried_count = b.next;
    WeighBlock(s, token);
    s.rest = SumOf(s.residual, blocks_) / s.p.total;
  }

  // The ratio after a failure that left the mass z of it.
  void Lower(Branch& b, double z) const {
    const bool sure = z == 0 && b.ratio == 1;
    if (a_.method == kVerifyTraversal) b.ratio = sure ? 1 : z / (z + (1 - b.ratio));
  }

  // Each returns the row where the walk ends.
  int64_t AskTarget() {
    for (int64_t row = 0;;) {
      Branch& b = branches_[row];
      const double coin = Coin(seed_, position_, row, kAcceptStream);
      double sum = 0;
      int64_t j = 0;
      for (; j < b.count; ++j) {
        sum += ProbabilityOf(slots_[row].p, tokens_[b.begin + j]);
        if (coin < sum) break;
      }
      if (j == b.count) {
        while (b.next < b.count) Remove(row, tokens_[b.begin + b.next++]);
        return row;
      }
      row = Accept(row, j);
    }
  }

  int64_t Descend() {
    for (int64_t row = 0;;) {
      Branch& b = branches_[row];
      if (b.next == b.count) return row;
      double num, den;
      Odds(row, num, den);
      if (Flip(nodes_[b.begin + b.next], num, den)) {
        row = Accept(row, b.next);
      } else {
        Reject(row);
      }
    }
  }

  int64_t Accept(int64_t row, int64_t child) {
    const int64_t node = nodes_[branches_[row].begin + child];
    Keep(node, accepted_++);
    Enter(node + 1, 1);
    return node + 1;
  }

  void Keep(int64_t node, int64_t offset) {
    a_.path[DraftAt(offset)] = node;
    Emit(slots_[parent_[node] + 1], offset, a_.ids[DraftAt(node)]);
  }

  int64_t Traverse() {
    for (int64_t row = 0;;) {
      Branch& b = branches_[row];
      if (b.next < b.count && b.ratio > 0) {
        double num, den;
        Odds(row, num, den);
        const double ratio = std::fmin(1.0, num / den);
        if (ratio > 0) {
          const int64_t node = nodes_[b.begin + b.next];
          Enter(node + 1, ratio);
          row = node + 1;
        } else {
          Reject(row);
        }
      } else if (row == 0 || Flip(row - 1, b.ratio, 1)) {
        for (int64_t r = row; r > 0; r = parent_[r - 1] + 1) ++accepted_;
        int64_t offset = accepted_;
        for (int64_t r = row; r > 0; r = parent_[r - 1] + 1) Keep(r - 1, --offset);
        return row;
      } else {
        row = parent_[row - 1] + 1;
        Reject(row);
      }
    }
  }

  void Finish(int64_t row) {
    Slot& s = slots_[row];
    OpenTarget(row);
    bool residual = branches_[row].next > 0 && s.rest > 0;
    if (residual && s.rest < 1e-3 && !pointed_ && !s.exact) {
      Refine(s, spread_, search_);
      residual = s.rest > 0;
    }
    EmitLast(s, row, residual);
  }

  const int32_t* parent_;
  Branch* branches_;  // [N + 1]
  int64_t* nodes_;    // [N], by row
  int64_t* tokens_;   // [N], of these
};

}  // namespace
}  // namespace pd::PD_NAMESPACE
#endif
