// CUDA kernels of `divergence` (docs/ops/divergence.md): one block a pair of rows in forward, one a
// student row in backward.
//
// Bytes: forward_kl and reverse_kl read a pair once, and again only where a row's sums cancel;
// the other kinds need the normalisers before their terms and read it twice. adaptive_kl looks for
// the teacher's head in between: the first sweep leaves the teacher's row in shared memory where
// the device has that much for a block, and all that follows reads it there; a longer row is read
// up to 9 more times. Statistics are a sweep of their own. Backward reads both rows once and writes
// the gradient.
//
// Every result is the same from run to run: sums have a fixed order and there are no atomics.
#include "cuda/divergence.cuh"
#include "cuda/divergence.h"

namespace pydistill {
namespace {

// Columns of `saved` and of `stats`.
enum { kMaxS, kLogZS, kMaxT, kLogZT, kValue, kCentre, kLogZOne, kShare, kSaved };
enum { kLseS, kLseT, kEntropyS, kEntropyT, kAcceptance, kAgree, kStats };

// What the options and the index tensors say about one pair.
struct Pair {
  int64_t student_row, teacher_row;
  float temperature;
  KindParams params;

  __device__ Pair(const DivergenceCall& call, int64_t pair) {
    student_row = call.student_rows ? call.student_rows[pair] : pair;
    teacher_row = call.teacher_rows ? call.teacher_rows[pair] : pair;
    const float* own = call.params ? call.params + 3 * pair : nullptr;
    temperature = own ? own[0] : call.temperature;
    params = {own ? own[1] : call.alpha, own ? own[2] : call.beta, 0.0f};
  }

