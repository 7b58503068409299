// CUDA kernels of `topk_divergence` (docs/ops/topk_divergence.md): one block a row. Forward is a
// sweep of the row outside the support, then a small block for its cells.
//
// Bytes: forward reads a row once, backward reads it once and writes it once. Beside that, K ids
// are read two or three times, K logits once or twice and K log-probabilities once.
//
// The support is left out of the row's sum by a map in shared memory, one bit a token, so that the
// student's tail is a sum of its own terms alone. The bits are set in whatever order the ids come,
// and a bit that is already set tells that a row names a token twice. A tile of tokens is a byte of
// the map. Rows beyond kStretch tokens are taken in stretches.
//
// A row's logits are handled in fp32, its cells in fp64: on a peaked row the slopes of cells are
// small differences of large numbers, and K of them cost nothing beside the row.
//
// Every result is the same from run to run: sums have a fixed order, and the only atomics set bits.
#include <cfloat>

#include "cuda/common.cuh"
#include "cuda/topk_divergence.h"

namespace pydistill {
namespace {

enum Kind : int { kForwardKl, kReverseKl, kJsd, kTvd, kKinds };
enum TailMode : int { kWithTail, kSupportOnly, kTruncated };
enum { kMaxS, kOutsideMax, kLogQScale, kCentre, kCentreLow, kOutsideSlope, kStatus, kSaved };
enum Status : int { kSound, kIdOutOfRange, kIdTwice };

constexpr int kBlock = 256;
constexpr int kCellBlock = 64;  // of the kernel that reads the support alone
constexpr int kTile = 8;
constexpr int kWarps = kBlock / kWarp;
#ifndef PYD_TOPK_WORDS
#define PYD_TOPK_WORDS 5120
#endif
constexpr int kWords = PYD_TOPK_WORDS;  // of the map: 20 KB, and 163,840 tokens; fewer in tests
constexpr int kStretch = 32 * kWords;
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.69314718055994530942;

// What one row is, in either direction.
struct Row {
  const int64_t* ids;
  const float* log_p;
  int64_t slots;
  int vocab;
  float temperature, k2;  // k2 = log2(e) / T, rounded once: tail and support see the same T
  double k, beta;

  __device__ Row(const TopkDivergenceCall& call, int64_t row)
      : ids(call.ids + row * call.slots),
        log_p(call.log_p + row * call.slots),
        slots(call.slots),
        vocab(static_cast<int>(call.vocab)),
        temperature(call.params ? call.params[2 * row] : call.temperature),
        k2(kLog2E / temperature),
        k(kLn2 * k2),
        beta(call.params ? call.params[2 * row + 1] : call.beta) {}

  __device__ bool are_parameters_valid(int kind) const {
    if (!(temperature > 0.0f && temperature < INFINITY)) return false;
    return kind != kJsd || (beta > 0.0 && beta < 1.0);
  }

  __device__ double log_q(float s, float max_s, double scale) const {
    return k * (static_cast<double>(s) - max_s) - scale;
  }

