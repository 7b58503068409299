// A warped row of logits: its maximum, the cut of its filters, and its mass. docs/ops/verify.md has
// the definitions.
//
// A warp takes a run of consecutive tiles, so that the sum of a warp is the mass of a range of ids,
// and sampling has no pass of its own. Tiles begin at multiples of 8 ids, wherever the row lies in
// memory: what is added to what depends on nothing but the row. A row that is not 16-byte aligned
// (of an odd vocabulary, say) is loaded element by element.
//
// Terms are fp32 and summed in fp64, eight at a time, in a fixed order.
#pragma once

#include <cfloat>

#include "cuda/common.cuh"
#include "cuda/verify.h"

namespace pydistill {
namespace {

#ifndef PYD_VERIFY_BLOCK
#define PYD_VERIFY_BLOCK 512
#endif
constexpr int kBlock = PYD_VERIFY_BLOCK;  // threads of a request; fewer in most tests
constexpr int kWarps = kBlock / kWarp;
constexpr int kTile = 8;
constexpr int kPivots = 7;        // of one pass that looks for a cut
constexpr int kCandidates = 512;  // logits that are compared with each other to find it

enum Warper : int { kTemperature, kTopK, kTopP, kLogMinP, kWarpers };

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// Tiles in a row of so many ids, and in the run of a warp.
__device__ __forceinline__ int tiles_of(int vocab) { return (vocab + kTile - 1) / kTile; }
__device__ __forceinline__ int run_of(int tiles) { return (tiles + kWarps - 1) / kWarps; }

// Calls f(first id) for tiles [first, last): a run for each warp, one tile after another for its
// lanes.
template <class F>
__device__ __forceinline__ void sweep(int first, int last, F f) {
  const int run = run_of(last - first), begin = first + warp() * run;
  const int end = min(begin + run, last);
  for (int tile = begin + lane(); tile < end; tile += kWarp) f(tile * kTile);
}

// The same by single ids, of rows of so many: for what is rare, or reads little.
template <class F>
__device__ __forceinline__ void sweep_ids(int first, int last, int vocab, F f) {
  sweep(first, last, [&](int start) {
    const int end = min(start + kTile, vocab);
#pragma unroll 1
    for (int id = start; id < end; ++id) f(id);
  });
}

// The sum of every thread's number, and in `parts`, which lies in shared memory, that of each warp;
// `kept` is a copy of it, or null. All threads must call, and all get the sum.
__device__ __forceinline__ double sum_by_warp(double mine, double (&parts)[kWarps],
                                              double* kept = nullptr) {
  mine = warp_reduce(mine, Sum{});
  __syncthreads();
  if (lane() == 0) {
    parts[warp()] = mine;
    if (kept) kept[warp()] = mine;
  }
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += parts[i];
  return sum;
}

// The tokens of a draft that is known on a few: a bit for each id, then how many bits are set
// before each word of them, then the logits in order of id.
struct Known {
  unsigned* bits;  // null: all tokens are known
  int words;

  __device__ __forceinline__ int* before() const { return reinterpret_cast<int*>(bits + words); }
  __device__ __forceinline__ float* logits() const {
    return reinterpret_cast<float*>(bits + 2 * static_cast<int64_t>(words));
  }
};

// One row of logits, and what is added to it; -inf where the row is not known.
template <class S>
struct Reader {
  const S* row;
  const float* bias;  // or null
  Known known;
  int vocab;

  __device__ __forceinline__ void load(int start, float (&x)[kTile]) const {
    if (known.bits) {
      const unsigned word = known.bits[start / 32];
      const int shift = start % 32;
      const unsigned mine = word >> shift & 0xffu;
      int at = 0;
      if (mine) at = known.before()[start / 32] + __popc(word & ((1u << shift) - 1u));
#pragma unroll
      for (int i = 0; i < kTile; ++i) x[i] = mine >> i & 1u ? known.logits()[at++] : -INFINITY;
      return;
    }
    load_tile(row, start, vocab, is_wide_aligned(row), -INFINITY, x);
    if (!bias) return;
    float b[kTile];
    load_tile(bias, start, vocab, is_wide_aligned(bias), 0.0f, b);
#pragma unroll
    for (int i = 0; i < kTile; ++i) x[i] += b[i];
  }

