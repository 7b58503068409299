// The sweeps over a pair of rows from which the kernels of `divergence` are made.
//
// A block of kBlock threads owns the pair; a thread takes tiles of kTile consecutive tokens of both
// rows. Rows are read as tiles that begin at the student's last 16-byte boundary at or before its
// first token, so that all but its ends move 16 bytes at a time, and the teacher's too where the
// rows lie alike. The teacher's dtype is a value, not a type: one uniform branch a tile, a third of
// the code. Tokens outside the vocabulary read as -inf on both sides, which adds nothing anywhere.
//
// Exponents and logarithms are base 2 inside, with k2 = log2(e) / T, rounded once: both sides and
// their log-ratio then see the very same temperature.
#pragma once

#include <cfloat>

#include "cuda/divergence-kinds.cuh"

namespace pydistill {

constexpr int kBlock = 256;
constexpr int kTile = 8;
constexpr int kWarps = kBlock / kWarp;
constexpr int kCuts = 11;  // thresholds that one sweep of the head search tries
constexpr int kScratch = kCuts * kWarps;
constexpr float kHeadMass = 0.5f;

// A pair of rows as a thread sees it: tile i begins at token start(i), which may be before the row.
template <class S>
struct Rows {
  const S* student;
  const void* teacher;
  Dtype teacher_dtype;
  bool teacher_wide;
  int origin, vocab;

  __device__ Rows(const S* s, const void* t, int dtype, int64_t vocab)
      : student(s),
        teacher(t),
        teacher_dtype(static_cast<Dtype>(dtype)),
        origin(tile_origin(s)),
        vocab(static_cast<int>(vocab)) {
    aim(t);
  }

  // Compares the student with another teacher row.
  __device__ void aim(const void* t) {
    const int64_t size = teacher_dtype == Dtype::kFloat32 ? 4 : 2;
    teacher = t;
    teacher_wide = (reinterpret_cast<uintptr_t>(t) + origin * size) % sizeof(uint4) == 0;
  }

  __device__ int start(int tile) const { return origin + tile * kTile; }

  __device__ void load_student(int tile, float (&s)[kTile]) const {
    load_tile(student, start(tile), vocab, true, -INFINITY, s);
  }

  __device__ void load_teacher(int tile, float (&t)[kTile]) const {
    if (teacher_dtype == Dtype::kFloat32) {
      load_as<float>(tile, t);
    } else if (teacher_dtype == Dtype::kBfloat16) {
      load_as<__nv_bfloat16>(tile, t);
    } else {
      load_as<__half>(tile, t);
    }
  }

  // Bytes of the shared memory that a copy of a teacher's row takes, wherever tiles begin.
  __host__ __device__ static int64_t copy_bytes(int64_t vocab, int dtype) {
    const int64_t size = static_cast<Dtype>(dtype) == Dtype::kFloat32 ? 4 : 2;
    return (vocab + static_cast<int64_t>(sizeof(uint4) / sizeof(S)) - 1) * size;
  }

  // Where the copy's first token lies, so that tiles are aligned in it.
  __device__ void* copy_in(void* shared) const {
    return static_cast<char*>(shared) - origin * (teacher_dtype == Dtype::kFloat32 ? 4 : 2);
  }

  // Writes a teacher's tile where the copy has it.
  __device__ void keep(void* copy, int tile, const float (&t)[kTile]) const {
    if (teacher_dtype == Dtype::kFloat32) {
      keep_as<float>(copy, tile, t);
    } else if (teacher_dtype == Dtype::kBfloat16) {
      keep_as<__nv_bfloat16>(copy, tile, t);
    } else {
      keep_as<__half>(copy, tile, t);
    }
  }

  __device__ float teacher_at(int j) const {
    if (teacher_dtype == Dtype::kFloat32) return static_cast<const float*>(teacher)[j];
    if (teacher_dtype == Dtype::kBfloat16)
      return to_float(static_cast<const __nv_bfloat16*>(teacher)[j]);
    return to_float(static_cast<const __half*>(teacher)[j]);
  }

 private:
  template <class T>
  __device__ void load_as(int tile, float (&t)[kTile]) const {
    load_tile(static_cast<const T*>(teacher), start(tile), vocab, teacher_wide, -INFINITY, t);
  }