  __device__ bool has(int64_t id) const { return id >= 0 && id < vocab; }
};

// Sets the bits of the ids among the kStretch tokens from `first` on; says what is wrong with ids
// that this thread saw. Every thread of the block must call.
__device__ int mark_support(const Row& row, int first, unsigned* bits) {
  const int words = min(kWords, (row.vocab - first + 31) / 32);
  __syncthreads();  // the last stretch may still be in use
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kBlock) bits[i] = 0;
  __syncthreads();
  int wrong = kSound;
  for (int64_t j = threadIdx.x; j < row.slots; j += kBlock) {
    const int64_t id = row.ids[j];
    if (id >= row.vocab) wrong |= kIdOutOfRange;
    if (!row.has(id) || !is_inside(static_cast<int>(id) - first, kStretch)) continue;
    const int at = static_cast<int>(id) - first;
    const unsigned bit = 1u << (at % 32);
    if (atomicOr(bits + at / 32, bit) & bit) wrong |= kIdTwice;
  }
  __syncthreads();
  return wrong;
}

// Of tile `tile` after the stretch's beginning, the tokens in the support.
__device__ __forceinline__ unsigned bits_of(const unsigned* bits, int tile) {
  return bits[tile / 4] >> (8 * (tile % 4)) & 0xffu;
}

// A sum of exp2(k2 (x - max)).
struct Sums {
  float max = -FLT_MAX;  // finite, so that -inf - max is -inf and not NaN
  double z = 0.0;
};

template <int kThreads>
__device__ __forceinline__ Sums block_total(const Sums& mine, float k2, float* scratch,
                                            double* wide_scratch) {
  const float most = block_reduce<kThreads>(mine.max, Max{}, scratch);
  const double z = mine.z * exp2f(k2 * (mine.max - most));
  return {most, block_reduce<kThreads>(z, Sum{}, wide_scratch)};
}

// A cell's term of D, q and q h, h = dD/dq. The term is inf where D is, and NaN where log p is.
struct Cell {
  double term, q, q_h;
};

__device__ Cell cell_of(int kind, bool truncated, double beta, double log_p, double log_q) {
  const double p = exp(log_p), q = exp(log_q);
  const double d = log_p - log_q;
  if (kind == kForwardKl) {
    const double term = p == 0.0 ? 0.0 : p * d;
    if (truncated) return {term, q, -p};
    return {term + (q - p), q, q - p};
  }
  if (kind == kReverseKl) {
    const double term = q == 0.0 ? 0.0 : -q * d;
    if (truncated) return {term, q, q + term};
    return {term - (q - p), q, term};
  }
  if (kind == kJsd) {
    const double log_m = log(beta * p + (1.0 - beta) * q);
    const double of_p = p == 0.0 ? 0.0 : beta * p * (log_p - log_m);
    const double of_q = q == 0.0 ? 0.0 : (1.0 - beta) * q * (log_q - log_m);
    return {of_p + of_q, q, of_q};
  }
  const double h = d > 0.0 ? -0.5 : (d < 0.0 ? 0.5 : 0.0);
  return {0.5 * fabs(p - q), q, q * h};
}

// A row that is not counted, or is flagged: loss and gradient are `value`.
__device__ void write_constant(const TopkDivergenceCall& call, int64_t row, float value,
                               int status) {
  if (threadIdx.x == 0) call.loss[row] = value;
  if (threadIdx.x < kSaved)
    call.saved[row * kSaved + threadIdx.x] =
        threadIdx.x == kStatus ? static_cast<float>(status) : value;
}

// Outside the support: the row's maximum and sum go to the columns of `saved` for its maximum and
// slope, its status to the last.
template <class S>
__global__ void __launch_bounds__(kBlock, 6)
    topk_divergence_outside(const __grid_constant__ TopkDivergenceCall call) {
  __shared__ unsigned bits[kWords];
  __shared__ float scratch[kWarps];
  __shared__ double wide_scratch[kWarps];
  const int64_t index = blockIdx.x;
  if (call.counted && !call.counted[index]) return;
  const Row row(call, index);
  const S* student = static_cast<const S*>(call.student) + index * call.student_stride;
  const int origin = tile_origin(student);
  float max = -FLT_MAX, z = 0.0f;
  int wrong = kSound;
  for (int first = origin; first < row.vocab; first += kStretch) {
    wrong |= mark_support(row, first, bits);
    const int end = min(row.vocab, first + kStretch);
    for (int tile = static_cast<int>(threadIdx.x); first + tile * kTile < end; tile += kBlock) {
      float s[kTile];
      load_tile(student, first + tile * kTile, row.vocab, true, -INFINITY, s);
      const unsigned mine = bits_of(bits, tile);
      float most = max;
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (mine >> i & 1u) s[i] = -INFINITY;
        most = fmaxf(most, s[i]);
      }
      if (most > max) {
        z *= exp2f(row.k2 * (max - most));
        max = most;
      }
      float add = 0.0f;
#pragma unroll
      for (int i = 0; i < kTile; ++i) add += exp2f(row.k2 * (s[i] - max));
      z += add;
    }
  }
  const bool out_of_range = __syncthreads_or(wrong & kIdOutOfRange);
  const bool twice = __syncthreads_or(wrong & kIdTwice);
  const Sums outside = block_total<kBlock>({max, z}, row.k2, scratch, wide_scratch);
  if (threadIdx.x != 0) return;
  float* saved = call.saved + index * kSaved;
  saved[kOutsideMax] = outside.max;
  saved[kOutsideSlope] = static_cast<float>(outside.z);
  saved[kStatus] = out_of_range ? kIdOutOfRange : (twice ? kIdTwice : kSound);
}

