// CUDA kernels of `verify` (docs/ops/verify.md): one block a request, which walks its chain or tree
// of drafted tokens until the first is rejected, and draws the token that follows.
//
// Bytes: a row of the target and one of the draft are read from memory once, when the walk comes to
// them, and once more, out of L2, to be compared; rows behind the end of the walk are not read. A
// filter adds three to five sweeps of its row, a draw one sweep of a 16th of it. Nothing of size V
// is written, but for a few bits a token where a draft is known on a few of them.
//
// Every step of a walk decides what is read next, so one block does what a request can keep busy,
// and the batch fills the machine.
#include "cuda/verify-tree.cuh"

namespace pydistill {
namespace {

template <class S>
class Chain : Request<S> {
  using Base = Request<S>;
  using Base::call_;
  using Base::slots_;

 public:
  __device__ explicit Chain(const VerifyCall& call) : Base(call) {}

  __device__ void run() {
    const bool whole = call_.method == kWhole;
    double ratio = 1.0;  // of the whole prefix, for `block`
    int32_t accepted = 0, tested = 0, read = 0;
    bool open = true;  // whether the next slot can be put to the test
    for (int32_t slot = 0;; ++slot) {
      open = open && slot < this->drafted() && is_token(slot);
      if (!open && whole && tested > 0 && this->flip(tested - 1, ratio, 1.0)) accepted = tested;
      const int32_t row = open ? slot : accepted;
      this->read(row, row == read, open && !this->pointed_);
      if (row == read) ++read;
      if (!open) break;
      open = is_usable(slot);
      if (!open) continue;
      const Slot& s = slots_[slot];
      if (whole) this->alone([&] { slots_[slot].scale = ratio; });
      const double odds = weigh(slot);
      if (whole) {
        // Where both are 0 the next slot, or the end, accepts as much.
        if (slot > 0 && this->flip(slot - 1, s.rest, s.rest + (1.0 - ratio))) accepted = slot;
        ratio = fmin(1.0, ratio * s.px / s.qx);
      } else {
        open = this->flip(slot, odds, s.qx);  // of `typical`, odds of 1 or 0 decide alone
        accepted += open;
      }
      ++tested;
      this->alone([&] { this->report(s, slot); });
    }
    finish(accepted, tested);
  }

 private:
  // Whether a slot holds a token of the vocabulary; flags it where it holds something else.
  __device__ bool is_token(int64_t slot) {
    const int64_t id = call_.ids[this->draft_at(slot)];
    if (is_inside(id, call_.vocab)) return true;
    if (id != -1) this->alone([&] { call_.flags[this->at(slot)] = kBadId; });
    return false;
  }

  // Whether a slot that was read can be tested; flags what is wrong with it.
  __device__ bool is_usable(int64_t slot) {
    Slot& s = slots_[slot];
    const int64_t* const id = call_.ids + this->draft_at(slot);
    int fault = s.p.sound ? 0 : kBadTarget;
    if (fault == 0 && !this->pointed_ && !s.q.sound) fault = kBadDraft;
    double px = 0.0, qx = 1.0;
    if (fault == 0) {
      px = probability_of(s.p, this->target(slot), *id);
      if (!this->pointed_) qx = probability_of(s.q, this->draft(slot), *id);
      if (!(qx > 0.0)) fault = kImpossible;
    }
    this->alone([&] {
      if (fault != 0) call_.flags[this->at(slot)] = fault;
      if (this->pointed_) s.q.point = static_cast<int32_t>(*id);
      s.px = px, s.qx = qx;
    });
    return fault == 0;
  }

  // The comparison of a slot's rows; returns what its coin is tested against. Of `typical` that is
  // 1 where the drafted token is likely enough, else 0; its bias is 1/2 sum |q 1_S - q(S) p|.
  __device__ double weigh(int64_t slot) {
    Slot& s = slots_[slot];
    const bool typical = call_.method == kTypical;
    double bound = 0.0, extra = 0.0;
    if (typical) {
      const double nats = s.p.point < 0 ? entropy(slot) : 0.0;
      bound = fmin(call_.strength, call_.alpha * exp(-nats));
    }
    const bool kept = s.px > bound;
    if (this->pointed_) {
      this->alone([&] { s.overlap = s.px, s.rest = s.scale * (1.0 - s.px); });
    } else {
#pragma unroll 1
      for (int pass = 0; pass < (typical ? 2 : 1); ++pass) {
        Extra kind = pass == 0 ? kLikely : kUnlike;
        double a = bound;
        if (!typical) {
          const bool scaled = call_.lenience == kLinear || call_.lenience == kSquare;
          kind = scaled ? kByFactor : (call_.lenience == kExponential ? kByPower : kNoExtra);
          a = scaled ? fmin(factor(), 1e38) : call_.strength;
        }
        extra = this->Base::weigh(slot, kind, a, extra);
      }
    }
    double odds = kept ? 1.0 : 0.0, bias = extra;
    if (typical) {
      if (this->pointed_) bias = kept ? 1.0 - s.px : 0.0;
    } else {
      odds = this->odds(s);
      if (this->pointed_) bias = fmin(1.0, odds) - s.px;
      if (call_.lenience >= kEnsemble) bias = (1.0 - weight(s.rest)) * s.rest;
    }
    this->alone([&] { s.bias = bias; });
    return odds;
  }