  __device__ bool rows_exist(const DivergenceCall& call) const {
    return student_row >= 0 && student_row < call.student_count && teacher_row >= 0 &&
           teacher_row < call.teacher_count;
  }
};

__device__ const void* teacher_row(const DivergenceCall& call, int64_t row) {
  const int64_t size = call.teacher_dtype == static_cast<int>(Dtype::kFloat32) ? 4 : 2;
  return static_cast<const char*>(call.teacher) + row * call.teacher_stride * size;
}

template <class S>
__device__ Rows<S> rows_of(const DivergenceCall& call, const Pair& pair) {
  return Rows<S>(static_cast<const S*>(call.student) + pair.student_row * call.student_stride,
                 teacher_row(call, pair.teacher_row), call.teacher_dtype, call.vocab);
}

__device__ bool label_exists(const DivergenceCall& call, int64_t pair) {
  return !call.labels || (call.labels[pair] >= 0 && call.labels[pair] < call.vocab);
}

__device__ bool has_hard_terms(const DivergenceCall& call) {
  return call.labels != nullptr || call.z_loss != 0.0f;
}

// A row that is not counted, or is flagged: every column is `value`.
__device__ void write_constant(const DivergenceCall& call, int64_t pair, float value) {
  if (threadIdx.x == 0) call.loss[pair] = value;
  if (threadIdx.x < kSaved) call.saved[pair * kSaved + threadIdx.x] = value;
}

// Blocks that shall fit on a multiprocessor: 64 registers a thread, or 80 where 64 would spill.
template <int kKind>
constexpr int kForwardBlocks = kKind == kAlphaBeta || kKind == kAdaptiveKl ? 3 : 4;
template <int kKind>
constexpr int kBackwardBlocks = kKind == kSkewReverseKl || kKind == kAlphaBeta ? 3 : 4;

// `keep` says that the dynamic shared memory has room for the teacher's row.
template <int kKind, class S>
__global__ void __launch_bounds__(kBlock, kForwardBlocks<kKind>)
    divergence_forward(const __grid_constant__ DivergenceCall call, bool keep) {
  __shared__ float scratch[kScratch];
  const int64_t index = blockIdx.x;
  if (call.counted && !call.counted[index]) return write_constant(call, index, 0.0f);
  Pair pair(call, index);
  if (!pair.rows_exist(call) || !label_exists(call, index) ||
      !are_valid<kKind>(pair.temperature, pair.params))
    return write_constant(call, index, NAN);

  Rows<S> rows = rows_of<S>(call, pair);
  void* copy = nullptr;
  if constexpr (kKind == kAdaptiveKl) {
    PYD_DYNAMIC_SHARED(char, shared);
    if (keep) copy = rows.copy_in(shared);
  }
  const float k2 = kLog2E / pair.temperature;
  const bool hard = has_hard_terms(call), hot = hard && pair.temperature != 1.0f;
  const Seen seen = first_sweep<kKind>(rows, k2, hot, scratch, copy);
  if (copy) rows.aim(copy);
  // NaN and +inf logits made the sums NaN, a row of -inf left one at 0.
  if (!(seen.z_s > 0.0f && seen.z_t > 0.0f)) return write_constant(call, index, NAN);
  const float logz_s = logf(seen.z_s), logz_t = logf(seen.z_t);
  const Normal normal = normal_of(pair.temperature, seen.max_s, logz_s, seen.max_t, logz_t);

  Term row;
  bool infinite = false, done = false;
  if constexpr (kKind == kForwardKl || kKind == kReverseKl) {
    infinite = seen.largest_d == INFINITY;
    done = infinite || kl_of<kKind>(seen, normal, logz_s, logz_t, row);
  }
  if (!done) {
    Head head;
    if constexpr (kKind == kAdaptiveKl) head = find_head(rows, k2, seen, scratch);
    const Total total = second_sweep<kKind>(rows, normal, pair.params, head, scratch);
    infinite = is_infinite<kKind>(total.no_q, total.no_p, pair.params);
    row = total.row;
    // An error of the shift enters a KL by its square, which `excess` measures.
    const float taken = fabsf(total.excess) < kSmall ? phi_small(total.excess) : 0.0f;
    if constexpr (kKind == kForwardKl || kKind == kReverseKl)
      row.value = fmaxf(row.value - taken, 0.0f);
    if constexpr (kKind == kAdaptiveKl) {
      const float w = total.error > 0.0f ? total.head_error / total.error : 0.5f;
      pair.params.share = w;
      row.value = fmaxf(w * row.value + (1.0f - w) * total.reverse.value - taken, 0.0f);
      row.pull = w * row.pull + (1.0f - w) * total.reverse.pull;
    }
  }
  if (infinite) row = {INFINITY, kKind == kForwardKl ? 0.0f : NAN};

  if (threadIdx.x != 0) return;
  const float logz_one = hot ? logf(seen.z_one) : logz_s;
  const float t2 = call.scale_t2 ? pair.temperature * pair.temperature : 1.0f;
  float loss = t2 * row.value;
  if (hard) {
    const float lse = seen.max_s + logz_one;
    loss = call.z_loss * lse * lse + (1.0f - call.label_weight) * loss;
    if (call.labels) loss += call.label_weight * (lse - to_float(rows.student[call.labels[index]]));
  }
  call.loss[index] = loss;
  float4* saved = reinterpret_cast<float4*>(call.saved + index * kSaved);
  saved[0] = make_float4(seen.max_s, logz_s, seen.max_t, logz_t);
  saved[1] = make_float4(row.value, row.pull, logz_one, pair.params.share);
}

// Statistics of the pairs whose normalisers forward has saved.
template <class S>
__global__ void __launch_bounds__(kBlock)
    divergence_stats(const __grid_constant__ DivergenceCall call) {
  __shared__ float scratch[3 * kWarps];
  const int64_t index = blockIdx.x;
  float* stats = call.stats + index * kStats;
  const float4 saved = *reinterpret_cast<const float4*>(call.saved + index * kSaved);
  if ((call.counted && !call.counted[index]) || isnan(saved.x)) {
    if (threadIdx.x < kStats) stats[threadIdx.x] = NAN;
    return;
  }
  const Pair pair(call, index);
  const Rows<S> rows = rows_of<S>(call, pair);
  const float k = 1.0f / pair.temperature;
  const Normal normal = normal_of(pair.temperature, saved.x, saved.y, saved.z, saved.w);
  float sums[3] = {0.0f, 0.0f, 0.0f};
  float first[2] = {-INFINITY, -INFINITY};  // minus the lowest index of each maximum
  for (int tile = static_cast<int>(threadIdx.x); rows.start(tile) < rows.vocab; tile += kBlock) {
    float s[kTile], t[kTile], add[3] = {0.0f, 0.0f, 0.0f};
    rows.load_student(tile, s);
    rows.load_teacher(tile, t);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const Token x = normal.token(s[i], t[i]);
      add[0] -= times(x.q, x.log2_q);
      add[1] -= times(x.p, x.log2_p);
      add[2] += fminf(x.p, x.q);
      const float before = -static_cast<float>(rows.start(tile) + i);
      if (s[i] == saved.x) first[0] = fmaxf(first[0], before);
      if (t[i] == saved.z) first[1] = fmaxf(first[1], before);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] += add[i];
  }
  block_reduce_each<kBlock>(sums, Sum{}, scratch);
  block_reduce_each<kBlock>(first, Max{}, scratch);
  if (threadIdx.x != 0) return;
  stats[kLseS] = fmaf(k, saved.x, saved.y);
  stats[kLseT] = fmaf(k, saved.z, saved.w);
  stats[kEntropyS] = kLn2 * sums[0];
  stats[kEntropyT] = kLn2 * sums[1];
  stats[kAcceptance] = sums[2];
  stats[kAgree] = first[0] == first[1] ? 1.0f : 0.0f;
}

// All that the gradient of one pair's loss needs, times the upstream gradient:
//
//   soft (pull - q centre) + at_one softmax(s) - at_label [j = label]
struct Slope {
  Normal normal;
  KindParams params = {};
  float soft = 0.0f, centre = 0.0f;
  float at_one = 0.0f, log2_z_one = 0.0f;
  float at_label = 0.0f;
  int label = -1;
  bool poisoned = false;  // the whole row is NaN, and its logits need not be there
  const void* teacher = nullptr;
};

__device__ Slope slope_of(const DivergenceCall& call, int64_t index) {
  const Pair pair(call, index);
  const float4* saved = reinterpret_cast<const float4*>(call.saved + index * kSaved);
  const float4 norms = saved[0], rest = saved[1];
  const float upstream = call.grad_rows[index];
  const float t2 = call.scale_t2 ? pair.temperature * pair.temperature : 1.0f;
  Slope slope;
  slope.normal = normal_of(pair.temperature, norms.x, norms.y, norms.z, norms.w);
  slope.params = pair.params;
  slope.params.share = rest.w;
  slope.centre = rest.y;
  slope.soft = upstream * t2 / pair.temperature;
  if (has_hard_terms(call)) {
    slope.soft *= 1.0f - call.label_weight;
    slope.at_one = 2.0f * upstream * call.z_loss * (norms.x + rest.z);
    slope.log2_z_one = kLog2E * rest.z;
    if (call.labels) {
      slope.at_one += upstream * call.label_weight;
      slope.at_label = upstream * call.label_weight;
      slope.label = static_cast<int>(call.labels[index]);
    }
  }
  slope.poisoned = isnan(slope.centre);
  if (!slope.poisoned) slope.teacher = teacher_row(call, pair.teacher_row);
  return slope;
}

// A block writes one row of `grad`, each tile once, rounded once: a tile's pairs are summed in
// registers, and the student's tile is read before it may be overwritten.
template <int kKind, class S>
__global__ void __launch_bounds__(kBlock, kBackwardBlocks<kKind>)
    divergence_backward(const __grid_constant__ DivergenceCall call) {
  int64_t row = blockIdx.x, first = blockIdx.x, last = first + 1;
  if (call.row_start) {
    first = call.row_start[row];
    last = call.row_start[row + 1];
  } else if (call.student_rows) {
    row = call.student_rows[first];
    if (row < 0 || row >= call.student_count) return;
  }
  const auto pair_at = [&](int64_t i) { return call.row_start ? call.group[i] : i; };
  while (first < last && call.grad_rows[pair_at(first)] == 0.0f) ++first;

  const bool any = first < last;
  Slope slope;
  if (any) slope = slope_of(call, pair_at(first));
  Rows<S> rows(static_cast<const S*>(call.student) + row * call.student_stride, slope.teacher,
               call.teacher_dtype, any ? call.vocab : 0);
  S* grad = static_cast<S*>(call.grad) + row * call.grad_stride;
  const int columns = static_cast<int>(call.columns);
  const bool wide = is_wide_aligned(grad + rows.origin);
  for (int tile = static_cast<int>(threadIdx.x); rows.start(tile) < columns; tile += kBlock) {
    float s[kTile], t[kTile], sum[kTile] = {};
    rows.load_student(tile, s);
    for (int64_t i = first; i < last; ++i) {
      if (last - first > 1) {
        if (call.grad_rows[pair_at(i)] == 0.0f) continue;
        slope = slope_of(call, pair_at(i));
        rows.aim(slope.teacher);
      }
      if (!slope.poisoned) rows.load_teacher(tile, t);
#pragma unroll
      for (int e = 0; e < kTile; ++e) {
        const int j = rows.start(tile) + e;
        const Token x = slope.normal.token(s[e], t[e]);
        const float pull = term_of<kKind>(x, slope.params).pull;
        float gradient = slope.soft * (pull - x.q * slope.centre);
        if (slope.at_one != 0.0f)
          gradient += slope.at_one * exp2f(kLog2E * (s[e] - slope.normal.max_s) - slope.log2_z_one);
        if (j == slope.label) gradient -= slope.at_label;
        if (slope.poisoned) gradient = NAN;
        if (j < rows.vocab) sum[e] += gradient;
      }
    }
    store_tile(grad, rows.start(tile), columns, wide, sum);
  }
}

template <int kKind>
struct Forward {
  template <class S>
  static int launch(const DivergenceCall& call, void* stream) {
    int64_t bytes = 0;
    if (kKind == kAdaptiveKl) {
      bytes = Rows<S>::copy_bytes(call.vocab, call.teacher_dtype);
      if (bytes > PYD_SHARED_LIMIT((divergence_forward<kKind, S>))) bytes = 0;
    }
    return PYD_LAUNCH((divergence_forward<kKind, S>), static_cast<unsigned>(call.pairs), kBlock,
                      static_cast<size_t>(bytes), stream, call, bytes > 0);
  }
};

template <int kKind>
struct Backward {
  template <class S>
  static int launch(const DivergenceCall& call, void* stream) {
    const bool all_rows = call.row_start || !call.student_rows;
    const int64_t blocks = all_rows ? call.student_count : call.pairs;
    if (blocks == 0) return 0;
    return PYD_LAUNCH((divergence_backward<kKind, S>), static_cast<unsigned>(blocks), kBlock, 0,
                      stream, call);
  }
};

template <template <int> class Direction, int kKind = 0>
int launch_kind(const DivergenceCall& call, void* stream) {
  if constexpr (kKind < kKinds) {
    if (call.kind != kKind) return launch_kind<Direction, kKind + 1>(call, stream);
    return dispatch_dtype(call.student_dtype, [&](auto type) {
      return Direction<kKind>::template launch<typename decltype(type)::type>(call, stream);
    });
  } else {
    return kInvalidValue;
  }
}

}  // namespace
}  // namespace pydistill

PYD_API int pyd_divergence_forward(const DivergenceCall* call, void* stream) {
  using namespace pydistill;
  if (call->pairs == 0) return 0;
  const int error = launch_kind<Forward>(*call, stream);
  if (error != 0 || call->stats == nullptr) return error;
  return dispatch_dtype(call->student_dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    return PYD_LAUNCH((divergence_stats<S>), static_cast<unsigned>(call->pairs), kBlock, 0, stream,
                      *call);
  });
}

PYD_API int pyd_divergence_backward(const DivergenceCall* call, void* stream) {
  return pydistill::launch_kind<pydistill::Backward>(*call, stream);
}