  __device__ float at(int id) const {
    if (known.bits) {
      const unsigned word = known.bits[id / 32], bit = 1u << (id % 32);
      if (!(word & bit)) return -INFINITY;
      return known.logits()[known.before()[id / 32] + __popc(word & (bit - 1u))];
    }
    return to_float(row[id]) + (bias ? bias[id] : 0.0f);
  }
};

// A token of logit x has probability exp(scale (x - max)) / total where x >= cut, else 0; or all of
// it is at `point`.
struct Warped {
  double scale, total;
  float max, cut;
  int32_t point;  // -1: there is none
  int32_t sound;

  __device__ double weight(float x) const {
    return x < cut ? 0.0 : exp(scale * (static_cast<double>(x) - max));
  }
  __device__ double log_normaliser() const { return scale * max + log(total); }
};

template <class S>
__device__ double probability_of(const Warped& w, const Reader<S>& reader, int64_t id) {
  if (w.point >= 0) return id == w.point ? 1.0 : 0.0;
  return w.weight(reader.at(static_cast<int>(id))) / w.total;
}

template <class S>
__device__ double log_probability_of(const Warped& w, const Reader<S>& reader, int64_t id) {
  if (w.point >= 0) return id == w.point ? 0.0 : -INFINITY;
  const float x = reader.at(static_cast<int>(id));
  return x < w.cut ? -INFINITY : w.scale * (static_cast<double>(x) - w.max) - log(w.total);
}

// exp(scale (x - max)) of what is kept. 1 / T is two floats: in one it would bend every mass the
// same way. `least` keeps -inf from meeting a 0 in a product; its weight is 0.
struct WeightAt {
  float max, cut, high, low, least;

  __device__ explicit WeightAt(const Warped& w)
      : max(w.max),
        cut(w.cut),
        high(static_cast<float>(w.scale)),
        low(static_cast<float>(w.scale - high)),
        least(static_cast<float>(-120.0 / w.scale)) {}

  __device__ __forceinline__ float exponent(float below) const {
    const float d = below < least ? least : below;  // NaN stays
    return fmaf(d, high, d * low);
  }
  __device__ __forceinline__ float below(float d) const { return expf(exponent(d)); }
  __device__ __forceinline__ float operator()(float x) const {
    const float e = below(x - max);
    return x < cut ? 0.0f : e;
  }
};

// The lowest id whose logit is the maximum. Only the run of the first warp that saw it is read.
template <class S>
__device__ int find_maximum(const Reader<S>& reader, float max, const float* by_warp) {
  __shared__ int lowest[kWarps];
  const int tiles = tiles_of(reader.vocab), run = run_of(tiles);
  int first = 0;
  while (by_warp[first] != max) ++first;
  int found = INT32_MAX;
  sweep_ids(first * run, min((first + 1) * run, tiles), reader.vocab, [&](int id) {
    if (reader.at(id) == max) found = min(found, id);
  });
  found = __reduce_min_sync(kFullMask, found);
  __syncthreads();
  if (lane() == 0) lowest[warp()] = found;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) found = min(found, lowest[i]);
  return found;
}

// The one read of memory: maximum and mass of a row without filters, and its token if greedy.
template <class S>
__device__ void read_row(const Reader<S>& reader, double temperature, Warped& row, double* masses) {
  __shared__ float by_warp[kWarps];
  __shared__ double parts[kWarps];
  const bool greedy = temperature == 0.0;
  Warped w{greedy ? 1.0 : 1.0 / temperature, 0.0, 0.0f, -INFINITY, -1, 0};
  const WeightAt weight(w);
  float max = -FLT_MAX;  // finite, so that -inf - max is -inf and not NaN
  double z = 0.0;
  sweep(0, tiles_of(reader.vocab), [&](int start) {
    float x[kTile];
    reader.load(start, x);
    float most = max;
#pragma unroll
    for (int i = 0; i < kTile; ++i) most = fmaxf(most, x[i]);
    if (most > max) {
      z *= weight.below(max - most);
      max = most;
    }
    float add = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile; ++i) add += weight.below(x[i] - max);
    z += add;
  });
  const float mine = warp_reduce(max, Max{});
  __syncthreads();
  if (lane() == 0) by_warp[warp()] = mine;
  __syncthreads();
  w.max = by_warp[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) w.max = fmaxf(w.max, by_warp[i]);
  // A thread whose maximum weighs 0 in fp32 has no other weight either.
  w.total = sum_by_warp(z * weight.below(max - w.max), parts, masses);
  w.sound = w.total > 0.0;  // NaN and +inf made the sum NaN
  if (w.sound && greedy) w.point = find_maximum(reader, w.max, by_warp);
  if (threadIdx.x == 0) row = w;
  __syncthreads();
}