  template <class T>
  __device__ void keep_as(void* copy, int tile, const float (&t)[kTile]) const {
    store_tile(static_cast<T*>(copy), start(tile), vocab, true, t);
  }
};

// How a row's logits become p, q and d. Built from the values that forward saves, in the same way
// by forward and by backward: what rounding takes from the shift cancels between pull and its sum.
// The shift, k2 (max_t - max_s) + log2_zt - log2_zs, comes in two parts: the first may be large, is
// a float exactly, and leaves the fused product-minus-shift as small as d is.
struct Normal {
  float k2, max_s, max_t, log2_zs, log2_zt, shift, rest;

  __device__ __forceinline__ Token token(float s, float t) const {
    Token x;
    x.log2_p = fmaf(k2, t - max_t, -log2_zt);
    x.log2_q = fmaf(k2, s - max_s, -log2_zs);
    x.p = exp2f(x.log2_p);
    x.q = exp2f(x.log2_q);
    const bool absent = t == -INFINITY && s == -INFINITY;
    x.d = absent ? 0.0f : kLn2 * (fmaf(k2, t - s, -shift) - rest);
    x.gap = probability_gap(x.p, x.q, x.d);
    return x;
  }
};

__device__ __forceinline__ Normal normal_of(float temperature, float max_s, float logz_s,
                                            float max_t, float logz_t) {
  const float k2 = kLog2E / temperature;
  const float shift = k2 * (max_t - max_s);
  const float lost = fmaf(k2, max_t - max_s, -shift);
  const float rest = fmaf(kLog2E, logz_t - logz_s, lost);
  return {k2, max_s, max_t, kLog2E * logz_s, kLog2E * logz_t, shift, rest};
}

// What the first sweep finds, about the maxima of the block.
struct Seen {
  float max_s = -FLT_MAX, max_t = -FLT_MAX;  // finite, so that -inf - max is -inf and not NaN
  float z_s = 0.0f, z_t = 0.0f, z_one = 0.0f;
  // The KLs, with w the side under which the mean is taken: sums of w phi(d0) and w d0 where
  // d0 = log(w / other) about the guess (base 2), not yet divided by the sum of w.
  float phi_sum = 0.0f, d_sum = 0.0f, guess = 0.0f;
  float largest_d = -INFINITY;
};

// body(s[i], t[i], i) for the whole tile, which is used up. Only kPart tokens are in flight at a
// time: unrolled over all of them, the compiler would keep twice as many registers alive.
template <class Body>
__device__ __forceinline__ void each_token(float (&s)[kTile], float (&t)[kTile], Body body) {
  constexpr int kPart = kTile / 2;
#pragma unroll 1
  for (int part = 0; part < kTile; part += kPart) {
#pragma unroll
    for (int i = 0; i < kPart; ++i) body(s[i], t[i], part + i);
#pragma unroll
    for (int i = 0; i < kTile - kPart; ++i) {
      s[i] = s[i + kPart];
      t[i] = t[i + kPart];
    }
  }
}

__device__ __forceinline__ float largest(const float (&x)[kTile]) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < kTile; ++i) most = fmaxf(most, x[i]);
  return most;
}

// The maxima and the guess that the first tiles of the block's threads give.
template <bool kReverse>
__device__ __forceinline__ Seen guessed(const float (&s)[kTile], const float (&t)[kTile], float k2,
                                        float* scratch) {
  Seen seen;
  float most[2] = {fmaxf(seen.max_s, largest(s)), fmaxf(seen.max_t, largest(t))};
  block_reduce_each<kBlock>(most, Max{}, scratch);
  seen.max_s = most[0];
  seen.max_t = most[1];
  float z[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    z[0] += exp2f(k2 * (s[i] - seen.max_s));
    z[1] += exp2f(k2 * (t[i] - seen.max_t));
  }
  block_reduce_each<kBlock>(z, Sum{}, scratch);
  const float guess = fmaf(k2, seen.max_t - seen.max_s, log2f(z[1]) - log2f(z[0]));
  if (fabsf(guess) < INFINITY) seen.guess = kReverse ? -guess : guess;
  return seen;
}

