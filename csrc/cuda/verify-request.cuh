// What the verification of a request is made of: its rows, the comparison of two of them, and the
// draw of a token from p or from what is left of it.
//
// A block is one request. Its state is uniform: every thread decides the same from the same
// numbers, and one of them writes what later steps need to the request's scratch.
#pragma once

#include "cuda/verify-coins.cuh"
#include "cuda/verify-warp.cuh"

namespace pydistill {
namespace {

enum Method : int { kToken, kWhole, kTypical, kTargetOnly, kTree, kTraversal, kMethods };
enum Lenience : int { kStrict, kLinear, kSquare, kExponential, kEnsemble, kTvBudget, kLeniences };
enum Flag : int { kBadId = 1, kBadTarget = 2, kBadDraft = 4, kImpossible = 8, kBadParent = 16 };

// A place of the chain or tree that was read. What is left of p is [scale p - q]+.
struct Slot {
  Warped p, q;
  double scale, px, qx, overlap, rest, bias;
  double masses[kWarps];    // of p's weights, by run
  double residual[kWarps];  // of what is left
  const int64_t* tried;     // q a point: what is left is p without these tokens
  int32_t tried_count;
  int32_t exact;  // `residual` are shares of `rest`, summed in fp64
};

// A place of a tree: its children, and what those that failed have left.
struct Branch {
  double ratio, rho, mass;     // p is [p - rho q]+ / mass
  double left;                 // q of what was not tried
  double factor;               // of the mass that the last rejection has left
  int32_t begin, count, next;  // of the children that can be tested; the next to be
  int32_t open;                // the target's row was read
};

// Not by its parents: with no nodes there is no memory to point to.
__host__ __device__ inline bool is_tree(const VerifyCall& call) {
  return call.method >= kTargetOnly;
}

// Where everything lies in a request's scratch, in bytes.
struct Layout {
  int64_t branches, tokens, nodes, known, bytes;

  __host__ __device__ explicit Layout(const VerifyCall& call) {
    const bool tree = is_tree(call);
    const int64_t places = call.slots + 1, hung = tree ? call.slots : 0;
    branches = places * static_cast<int64_t>(sizeof(Slot));
    tokens = branches + (tree ? places * static_cast<int64_t>(sizeof(Branch)) : 0);
    nodes = tokens + hung * 8;
    known = nodes + hung * 4;
    const int64_t numbers = call.support ? call.support_size + (call.vocab + 31) / 32 * 2 : 0;
    bytes = (known + numbers * 4 + 7) / 8 * 8;
  }
};

// How many tokens a draft's row has that is known on a few; -1 where an id is outside the
// vocabulary or comes twice. Ids below 0 mark empty slots.
template <class S>
__device__ int map_support(const int64_t* ids, const S* row, int64_t size, int vocab,
                           const Known& known) {
  __shared__ int sums[kWarps];
  unsigned* const bits = known.bits;
  int* const before = known.before();
  const int words = known.words, thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the last row's may still be in use
  for (int i = thread; i < words; i += kBlock) bits[i] = 0;
  __syncthreads();
  bool wrong = false;
  for (int64_t j = thread; j < size; j += kBlock) {
    const int64_t id = ids[j];
    if (id < 0) continue;
    const unsigned bit = 1u << (id % 32);
    wrong = wrong || id >= vocab || (atomicOr(bits + id / 32, bit) & bit);
  }
  if (__syncthreads_or(wrong)) return -1;
  // A thread counts a run of words, then adds what the threads before it have counted.
  const int run = (words + kBlock - 1) / kBlock;
  const int begin = min(thread * run, words), end = min(begin + run, words);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += __popc(bits[i]);
  int sum = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, sum, step);
    if (lane() >= step) sum += other;
  }
  if (lane() == kWarp - 1) sums[warp()] = sum;
  __syncthreads();
  int count = 0, at = sum - mine;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp()) at += sums[i];
    count += sums[i];
  }
  for (int i = begin; i < end; ++i) {
    before[i] = at;
    at += __popc(bits[i]);
  }
  __syncthreads();
  for (int64_t j = thread; j < size; j += kBlock) {
    const int64_t id = ids[j];
    if (id < 0) continue;
    const unsigned below = bits[id / 32] & ((1u << (id % 32)) - 1u);
    known.logits()[before[id / 32] + __popc(below)] = to_float(row[j]);
  }
  __syncthreads();
  return count;
}