// The masses once the cut is known.
template <class S>
__device__ double sum_kept(const Reader<S>& reader, const Warped& w, double* masses) {
  __shared__ double parts[kWarps];
  const WeightAt weight(w);
  double sum = 0.0;
  sweep(0, tiles_of(reader.vocab), [&](int start) {
    float x[kTile];
    reader.load(start, x);
    float add = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile; ++i) add += weight(x[i]);
    sum += add;
  });
  return sum_by_warp(sum, parts, masses);
}

// Floats in their order as integers, and back.
__device__ __forceinline__ int64_t order_of(float x) {
  const int bits = __float_as_int(x + 0.0f);
  return bits >= 0 ? bits : -static_cast<int64_t>(bits & 0x7fffffff);
}

__device__ __forceinline__ float float_at(int64_t order) {
  const int64_t bits = order >= 0 ? order : -order;
  return __uint_as_float(static_cast<unsigned>(bits) | (order >= 0 ? 0u : 0x80000000u));
}

// Of what a row keeps: mass and tokens above each pivot, and the mass of all.
struct Above {
  double mass[kPivots + 1], tokens[kPivots];
};

// Every thread must call; `found` lies in shared memory, as `pivots` do.
template <class S>
__device__ void pass_pivots(const Reader<S>& reader, const Warped& w, bool exactly,
                            const float (&pivots)[kPivots], Above& found) {
  __shared__ double masses[(kPivots + 1) * kWarps];
  __shared__ int counts[kPivots * kWarps];
  double sums[kPivots + 1] = {};
  int tokens[kPivots] = {};
  const int tiles = tiles_of(reader.vocab);
  if (exactly) {
    sweep_ids(0, tiles, reader.vocab, [&](int id) {
      const float x = reader.at(id);
      const double e = w.weight(x);
      sums[kPivots] += e;
#pragma unroll
      for (int j = 0; j < kPivots; ++j) {
        sums[j] += x > pivots[j] ? e : 0.0;
        tokens[j] += x > pivots[j];
      }
    });
  } else {
    const WeightAt weight(w);
    sweep(0, tiles, [&](int start) {
      float x[kTile], e[kTile], all = 0.0f;
      reader.load(start, x);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        e[i] = weight(x[i]);
        all += e[i];
      }
      sums[kPivots] += all;
#pragma unroll
      for (int j = 0; j < kPivots; ++j) {
        const float pivot = pivots[j];
        float mass = 0.0f;
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          mass += x[i] > pivot ? e[i] : 0.0f;
          tokens[j] += x[i] > pivot;
        }
        sums[j] += mass;
      }
    });
  }
#pragma unroll
  for (int j = 0; j <= kPivots; ++j) {
    sums[j] = warp_reduce(sums[j], Sum{});
    if (lane() == 0) masses[j * kWarps + warp()] = sums[j];
    if (j == kPivots) break;
    tokens[j] = __reduce_add_sync(kFullMask, tokens[j]);
    if (lane() == 0) counts[j * kWarps + warp()] = tokens[j];
  }
  __syncthreads();
  const int j = static_cast<int>(threadIdx.x);
  if (j <= kPivots) {
    double mass = 0.0, count = 0.0;
    for (int i = 0; i < kWarps; ++i) mass += masses[j * kWarps + i];
    for (int i = 0; j < kPivots && i < kWarps; ++i) count += counts[j * kWarps + i];
    found.mass[j] = mass;
    if (j < kPivots) found.tokens[j] = count;
  }
  __syncthreads();
}