  __device__ double factor() const {
    return call_.lenience == kSquare ? 1.0 / (call_.strength * call_.strength)
                                     : 1.0 / call_.strength;
  }

  // Of the target in an ensemble; `rest` is the residual mass.
  __device__ double weight(double rest) const {
    if (call_.lenience == kEnsemble) return call_.strength;
    return rest > call_.strength ? 1.0 - call_.strength / rest : 0.0;
  }

  // f of the drafted token.
  __device__ double odds(const Slot& s) const {
    switch (call_.lenience) {
      case kLinear:
      case kSquare:
        return s.px * factor();
      case kExponential:
        return s.px > 0.0 ? exp(call_.strength * log(s.px)) : 0.0;
      case kEnsemble:
      case kTvBudget:
        return weight(s.rest) * s.px + (1.0 - weight(s.rest)) * s.qx;
      default:
        return s.px;
    }
  }

  // In nats.
  __device__ double entropy(int64_t slot) {
    __shared__ double scratch[kWarps];
    const Slot& s = slots_[slot];
    const WeightAt weight(s.p);
    const Reader<S> reader = this->target(slot);
    double sum = 0.0;
    sweep(0, tiles_of(this->vocab()), [&](int start) {
      float x[kTile], add = 0.0f;
      reader.load(start, x);
#pragma unroll
      for (int i = 0; i < kTile; ++i) add -= weight(x[i]) * weight.exponent(x[i] - weight.max);
      sum += add;
    });
    return log(s.p.total) + sum_by_warp(sum, scratch) / s.p.total;
  }

  // `tested` slots were tested. Where nothing is left of p after a rejection, p itself is drawn
  // from.
  __device__ void finish(int64_t accepted, int64_t tested) {
    const Slot& s = slots_[accepted];
    bool left = accepted < tested && call_.method != kTypical && s.rest > 0.0;
    if (left && s.p.point < 0) {
      if (this->pointed_) {
        this->remove(accepted, call_.ids + this->draft_at(accepted), 1);
      } else {
        if (call_.method == kWhole) this->map_draft(accepted);
        if (s.rest < 1e-3) this->refine(accepted);
      }
      left = s.rest > 0.0;
    }
    this->alone([&] {
      for (int64_t i = 0; i < accepted; ++i) {
        call_.path[this->draft_at(i)] = i;
        this->emit(i, i, call_.ids[this->draft_at(i)]);
      }
    });
    this->emit_last(accepted, accepted, left);
  }
};

template <class S>
__global__ void __launch_bounds__(kBlock) verify_chain(const __grid_constant__ VerifyCall call) {
  Chain<S>(call).run();
}

template <class S>
__global__ void __launch_bounds__(kBlock) verify_tree(const __grid_constant__ VerifyCall call) {
  Tree<S>(call).run();
}

bool is_valid(const VerifyCall& call) {
  return call.method >= 0 && call.method < kMethods && call.lenience >= 0 &&
         call.lenience < kLeniences &&
         (call.slots == 0 || is_tree(call) == (call.parent != nullptr));
}

}  // namespace
}  // namespace pydistill

PYD_API int pyd_verify(const VerifyCall* call, void* stream) {
  using namespace pydistill;
  if (call->batch == 0) return 0;
  if (!is_valid(*call)) return kInvalidValue;
  return dispatch_dtype(call->dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const unsigned requests = static_cast<unsigned>(call->batch);
    return is_tree(*call) ? PYD_LAUNCH((verify_tree<S>), requests, kBlock, 0, stream, *call)
                          : PYD_LAUNCH((verify_chain<S>), requests, kBlock, 0, stream, *call);
  });
}

PYD_API int pyd_verify_scratch(const VerifyCall* call, int64_t* bytes) {
  *bytes = call->batch * pydistill::Layout(*call).bytes;
  return 0;
}