// p and q of two rows and what is left of p, in fp32. Products are rounded on their own, so that
// equal rows leave exactly nothing.
struct Pair {
  WeightAt weight_p, weight_q;
  float by_p, by_q, scale;

  __device__ explicit Pair(const Slot& s)
      : weight_p(s.p),
        weight_q(s.q),
        by_p(static_cast<float>(1.0 / s.p.total)),
        by_q(static_cast<float>(1.0 / s.q.total)),
        scale(static_cast<float>(s.scale)) {}
  __device__ __forceinline__ float p(float x) const { return __fmul_rn(weight_p(x), by_p); }
  __device__ __forceinline__ float q(float y) const { return __fmul_rn(weight_q(y), by_q); }
  __device__ __forceinline__ float left(float px, float qx) const {
    return fmaxf(fmaf(scale, px, -qx), 0.0f);
  }
};

// The same in fp64.
struct PairExactly {
  double by_p, by_q;

  __device__ explicit PairExactly(const Slot& s)
      : by_p(s.scale / s.p.total), by_q(1.0 / s.q.total) {}
  __device__ double q(const Slot& s, float y) const { return __dmul_rn(s.q.weight(y), by_q); }
  __device__ double left(const Slot& s, float x, float y) const {
    return fmax(__dmul_rn(s.p.weight(x), by_p) - q(s, y), 0.0);
  }
};

// A further sum over a comparison, x being the target's logit.
enum Extra : int {
  kNoExtra,
  kByFactor,  // min(q, a p) - min(q, p)
  kByPower,   // min(q, p^a) - min(q, p)
  kLikely,    // q of what has p > a
  kUnlike,    // 1/2 |q of what has p > a - b p|
};

struct Compared {
  double overlap, extra;
};

// sum min(p, q), an extra, and by run what is left of p.
template <class S>
__device__ Compared compare(const Slot& s, const Reader<S>& target, const Reader<S>& draft,
                            Extra extra, float a, float b, double* residual, double& rest) {
  __shared__ double scratch[2 * kWarps], parts[kWarps];
  const Pair pair(s);
  const float log_total = static_cast<float>(log(s.p.total));
  double sums[2] = {0.0, 0.0}, sum = 0.0;
  sweep(0, tiles_of(target.vocab), [&](int start) {
    float x[kTile], p[kTile], q[kTile], same = 0.0f, left = 0.0f, more = 0.0f;
    target.load(start, x);
    draft.load(start, q);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      p[i] = pair.p(x[i]);
      q[i] = pair.q(q[i]);
      same += fminf(p[i], q[i]);
      left += pair.left(p[i], q[i]);
    }
    if (extra != kNoExtra) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (extra == kByFactor) {
          more += fminf(q[i], a * p[i]) - fminf(q[i], p[i]);
        } else if (extra == kByPower) {
          const float log_p = pair.weight_p.exponent(x[i] - pair.weight_p.max) - log_total;
          const float power = p[i] > 0.0f ? expf(a * fmaxf(log_p, -105.0f)) : 0.0f;
          more += fmaxf(fminf(q[i], power) - fminf(q[i], p[i]), 0.0f);
        } else {
          const float kept = p[i] > a ? q[i] : 0.0f;
          more += extra == kLikely ? kept : 0.5f * fabsf(kept - b * p[i]);
        }
      }
    }
    sums[0] += same;
    sums[1] += more;
    sum += left;
  });
  block_reduce_each<kBlock>(sums, Sum{}, scratch);
  rest = sum_by_warp(sum, parts, residual);
  return {sums[0], sums[1]};
}