// The logits of a row in [bottom, top], few enough to be compared with each other; bottom is
// finite, and what a tile has behind the row is -inf.
struct Candidates {
  float* logits;
  unsigned long long* weights;  // in units of 2^-52, whose sums do not depend on their order
  int size;
};

template <class S>
__device__ Candidates collect(const Reader<S>& reader, const Warped& w, bool by_mass, float bottom,
                              float top) {
  __shared__ float logits[kCandidates];
  __shared__ unsigned long long weights[kCandidates];
  __shared__ int size;
  __syncthreads();
  if (threadIdx.x == 0) size = 0;
  __syncthreads();
  sweep(0, tiles_of(reader.vocab), [&](int start) {
    float x[kTile];
    reader.load(start, x);
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (x[i] >= bottom && x[i] <= top) logits[atomicAdd(&size, 1)] = x[i];
  });
  __syncthreads();
  const int count = size;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlock) {
    const double weight = by_mass ? w.weight(logits[i]) : 1.0;
    weights[i] = static_cast<unsigned long long>(weight * 0x1p52 + 0.5);
  }
  __syncthreads();
  return {logits, weights, count};
}

// Where a search for the smallest logit v stands for which less than `limit`, in tokens (top-k) or
// in mass (top-p), lies above v. v is bracketed between orders (low, high]: less than the limit
// lies above high, not so above low. Sums of fp32 terms can be as far from the limit as `doubt` and
// still be wrong.
struct Search {
  int64_t low, high;
  double above_high, tokens_above_high, tokens_above_low, limit, doubt;
  int32_t by_mass;
  int32_t passes;   // so far
  int32_t exactly;  // in fp64
  int32_t again;    // the bracket stands, and only what lies above high is in doubt

  __device__ void begin(const Warped& w) {
    low = order_of(w.cut) - 1, high = order_of(w.max);
    above_high = tokens_above_high = 0.0, tokens_above_low = INFINITY;
    passes = again = 0;
  }

  __device__ void move(const Warped& w, double share, const int64_t* orders, const Above& found) {
    if (exactly) limit = share * found.mass[kPivots], doubt = 0.0;
    ++passes;
    if (again) {
      above_high = found.mass[0];
      again = 0;
      return;
    }
    const int64_t before = high - low;
    bool falls = true;  // of the pivots from the top on: all have less than the limit above
    for (int j = kPivots - 1; j >= 0; --j) {
      const double weight = by_mass ? found.mass[j] : found.tokens[j];
      if (falls && weight < limit - doubt) {
        high = orders[j], above_high = weight, tokens_above_high = found.tokens[j];
        continue;
      }
      falls = false;
      const bool over = doubt == 0.0 || weight > limit + doubt;
      if (over && low < orders[j]) low = orders[j], tokens_above_low = found.tokens[j];
    }
    if (high - low == before && doubt > 0.0) {
      exactly = 1;
      begin(w);
    }
  }
};

// The smallest of the candidates with less than the limit above it; high where there is none.
// `sure`: no comparison was in doubt.
__device__ inline float choose(const Candidates& from, const Search& search, bool& sure) {
  __shared__ float scratch[kWarps];
  float least = float_at(search.high);
  bool doubts = false;
  for (int i = static_cast<int>(threadIdx.x); i < from.size; i += kBlock) {
    unsigned long long more = 0;
    for (int j = 0; j < from.size; ++j)
      if (from.logits[j] > from.logits[i]) more += from.weights[j];
    const double weight = search.above_high + static_cast<double>(more) * 0x1p-52;
    doubts = doubts || fabs(weight - search.limit) <= search.doubt;
    if (weight < search.limit) least = fminf(least, from.logits[i]);
  }
  sure = !__syncthreads_or(doubts);
  return -block_reduce<kBlock>(-least, Max{}, scratch);
}