// Reads both rows once: their maxima and normalisers and, for the KLs, the sums of `Seen`. `hot`
// also asks for z_one, the student's sum at temperature 1, and `copy`, if there is one, for the
// teacher's row in it; each thread writes the tiles that it will read.
//
// A thread rescales its sums when its running maxima grow, which it seldom does. The guess is the
// shift that the first kBlock tiles alone would have; later tiles are measured about it.
template <int kKind, class S>
__device__ __forceinline__ Seen first_sweep(const Rows<S>& rows, float k2, bool hot, float* scratch,
                                            void* copy = nullptr) {
  constexpr bool kKl = kKind == kForwardKl || kKind == kReverseKl;
  constexpr bool kReverse = kKind == kReverseKl;
  Seen seen;
  float scale = 0.0f;  // w exp(-d0) = scale * exp2(k2 (other - max of the other side))
  int tile = static_cast<int>(threadIdx.x);
  do {  // every thread takes a first tile, beyond a short row's end too: the guess is a block's
    float s[kTile], t[kTile];
    rows.load_student(tile, s);
    rows.load_teacher(tile, t);
    if (kKind == kAdaptiveKl && copy) rows.keep(copy, tile, t);
    if (kKl && tile < kBlock) {
      seen = guessed<kReverse>(s, t, k2, scratch);
      const float ahead = kReverse ? seen.max_t - seen.max_s : seen.max_s - seen.max_t;
      scale = exp2f(fmaf(k2, ahead, seen.guess));
    }
    const float most_s = largest(s), most_t = largest(t);
    if (most_s > seen.max_s || most_t > seen.max_t) {
      const float max_s = fmaxf(seen.max_s, most_s), max_t = fmaxf(seen.max_t, most_t);
      const float shrink_s = exp2f(k2 * (seen.max_s - max_s));
      const float shrink_t = exp2f(k2 * (seen.max_t - max_t));
      seen.z_s *= shrink_s;
      seen.z_t *= shrink_t;
      if (hot) seen.z_one *= exp2f(kLog2E * (seen.max_s - max_s));
      seen.max_s = max_s;
      seen.max_t = max_t;
      if constexpr (kKl) {
        seen.phi_sum *= kReverse ? shrink_s : shrink_t;
        seen.d_sum *= kReverse ? shrink_s : shrink_t;
        scale = exp2f(fmaf(k2, kReverse ? max_t - max_s : max_s - max_t, seen.guess));
      }
    }
    Seen add;  // a tile's own sums, so that a long row's additions are few
    each_token(s, t, [&](float s, float t, int) {
      const float e_s = exp2f(k2 * (s - seen.max_s)), e_t = exp2f(k2 * (t - seen.max_t));
      add.z_s += e_s;
      add.z_t += e_t;
      if (hot) add.z_one += exp2f(kLog2E * (s - seen.max_s));
      if constexpr (kKl) {
        const float apart = kReverse ? s - t : t - s;
        const float w = kReverse ? e_s : e_t, other = scale * (kReverse ? e_t : e_s);
        const float d0 = kLn2 * fmaf(k2, apart, -seen.guess);
        seen.largest_d = fmaxf(seen.largest_d, apart);
        add.phi_sum += bregman(w, d0, other);
        add.d_sum += times(w, d0);
      }
    });
    seen.z_s += add.z_s;
    seen.z_t += add.z_t;
    seen.z_one += add.z_one;
    seen.phi_sum += add.phi_sum;
    seen.d_sum += add.d_sum;
    tile += kBlock;
  } while (rows.start(tile) < rows.vocab);

  float most[3] = {seen.max_s, seen.max_t, seen.largest_d};
  block_reduce_each<kBlock>(most, Max{}, scratch);
  const float shrink_s = exp2f(k2 * (seen.max_s - most[0]));
  const float shrink_t = exp2f(k2 * (seen.max_t - most[1]));
  const float shrink_w = kReverse ? shrink_s : shrink_t;
  float sums[5] = {seen.z_s * shrink_s, seen.z_t * shrink_t,
                   seen.z_one * exp2f(kLog2E * (seen.max_s - most[0])), seen.phi_sum * shrink_w,
                   seen.d_sum * shrink_w};
  block_reduce_each<kBlock>(sums, Sum{}, scratch);
  seen.max_s = most[0];
  seen.max_t = most[1];
  seen.largest_d = most[2];
  seen.z_s = sums[0];
  seen.z_t = sums[1];
  seen.z_one = sums[2];
  seen.phi_sum = sums[3];
  seen.d_sum = sums[4];
  return seen;
}

