// Verification of a tree of drafted tokens: which path is accepted, and the token that follows it.
// docs/ops/verify.md has the maths.
//
// A row is read when the walk comes to it and something hangs there. After j failed siblings the
// target's row is [p - rho q]+ / mass: two numbers a row, and one sweep of it for each rejection,
// as for the first. Sums of fp32 terms decide as long as what is left is large beside their errors;
// then the row is summed in fp64.
#pragma once

#include "cuda/verify-request.cuh"

namespace pydistill {
namespace {

template <class S>
class Tree : Request<S> {
  using Base = Request<S>;
  using Base::call_;
  using Base::slots_;

 public:
  __device__ explicit Tree(const VerifyCall& call) : Base(call) {
    const Layout layout(call);
    this->alone([&] {
      here() = {call.parent + this->index() * call.parent_step,
                reinterpret_cast<Branch*>(this->scratch_ + layout.branches),
                reinterpret_cast<int64_t*>(this->scratch_ + layout.tokens),
                reinterpret_cast<int32_t*>(this->scratch_ + layout.nodes)};
    });
  }

  // One loop, in which each step says what the next has to do at which row.
  __device__ void run() {
    this->alone([&] {
      hang();
      branches()[0].ratio = 1.0;
    });
    Next next{kEnter, 0};
    int32_t accepted = 0;
    int32_t mapped = -1;  // the row of the draft that can be read
    while (true) {
      const int32_t row = next.row;
      if (next.step == kEnter) this->alone([&] { open(row); });
      const bool arrives = next.step == kEnter && branches()[row].count > 0;
      if (arrives || next.step == kEnd) {
        this->read(row, !branches()[row].open, arrives && !this->pointed_);
        this->alone([&] { branches()[row].open = 1; });
      } else if (next.step == kReject && !this->pointed_ && mapped != row) {
        this->map_draft(row);
      }
      mapped = row;
      if (next.step == kEnd) break;
      if (arrives) this->alone([&] { judge(row); });
      const bool tests = arrives && branches()[row].count > 0;
      if (next.step == kReject ? reject(row) : tests && !this->pointed_) this->weigh(row);
      if (next.step == kReject) settle(row);
      if (tests) this->alone([&] { this->report(slots_[row], row); });
      next = decide(row, accepted);
    }
    finish(next.row, accepted);
  }

 private:
  enum Step : int { kEnter, kReject, kEnd };
  struct Next {
    Step step;
    int32_t row;
  };

  // What is left where fp32 sums, which are good to about 1e-7, no longer decide.
  static constexpr double kSmall = 0.1;

  // Where the request's tree lies; in shared memory, for registers are few.
  struct Places {
    const int32_t* parents;  // [N]
    Branch* branches;        // [N + 1]
    int64_t* tokens;         // [N], by row
    int32_t* nodes;          // [N], of these
  };
  __device__ static Places& here() {
    __shared__ Places places;
    return places;
  }
  __device__ static const int32_t* parents() { return here().parents; }
  __device__ static Branch* branches() { return here().branches; }
  __device__ static int64_t* tokens() { return here().tokens; }
  __device__ static int32_t* nodes() { return here().nodes; }

  __device__ bool is_sane(int64_t node) const {
    return parents()[node] >= -1 && parents()[node] < node;
  }

  // Children by row, in order of index.
  __device__ void hang() {
    for (int64_t r = 0; r <= call_.slots; ++r) branches()[r] = Branch{};
    for (int64_t i = 0; i < this->drafted(); ++i) {
      if (call_.ids[this->draft_at(i)] == -1) continue;
      if (is_sane(i)) {
        ++branches()[parents()[i] + 1].count;
      } else {
        call_.flags[this->at(0)] |= kBadParent;
      }
    }
    int32_t begin = 0;
    for (int64_t r = 0; r <= call_.slots; ++r) {
      branches()[r].begin = begin;
      begin += branches()[r].count;
      branches()[r].count = 0;
    }
    for (int64_t i = 0; i < this->drafted(); ++i) {
      if (call_.ids[this->draft_at(i)] == -1 || !is_sane(i)) continue;
      Branch& b = branches()[parents()[i] + 1];
      nodes()[b.begin + b.count] = static_cast<int32_t>(i);
      tokens()[b.begin + b.count++] = call_.ids[this->draft_at(i)];
    }
  }

  // Keeps the children for which `keep(token, number kept)` holds.
  template <class Keep>
  __device__ void filter(Branch& b, Keep keep) {
    const int32_t end = b.begin + b.count;
    b.count = 0;
    for (int32_t j = b.begin; j < end; ++j) {
      if (!keep(tokens()[j])) continue;
      nodes()[b.begin + b.count] = nodes()[j];
      tokens()[b.begin + b.count++] = tokens()[j];
    }
  }

  // The walk comes to a row: which children are tokens, and each once.
  __device__ void open(int32_t row) {
    Branch& b = branches()[row];
    b.mass = b.left = 1.0;
    filter(b, [&](int64_t token) {
      if (!is_inside(token, call_.vocab)) {
        call_.flags[this->at(row)] |= kBadId;
        return false;
      }
      for (int32_t j = 0; j < b.count; ++j)
        if (tokens()[b.begin + j] == token) return false;
      return true;
    });
  }

  // The rows are read: which children can be tested.
  __device__ void judge(int32_t row) {
    Branch& b = branches()[row];
    Slot& s = slots_[row];
    int32_t& flags = call_.flags[this->at(row)];
    if (!s.p.sound || (!this->pointed_ && !s.q.sound)) {
      flags |= s.p.sound ? kBadDraft : kBadTarget;
      b.count = 0;
      return;
    }
    s.scale = b.ratio;
    if (this->pointed_) {
      s.q.point = static_cast<int32_t>(tokens()[b.begin]);
      for (int32_t j = 0; j < b.count; ++j) s.overlap += target_of(row, j);
      return;
    }
    filter(b, [&](int64_t token) {
      const bool possible = probability_of(s.q, this->draft(row), token) > 0.0;
      if (!possible) flags |= kImpossible;
      return possible;
    });
  }