// What a token is drawn from.
enum Source : int { kAll, kWithoutTried, kLeft, kLeftExactly };

template <class S>
struct Weights {
  const Slot& slot;
  const Reader<S>& target;
  const Reader<S>& draft;
  Source source;
  Pair pair;
  PairExactly exactly;

  __device__ Weights(const Slot& slot, const Reader<S>& target, const Reader<S>& draft,
                     Source source)
      : slot(slot), target(target), draft(draft), source(source), pair(slot), exactly(slot) {}

  __device__ float at(int id) const {
    const float x = target.at(id);
    if (source <= kWithoutTried) {
      for (int j = 0; source == kWithoutTried && j < slot.tried_count; ++j)
        if (slot.tried[j] == id) return 0.0f;
      return pair.weight_p(x);
    }
    const float y = draft.at(id);
    if (source == kLeft) return pair.left(pair.p(x), pair.q(y));
    return static_cast<float>(exactly.left(slot, x, y) / slot.rest);
  }

  // Of tiles [first, last), by run.
  __device__ double sum(int first, int last, double (&parts)[kWarps]) const {
    double sum = 0.0;
    sweep_ids(first, last, target.vocab, [&](int id) { sum += at(id); });
    return sum_by_warp(sum, parts);
  }
};

// The first id whose cumulative weight exceeds coin times the sum; the last of positive weight
// where rounding leaves none. `parts` are the sums of the runs of the row.
template <class S>
__device__ int64_t draw(const Weights<S>& weights, const double* parts, double coin) {
  __shared__ double inner[kWarps];
  int first = 0, last = tiles_of(weights.target.vocab);
  double bound = 0.0, sum = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) bound += parts[i];
  bound *= coin;
  while (true) {
    int chosen = 0;
    double before = sum;
    for (int i = 0; i < kWarps && sum <= bound; ++i) {
      if (!(parts[i] > 0.0)) continue;
      chosen = i, before = sum;
      sum += parts[i];
    }
    sum = before;
    const int run = run_of(last - first);
    first += chosen * run;
    last = min(first + run, last);
    if (last - first <= 1) break;
    weights.sum(first, last, inner);
    parts = inner;
  }
  const int begin = first * kTile, end = min(begin + kTile, weights.target.vocab);
  int at = begin;
  for (int id = begin; id < end && sum <= bound; ++id) {
    const float w = weights.at(id);
    if (!(w > 0.0f)) continue;
    sum += w, at = id;
  }
  return at;
}

// What a request of either kind, chain or tree, is made of.
template <class S>
class Request {
 protected:
  __device__ explicit Request(const VerifyCall& call)
      : call_(call),
        scratch_(static_cast<char*>(call.scratch) + blockIdx.x * Layout(call).bytes),
        slots_(reinterpret_cast<Slot*>(scratch_)),
        pointed_(!call.draft || warpers()[kTemperature] == 0.0 ||
                 warpers()[kWarpers + kTemperature] == 0.0) {
    clear();
  }