// D of a KL and the sum of its pulls about `normal`, from one sweep; false where the sums have
// cancelled and the row must be read again.
//
// With A and B the means of phi(d0) and d0 under w, and delta = log(Z-ratio) - guess,
// D = A - phi(delta) = B - delta. The first form is exact where it takes little from A, the second
// where D is not small beside the numbers that rounding touched.
template <int kKind>
__device__ __forceinline__ bool kl_of(const Seen& seen, const Normal& normal, float logz_s,
                                      float logz_t, Term& row) {
  constexpr bool kReverse = kKind == kReverseKl;
  const float z = kReverse ? seen.z_s : seen.z_t;
  const float a = seen.phi_sum / z, b = seen.d_sum / z;
  const float shift = kReverse ? -normal.shift : normal.shift;
  const float rest = kReverse ? -normal.rest : normal.rest;
  const float grown = a - b;  // exp(-delta) - 1
  if (fabsf(grown) < 0.25f) {
    const float delta = -log1pf(grown);
    const float taken = phi_small(delta);
    const float value = fmaxf(a - taken, 0.0f);
    if (taken <= 8.0f * value || a < 1e-11f) {
      // What rounding took from the shift that the gradient will use. Where D is large, that is
      // far less than what it took from a - b.
      const float error = a < 1.0f ? kLn2 * (seen.guess - shift - rest) + delta : 0.0f;
      row = {value, kReverse ? value + error : -error};
      return true;
    }
  }
  const float delta = kLn2 * (shift - seen.guess + rest);
  const float value = b - delta;
  const float touched = fabsf(b) + kLn2 * (fabsf(shift) + fabsf(seen.guess)) + logz_s + logz_t;
  row = {value, kReverse ? value : 0.0f};
  return value > 0.05f * touched;
}

// adaptive_kl's head: tokens above `value`, and those at it up to index `last_tie`.
struct Head {
  float value = INFINITY;
  int last_tie = -1;

  __device__ __forceinline__ bool holds(float t, int j) const {
    return t > value || (t == value && j <= last_tie);
  }
};

// D, the sum of pulls and the sum of p - q, over the row.
struct Total {
  Term row;
  float excess;
  bool no_q, no_p;
  // adaptive_kl: the forward KL is in `row`; sum of |p - q| over the head and over all.
  Term reverse;
  float head_error, error;
};

template <int kKind, class S>
__device__ __forceinline__ Total second_sweep(const Rows<S>& rows, const Normal& normal,
                                              const KindParams& params, const Head& head,
                                              float* scratch) {
  constexpr bool kAdaptive = kKind == kAdaptiveKl;
  constexpr int kTermKind = kAdaptive ? static_cast<int>(kForwardKl) : kKind;
  constexpr int kSums = kAdaptive ? 7 : 3;
  float sums[kSums] = {};
  float apart[2] = {-INFINITY, -INFINITY};  // the largest t - s and s - t: infinite or not
  for (int tile = static_cast<int>(threadIdx.x); rows.start(tile) < rows.vocab; tile += kBlock) {
    float s[kTile], t[kTile];
    rows.load_student(tile, s);
    rows.load_teacher(tile, t);
    float add[kSums] = {};
    each_token(s, t, [&](float s, float t, int i) {
      const Token x = normal.token(s, t);
      apart[0] = fmaxf(apart[0], t - s);
      apart[1] = fmaxf(apart[1], s - t);
      const Term term = term_of<kTermKind>(x, params);
      add[0] += term.value;
      add[1] += term.pull;
      add[2] += x.gap;
      if constexpr (kAdaptive) {
        const Term reverse = term_of<kReverseKl>(x, params);
        add[3] += reverse.value;
        add[4] += reverse.pull;
        add[5] += head.holds(t, rows.start(tile) + i) ? fabsf(x.gap) : 0.0f;
        add[6] += fabsf(x.gap);
      }
    });
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += add[i];
  }
  block_reduce_each<kBlock>(sums, Sum{}, scratch);
  block_reduce_each<kBlock>(apart, Max{}, scratch);
  Total total = {};
  total.row = {sums[0], sums[1]};
  total.excess = sums[2];
  total.no_q = apart[0] == INFINITY;
  total.no_p = apart[1] == INFINITY;
  if constexpr (kAdaptive) {
    total.reverse = {sums[3], sums[4]};
    total.head_error = sums[5];
    total.error = sums[6];
  }
  return total;
}