  // p of a child's token.
  __device__ double target_of(int32_t row, int32_t child) const {
    return probability_of(slots_[row].p, this->target(row),
                          tokens()[branches()[row].begin + child]);
  }

  // Odds of the next child: it passes when coin * den < num.
  __device__ void odds(int32_t row, double& num, double& den) const {
    const Branch& b = branches()[row];
    const double px = target_of(row, b.next);
    if (this->pointed_) {
      num = b.ratio * px, den = b.mass;
      return;
    }
    const int64_t token = tokens()[b.begin + b.next];
    const double qx = probability_of(slots_[row].q, this->draft(row), token);
    num = b.ratio * fmax(px - b.rho * qx, 0.0), den = b.mass * qx / b.left;
  }

  // The next child has failed. Returns whether what is left has to be summed.
  __device__ bool reject(int32_t row) {
    Branch& b = branches()[row];
    Slot& s = slots_[row];
    const bool weighs = !this->pointed_ && b.next > 0 && !s.exact;
    this->alone([&] {
      const int64_t token = tokens()[b.begin + b.next++];
      if (this->pointed_) return;
      b.factor = b.rho * b.ratio + b.mass / b.left;
      b.left -= probability_of(s.q, this->draft(row), token);
      s.scale = b.ratio / b.factor;
    });
    return weighs;
  }

  __device__ void settle(int32_t row) {
    Branch& b = branches()[row];
    Slot& s = slots_[row];
    double left = b.left, z = 0.0;
    if (this->pointed_) {
      if (s.p.point >= 0) {
        this->alone([&] { s.rest = b.mass; });  // the target's one token would have passed
      } else {
        this->remove(row, tokens() + b.begin, b.next);
      }
      z = b.ratio * s.rest / b.mass;
    } else {
      z = s.rest * b.factor / b.mass;
      const bool more = b.next < b.count && (s.rest < kSmall * s.scale || left < kSmall);
      if (s.exact || more || (b.ratio < 1.0 && z + (1.0 - b.ratio) < kSmall))
        left = this->refine(row, tokens() + b.begin, b.next);
      z = s.rest * b.factor / b.mass;
    }
    const bool sure = z == 0.0 && b.ratio == 1.0;
    const double ratio = sure ? 1.0 : z / (z + (1.0 - b.ratio));
    this->alone([&] {
      if (call_.method == kTraversal) b.ratio = ratio;
      b.mass = this->pointed_ ? s.rest : s.rest / s.scale;
      b.rho = 1.0 / s.scale, b.left = left;
      if (!(s.rest > 0.0)) b.count = b.next;  // by rounding: nothing is left for siblings
    });
  }

  // What comes next, from what is known of a row.
  __device__ Next decide(int32_t row, int32_t& accepted) {
    const Branch& b = branches()[row];
    if (call_.method == kTraversal) return traverse(row, accepted);
    if (call_.method == kTargetOnly) {
      const double u = this->coin_of(row, kAcceptStream);
      double sum = 0.0;
      for (int32_t j = 0; b.next == 0 && j < b.count; ++j) {
        sum += target_of(row, j);
        if (u < sum) return accept(row, j, accepted);
      }
    } else if (b.next < b.count) {
      double num, den;
      odds(row, num, den);
      if (this->flip(nodes()[b.begin + b.next], num, den)) return accept(row, b.next, accepted);
    }
    return {b.next < b.count ? kReject : kEnd, row};
  }

  __device__ Next accept(int32_t row, int32_t child, int32_t& accepted) {
    const int32_t node = nodes()[branches()[row].begin + child];
    this->alone([&] {
      keep(node, accepted);
      branches()[node + 1].ratio = 1.0;
    });
    ++accepted;
    return {kEnter, node + 1};
  }

  // Nodes after their children.
  __device__ Next traverse(int32_t row, int32_t& accepted) {
    const Branch& b = branches()[row];
    if (b.next < b.count && b.ratio > 0.0) {
      double num, den;
      odds(row, num, den);
      const double ratio = fmin(1.0, num / den);
      if (!(ratio > 0.0)) return {kReject, row};
      const int32_t child = nodes()[b.begin + b.next] + 1;
      this->alone([&] { branches()[child].ratio = ratio; });
      return {kEnter, child};
    }
    if (row > 0 && !this->flip(row - 1, b.ratio, 1.0)) return {kReject, parents()[row - 1] + 1};
    for (int32_t r = row; r > 0; r = parents()[r - 1] + 1) ++accepted;
    this->alone([&] {
      int64_t offset = accepted;
      for (int32_t r = row; r > 0; r = parents()[r - 1] + 1) keep(r - 1, --offset);
    });
    return {kEnd, row};
  }

  __device__ void keep(int32_t node, int64_t offset) {
    call_.path[this->draft_at(offset)] = node;
    this->emit(parents()[node] + 1, offset, call_.ids[this->draft_at(node)]);
  }

  __device__ void finish(int32_t row, int32_t accepted) {
    const Slot& s = slots_[row];
    bool left = s.rest > 0.0;  // all children have failed, or there was none and it is 0
    if (left && s.rest < 1e-3 && !this->pointed_ && !s.exact) {
      this->refine(row);
      left = s.rest > 0.0;
    }
    this->emit_last(row, accepted, left);
  }
};

}  // namespace
}  // namespace pydistill