// How far the pivots of the first pass lie below the maximum, times T: 1.5, 3, 5, 7.5, ... from the
// last one on, and the first below all.
__device__ inline float first_pivot(int j) {
  const int n = kPivots - j;
  return j == 0 ? INFINITY : 0.25f * static_cast<float>((n + 1) * (n + 2));
}

// The smallest logit v, at least the row's cut, for which less than the limit of what the row keeps
// lies above v; `share` is the limit, of top-p over the row's mass.
//
// A pass gives the weights above seven pivots inside the bracket, spaced as logits are, then evenly
// among numbers, then among floats, which always ends. What is left between its ends is collected
// once it is little. A pivot whose mass is in doubt moves neither end; where that stops the search,
// or leaves its end in doubt, masses are summed again in fp64. So the kept set is the one of exact
// sums. The search lies in shared memory: a sweep needs the registers.
template <class S>
__device__ float find_cut(const Reader<S>& reader, const Warped& w, bool by_mass, double share) {
  __shared__ Search search;
  __shared__ int64_t orders[kPivots];
  __shared__ float pivots[kPivots];
  __shared__ Above found;
  const int mine = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (mine == 0) {
    search.by_mass = by_mass, search.exactly = 0;
    search.limit = by_mass ? share * w.total : share;
    search.doubt = by_mass ? 5e-7 * w.total : 0.0;
    search.begin(w);
  }
  __syncthreads();
  while (search.high - search.low > 1) {
    const bool few = search.tokens_above_low - search.tokens_above_high <= kCandidates;
    if (few && !search.again) {
      const Candidates left =
          collect(reader, w, search.by_mass, float_at(search.low + 1), float_at(search.high));
      bool sure;
      const float cut = choose(left, search, sure);
      if (sure || search.doubt == 0.0) return cut;
      __syncthreads();
      if (mine == 0) search.exactly = search.again = 1;
    }
    __syncthreads();
    if (mine < kPivots) {
      const int64_t low = search.low, high = search.high;
      const float bottom = float_at(low), top = float_at(high);
      int64_t order = low + (high - low) * (mine + 1) / (kPivots + 1);
      if (search.passes == 0) {
        order = order_of(static_cast<float>(w.max - first_pivot(mine) / w.scale));
      } else if (search.passes < 3 && bottom > -FLT_MAX && top - bottom < FLT_MAX) {
        order = order_of(bottom + (top - bottom) * static_cast<float>(mine + 1) / (kPivots + 1));
      }
      order = order <= low ? low + 1 : (order > high ? high : order);
      orders[mine] = search.again ? high : order;
      pivots[mine] = float_at(orders[mine]);
    }
    __syncthreads();
    pass_pivots(reader, w, search.exactly, pivots, found);
    if (mine == 0) search.move(w, share, orders, found);
    __syncthreads();
  }
  return float_at(search.high);
}

// Everything about a row of so many known tokens, from its warpers, to `w`, which is not of the
// thread alone; `masses`, if not null, gets those of its runs.
template <class S>
__device__ void warp_row(const Reader<S>& reader, int64_t tokens, const double* warpers, Warped& w,
                         double* masses) {
  read_row(reader, warpers[kTemperature], w, masses);
  if (!w.sound || w.point >= 0) return;
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; ++by_mass) {
    const double asked = warpers[by_mass ? kTopP : kTopK];
    const float before = w.cut;
    float cut = before;
    if (by_mass ? asked < 1.0 : asked > 0.0 && asked < static_cast<double>(tokens))
      cut = find_cut(reader, w, by_mass, asked);
    if (by_mass) {  // the smallest float that min_p keeps: the bound itself is fp64
      const double bound = w.max + warpers[kTemperature] * warpers[kLogMinP];
      float least = static_cast<float>(bound);
      if (least < bound) least = nextafterf(least, INFINITY);
      cut = fmaxf(cut, least);
    }
    if (!(cut > before)) continue;
    __syncthreads();
    if (threadIdx.x == 0) w.cut = cut;
    __syncthreads();
    const double total = sum_kept(reader, w, masses);
    if (threadIdx.x == 0) w.total = total, w.sound = total > 0.0;
    __syncthreads();
  }
}

}  // namespace
}  // namespace pydistill