// Floats in the order of their values, as unsigned integers.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Index of the m-th token whose teacher logit is `value`, in token order.
template <class S>
__device__ __forceinline__ int find_tie(const Rows<S>& rows, float value, int m) {
  __shared__ int found;
  int before = 0;
  for (int base = 0; base < rows.vocab; base += kBlock) {
    const int j = base + static_cast<int>(threadIdx.x);
    const int here = __syncthreads_count(j < rows.vocab && rows.teacher_at(j) == value);
    if (before + here >= m) {
      if (threadIdx.x == 0) {
        for (int i = base; before < m; ++i) {
          if (rows.teacher_at(i) == value) ++before;
          found = i;
        }
      }
      __syncthreads();
      return found;
    }
    before += here;
  }
  return rows.vocab;
}

// The tokens that adaptive_kl calls the head: in descending order of p, ties in token order, as
// long as the mass up to and with each is at most a half, and the first in any case.
//
// The logit at which the mass above passes a half is found by cutting its range in 12, again and
// again; a sweep of the teacher's row, or of its copy in shared memory, weighs what lies above each
// cut. The range ends as one representable logit: after at most 9 sweeps for fp32, 6 for fp16 and 5
// for bf16, fewer because it begins at the logits that can matter at all. Then ties are counted, if
// part of them is in.
template <class S>
__device__ __forceinline__ Head find_head(const Rows<S>& rows, float k2, const Seen& seen,
                                          float* scratch) {
  // Low bits that the teacher's dtype does not have: every unit of keys holds one logit.
  const int spare = rows.teacher_dtype == Dtype::kFloat32    ? 0
                    : rows.teacher_dtype == Dtype::kBfloat16 ? 16
                                                             : 13;
  const float half = kHeadMass * seen.z_t;
  // What lies lower weighs less than a quarter: vocab tokens of at most 1 / (4 vocab) each.
  const float lowest = seen.max_t - log2f(4.0f * static_cast<float>(rows.vocab)) / k2;
  unsigned low = key_of(fmaxf(lowest, -FLT_MAX)) >> spare;
  unsigned high = (key_of(seen.max_t) >> spare) + 1;
  float above = 0.0f;  // mass at or above `high`: at most a half; at or above `low` it is more
  while (high - low > 1) {
    const unsigned step = (high - low + kCuts) / (kCuts + 1);
    float cuts[kCuts], mass[kCuts];
#pragma unroll
    for (int c = 0; c < kCuts; ++c) {
      cuts[c] = value_of((low + (c + 1) * step) << spare);
      mass[c] = 0.0f;
    }
    for (int tile = static_cast<int>(threadIdx.x); rows.start(tile) < rows.vocab; tile += kBlock) {
      float t[kTile];
      rows.load_teacher(tile, t);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const float weight = exp2f(k2 * (t[i] - seen.max_t));
#pragma unroll
        for (int c = 0; c < kCuts; ++c) mass[c] += t[i] >= cuts[c] ? weight : 0.0f;
      }
    }
    block_reduce_each<kBlock>(mass, Sum{}, scratch);
    const unsigned bottom = low, top = high;
#pragma unroll
    for (int c = 0; c < kCuts; ++c) {
      const unsigned cut = bottom + (c + 1) * step;
      if (cut >= top) continue;
      if (mass[c] > half) {
        low = cut;
      } else if (high == top) {
        high = cut;
        above = mass[c];
      }
    }
  }
  Head head;
  const unsigned key = low << spare;
  head.value = value_of(key >> 31 ? key : key | ((1u << spare) - 1));
  float ties = floorf((half - above) / exp2f(k2 * (head.value - seen.max_t)));
  if (above == 0.0f) ties = fmaxf(ties, 1.0f);
  if (ties > 0.0f) head.last_tie = find_tie(rows, head.value, static_cast<int>(ties));
  return head;
}

}  // namespace pydistill