// The cells: K logits of the row, and what the sweep has found.
template <class S>
__global__ void __launch_bounds__(kCellBlock, 10)
    topk_divergence_forward(const __grid_constant__ TopkDivergenceCall call) {
  __shared__ float scratch[kCellBlock / kWarp];
  __shared__ double wide_scratch[2 * kCellBlock / kWarp];
  __shared__ double log_sums[2];
  const int64_t index = blockIdx.x;
  if (call.counted && !call.counted[index]) return write_constant(call, index, 0.0f, kSound);
  const Row row(call, index);
  float* saved = call.saved + index * kSaved;
  const Sums outside{saved[kOutsideMax], saved[kOutsideSlope]};
  const int status = static_cast<int>(saved[kStatus]);
  __syncthreads();  // `saved` is written from here on
  if (status != kSound || !row.are_parameters_valid(call.kind))
    return write_constant(call, index, NAN, status);

  const S* student = static_cast<const S*>(call.student) + index * call.student_stride;
  Sums mine;
  int present = 0;
  for (int64_t j = threadIdx.x; j < row.slots; j += kCellBlock) {
    const int64_t id = row.ids[j];
    if (id < 0) continue;
    ++present;
    const float s = to_float(student[id]);
    if (s > mine.max) {
      mine.z *= exp2f(row.k2 * (mine.max - s));
      mine.max = s;
    }
    mine.z += exp2f(row.k2 * (s - mine.max));
  }
  const Sums support = block_total<kCellBlock>(mine, row.k2, scratch, wide_scratch);
  const double tokens = block_reduce<kCellBlock>(static_cast<double>(present), Sum{}, wide_scratch);
  const float max_s = fmaxf(support.max, outside.max);
  if (threadIdx.x == 0) {
    log_sums[0] = log(support.z) + row.k * (static_cast<double>(support.max) - max_s);
    log_sums[1] = log(outside.z) + row.k * (static_cast<double>(outside.max) - max_s);
  }
  __syncthreads();
  const double log_support = log_sums[0], log_outside = log_sums[1];
  const double both = exp(log_support) + exp(log_outside), log_z = log(both);
  const bool only = call.mode == kSupportOnly, truncated = call.mode == kTruncated;
  const float scale = static_cast<float>(only ? log_support : log_z);

  double sums[2] = {0.0, 0.0};
  for (int64_t j = threadIdx.x; j < row.slots; j += kCellBlock) {
    const int64_t id = row.ids[j];
    if (id < 0) continue;
    const double log_q = row.log_q(to_float(student[id]), max_s, scale);
    const Cell cell = cell_of(call.kind, truncated, row.beta, row.log_p[j], log_q);
    sums[0] += cell.term;
    sums[1] += cell.q_h;
  }
  block_reduce_each<kCellBlock>(sums, Sum{}, wide_scratch);
  if (threadIdx.x != 0) return;

  double value = sums[0], centre = sums[1];
  Cell tail{0.0, 0.0, 0.0};
  // The tail's cell; with S the whole vocabulary there is none.
  if (call.mode == kWithTail && tokens < row.vocab) {
    const double log_p = call.log_tail ? call.log_tail[index] : -INFINITY;
    const double log_q = log_outside - log_z;
    tail = cell_of(call.kind, false, row.beta, log_p, log_q);
    value += tail.term;
    centre += tail.q_h;
  }
  if (truncated) tail.q = exp(log_outside - log_z);
  // NaN and +inf logits made the sums NaN, a row of -inf left both at 0.
  const bool sound = both > 0.0 && both < INFINITY && !(only && !(support.z > 0.0));
  if (!sound) value = NAN;
  if (!(value < INFINITY)) centre = NAN;
  // Outside S the gradient is (q_h - q c) of the tail times a token's share of it: q may be too
  // small for fp32, or h too large.
  double slope = tail.q_h - tail.q * centre;
  if (!isnan(centre)) slope = outside.z > 0.0 ? slope / outside.z : 0.0;
  const float t2 = call.scale_t2 ? row.temperature * row.temperature : 1.0f;
  const float high = static_cast<float>(centre);
  call.loss[index] = t2 * static_cast<float>(value);
  saved[kMaxS] = sound ? max_s : NAN;
  saved[kOutsideMax] = sound ? outside.max : NAN;
  saved[kLogQScale] = sound ? scale : NAN;
  saved[kCentre] = high;
  saved[kCentreLow] = static_cast<float>(centre - high);
  saved[kOutsideSlope] = static_cast<float>(slope);
}