  // One thread writes what all have decided; what it reads and writes is in order with the others.
  template <class F>
  __device__ void alone(F f) {
    __syncthreads();
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

  // What a call says is looked up again where it is needed: registers are few, and constants near.
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int vocab() const { return static_cast<int>(call_.vocab); }
  __device__ const double* warpers() const { return call_.warpers + index() * call_.warper_step; }
  __device__ int64_t drafted() const {
    return min(call_.num_drafted[index() * call_.drafted_step], call_.slots);
  }
  __device__ int64_t at(int64_t row) const { return index() * (call_.slots + 1) + row; }
  __device__ int64_t draft_at(int64_t slot) const { return index() * call_.slots + slot; }

  __device__ double coin_of(int64_t slot, Stream stream) const {
    return coin(call_.seed[index() * call_.seed_step],
                call_.position[index() * call_.position_step], slot, stream);
  }

  __device__ Reader<S> target(int64_t row) const {
    const S* data = static_cast<const S*>(call_.target) + index() * call_.target_request_stride;
    const float* bias = call_.logit_bias ? call_.logit_bias + index() * call_.bias_step : nullptr;
    return {data + row * call_.target_row_stride, bias, {}, vocab()};
  }

  __device__ const S* draft_row(int64_t row) const {
    return static_cast<const S*>(call_.draft) + index() * call_.draft_request_stride +
           row * call_.draft_row_stride;
  }

  __device__ Known known() const {
    if (!call_.support) return {};
    return {reinterpret_cast<unsigned*>(scratch_ + Layout(call_).known), (vocab() + 31) / 32};
  }

  __device__ Reader<S> draft(int64_t row) const {
    if (!call_.draft) return target(row);  // never read
    return {draft_row(row), nullptr, known(), vocab()};
  }

  // Makes a row of the draft that is known on a few tokens the one that can be read; -1 where they
  // cannot be those of a distribution, else how many tokens there are.
  __device__ int map_draft(int64_t row) {
    if (!call_.support) return vocab();
    const int64_t* ids =
        call_.support + index() * call_.support_request_step + row * call_.support_row_step;
    return map_support(ids, draft_row(row), call_.support_size, vocab(), known());
  }

  // The rows of a place that are asked for, the target's first; stops at one without a softmax.
  __device__ void read(int64_t row, bool target_too, bool draft_too) {
    Slot& s = slots_[row];
#pragma unroll 1
    for (int side = target_too ? 0 : 1; side < (draft_too ? 2 : 1); ++side) {
      if (side == 0) {
        alone([&] {
          s.q = {1.0, 1.0, 0.0f, -INFINITY, -1, 0};
          s.scale = 1.0;
          s.px = s.qx = s.overlap = s.rest = s.bias = 0.0;
          s.tried = nullptr, s.tried_count = 0, s.exact = 0;
        });
      }
      const int tokens = side == 0 ? vocab() : map_draft(row);
      if (tokens < 0) return;
      warp_row(side == 0 ? target(row) : draft(row), tokens, warpers() + side * kWarpers,
               side == 0 ? s.p : s.q, side == 0 ? s.masses : nullptr);
      if (side == 0 && !s.p.sound) return;
    }
  }

  __device__ bool flip(int64_t slot, double num, double den) const {
    return coin_of(slot, kAcceptStream) * den < num;
  }

  // sum min(p, q) and what is left of p; returns the extra.
  __device__ double weigh(int64_t row, Extra extra = kNoExtra, double a = 0.0, double b = 0.0) {
    Slot& s = slots_[row];
    double rest;
    const Compared found = compare(s, target(row), draft(row), extra, static_cast<float>(a),
                                   static_cast<float>(b), s.residual, rest);
    alone([&] { s.overlap = found.overlap, s.rest = rest; });
    return found.extra;
  }

  // A small residual is a difference of nearly equal numbers, and rounding would choose its tokens:
  // once more in fp64, with `residual` as shares of `rest`. Returns what q has beside `tokens`.
  __device__ double refine(int64_t row, const int64_t* tokens = nullptr, int count = 0) {
    __shared__ double scratch[2 * kWarps], parts[kWarps];
    Slot& s = slots_[row];
    const Reader<S> p = target(row), q = draft(row);
    const int tiles = tiles_of(vocab());
    if (!s.exact) {
      double sums[2] = {0.0, 0.0};
      sweep_ids(0, tiles, vocab(), [&](int id) {
        sums[0] += s.p.weight(p.at(id));
        sums[1] += s.q.weight(q.at(id));
      });
      block_reduce_each<kBlock>(sums, Sum{}, scratch);
      alone([&] { s.p.total = sums[0], s.q.total = sums[1]; });
    }
    const PairExactly pair(s);
    double untried[1] = {0.0}, sum = 0.0;
    sweep_ids(0, tiles, vocab(), [&](int id) {
      const float y = q.at(id);
      sum += pair.left(s, p.at(id), y);
      bool tried = count == 0;
      for (int j = 0; j < count; ++j) tried = tried || tokens[j] == id;
      if (!tried) untried[0] += pair.q(s, y);
    });
    block_reduce_each<kBlock>(untried, Sum{}, scratch);
    const double rest = sum_by_warp(sum, parts, s.residual);
    alone([&] {
      s.rest = rest, s.exact = 1;
      for (int i = 0; i < kWarps; ++i) s.residual[i] /= rest;
    });
    return untried[0];
  }

  // Of a point mass: one more token is tried. What is left is p without all that were; `rest` is
  // its share of p.
  __device__ void remove(int64_t row, const int64_t* tokens, int count) {
    __shared__ double parts[kWarps];
    Slot& s = slots_[row];
    alone([&] {
      for (int i = 0; count == 1 && i < kWarps; ++i) s.residual[i] = s.masses[i];
      s.tried = tokens, s.tried_count = count;
    });
    const int64_t token = tokens[count - 1];
    const int tiles = tiles_of(vocab()), run = run_of(tiles);
    const int part = static_cast<int>(token / kTile) / run;
    const Reader<S> p = target(row);
    const Weights<S> weights(s, p, p, kWithoutTried);
    const double mass = weights.sum(part * run, min((part + 1) * run, tiles), parts);
    alone([&] {
      s.residual[part] = mass;
      double sum = 0.0;
      for (int i = 0; i < kWarps; ++i) sum += s.residual[i];
      s.rest = sum / s.p.total;
    });
  }

  __device__ void report_target(const Slot& s, int64_t row) {
    if (s.p.point < 0) call_.target_lse[at(row)] = static_cast<float>(s.p.log_normaliser());
  }

  __device__ void report(const Slot& s, int64_t slot) {
    call_.overlap[draft_at(slot)] = static_cast<float>(s.overlap);
    call_.bias[draft_at(slot)] = static_cast<float>(s.bias);
    if (s.q.point < 0) call_.draft_lse[draft_at(slot)] = static_cast<float>(s.q.log_normaliser());
    report_target(s, slot);
  }

  // A token at an offset, of the target's row of a place.
  __device__ void emit(int64_t row, int64_t offset, int64_t id) {
    call_.tokens[at(offset)] = id;
    call_.logprobs[at(offset)] =
        static_cast<float>(log_probability_of(slots_[row].p, target(row), id));
  }

  // The token that follows a row, drawn from it or from what is left of it: the last one.
  __device__ void emit_last(int64_t row, int64_t accepted, bool left) {
    const Slot& s = slots_[row];
    int64_t token = s.p.point;
    if (s.p.sound && token < 0) {
      const Source source =
          !left ? kAll : (s.q.point >= 0 ? kWithoutTried : (s.exact ? kLeftExactly : kLeft));
      const Reader<S> p = target(row), q = draft(row);
      const Weights<S> weights(s, p, q, source);
      token = draw(weights, left ? s.residual : s.masses, coin_of(row, kResampleStream));
    }
    alone([&] {
      call_.num_accepted[index()] = accepted;
      if (!s.p.sound) {
        call_.flags[at(row)] |= kBadTarget;
        return;
      }
      report_target(s, row);
      emit(row, accepted, token);
    });
  }

  const VerifyCall& call_;
  char* const scratch_;
  Slot* const slots_;
  const bool pointed_;  // drafted tokens are point masses

 private:
  __device__ void clear() {
    for (int64_t i = threadIdx.x; i <= call_.slots; i += kBlock) {
      call_.tokens[at(i)] = -1;
      call_.flags[at(i)] = 0;
      call_.logprobs[at(i)] = call_.target_lse[at(i)] = NAN;
      if (i == call_.slots) break;
      call_.overlap[draft_at(i)] = call_.bias[draft_at(i)] = call_.draft_lse[draft_at(i)] = NAN;
      call_.path[draft_at(i)] = -1;
    }
    __syncthreads();
  }
};

}  // namespace
}  // namespace pydistill