// The sweep writes all but the support, whose logits are still there when their turn comes, also
// where `grad` is `student`.
template <class S>
__global__ void __launch_bounds__(kBlock, 4)
    topk_divergence_backward(const __grid_constant__ TopkDivergenceCall call) {
  __shared__ unsigned bits[kWords];
  const int64_t index = blockIdx.x;
  const Row row(call, index);
  __shared__ float saved[kSaved + 1];  // and the upstream gradient, each read once
  if (threadIdx.x < kSaved) saved[threadIdx.x] = call.saved[index * kSaved + threadIdx.x];
  if (threadIdx.x == kSaved) saved[kSaved] = call.grad_rows[index];
  __syncthreads();
  const float max_s = saved[kMaxS], outside_max = saved[kOutsideMax];
  const float slope = saved[kOutsideSlope], upstream = saved[kSaved];
  const S* student = static_cast<const S*>(call.student) + index * call.student_stride;
  S* grad = static_cast<S*>(call.grad) + index * call.grad_stride;
  const int origin = tile_origin(student);
  const bool wide = is_wide_aligned(grad + origin);
  const bool constant = upstream == 0.0f || isnan(saved[kCentre]);
  const bool is_read = !constant && slope != 0.0f;
  const float t2 = call.scale_t2 ? row.temperature * row.temperature : 1.0f;
  const float soft = upstream * t2 / row.temperature;
  float factor = 0.0f;
  if (is_read) factor = soft * slope;
  if (constant && upstream != 0.0f) factor = NAN;

  for (int first = origin; first < row.vocab; first += kStretch) {
    if (!constant) mark_support(row, first, bits);
    const int end = min(row.vocab, first + kStretch);
    for (int tile = static_cast<int>(threadIdx.x); first + tile * kTile < end; tile += kBlock) {
      const int start = first + tile * kTile;
      float s[kTile];
      if (is_read) load_tile(student, start, row.vocab, true, -INFINITY, s);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
        s[i] = is_read ? factor * exp2f(row.k2 * (s[i] - outside_max)) : factor;
      const unsigned mine = constant ? 0u : bits_of(bits, tile);
      if (mine == 0u) {
        store_tile(grad, start, row.vocab, wide, s);
      } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
          if (is_inside(start + i, row.vocab) && !(mine >> i & 1u))
            grad[start + i] = from_float<S>(s[i]);
      }
    }
  }
  if (constant) return;
  __syncthreads();  // the sweep has read these logits too
  const double centre = static_cast<double>(saved[kCentre]) + saved[kCentreLow];
  const double scale = saved[kLogQScale];
  for (int64_t j = threadIdx.x; j < row.slots; j += kBlock) {
    const int64_t id = row.ids[j];
    if (!row.has(id)) continue;
    const double log_q = row.log_q(to_float(student[id]), max_s, scale);
    const Cell cell = cell_of(call.kind, call.mode == kTruncated, row.beta, row.log_p[j], log_q);
    grad[id] = from_float<S>(soft * static_cast<float>(cell.q_h - cell.q * centre));
  }
}

bool is_valid(const TopkDivergenceCall& call) {
  return call.kind >= 0 && call.kind < kKinds && call.mode >= kWithTail && call.mode <= kTruncated;
}

}  // namespace
}  // namespace pydistill

PYD_API int pyd_topk_divergence_forward(const TopkDivergenceCall* call, void* stream) {
  using namespace pydistill;
  if (!is_valid(*call)) return kInvalidValue;
  if (call->rows == 0) return 0;
  return dispatch_dtype(call->student_dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const unsigned rows = static_cast<unsigned>(call->rows);
    const int error = PYD_LAUNCH((topk_divergence_outside<S>), rows, kBlock, 0, stream, *call);
    if (error != 0) return error;
    return PYD_LAUNCH((topk_divergence_forward<S>), rows, kCellBlock, 0, stream, *call);
  });
}

PYD_API int pyd_topk_divergence_backward(const TopkDivergenceCall* call, void* stream) {
  using namespace pydistill;
  if (!is_valid(*call)) return kInvalidValue;
  if (call->rows == 0) return 0;
  return dispatch_dtype(call->student_dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    return PYD_LAUNCH((topk_divergence_backward<S>), static_cast<unsigned>(call->rows), kBlock, 0,
                      stream, *call);
  });
}
