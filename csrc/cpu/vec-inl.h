// Vectors of fp32 as wide as the target: one small set of operations, so that a kernel is written
// once. V holds kLanes floats, M a lane mask. Max, Min and comparisons treat NaN as x86 does:
// Max(a, b) and Min(a, b) return b if either is NaN, comparisons are false.
//
// Included once per target by foreach_target.h, hence the toggled guard.
#if defined(PD_VEC_INL_H) == defined(PD_TOGGLE)
#ifdef PD_VEC_INL_H
#undef PD_VEC_INL_H
#else
#define PD_VEC_INL_H
#endif

namespace pd::PD_NAMESPACE {

#define PD_INLINE inline __attribute__((always_inline))
#define PD_INLINE_LAMBDA __attribute__((always_inline))

#if PD_TARGET >= PD_TARGET_AVX512

inline constexpr int kLanes = 16;
struct V {
  __m512 v;
};
using M = __mmask16;

PD_INLINE V Set(float x) { return {_mm512_set1_ps(x)}; }
PD_INLINE V Load(const float* p) { return {_mm512_loadu_ps(p)}; }
PD_INLINE void Store(V a, float* p) { _mm512_storeu_ps(p, a.v); }
PD_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
PD_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
PD_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
PD_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
PD_INLINE V Fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
PD_INLINE V Fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
PD_INLINE V Fms(V a, V b, V c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
PD_INLINE V Max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
PD_INLINE V Min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
PD_INLINE V Abs(V a) { return {_mm512_abs_ps(a.v)}; }
PD_INLINE V Neg(V a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
PD_INLINE V Sqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
PD_INLINE M Lt(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
PD_INLINE M Le(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
PD_INLINE M Eq(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
PD_INLINE M And(M a, M b) { return a & b; }
PD_INLINE M Or(M a, M b) { return a | b; }
PD_INLINE unsigned Bits(M m) { return m; }
PD_INLINE V Select(M m, V yes, V no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
PD_INLINE V Where(M m, V a) { return {_mm512_maskz_mov_ps(m, a.v)}; }  // 0 where not m
PD_INLINE V Round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// x * 2^floor(n); exact limits at both ends.
PD_INLINE V Scale2(V x, V n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Entry (low four bits of the lane) of a table of 16.
PD_INLINE V Lookup16(V bits, V table) {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(bits.v), table.v)};
}
// 1 / x to 2^-14.
PD_INLINE V ReciprocalEstimate(V x) { return {_mm512_rcp14_ps(x.v)}; }
// x = m 2^e with m in [1, 2), and in the low bits of `sixteenth` which of [1, 2) has m; for normal,
// positive x.
PD_INLINE void SplitSixteenths(V x, V& m, V& e, V& sixteenth) {
  m.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  e.v = _mm512_getexp_ps(x.v);
  sixteenth.v = _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(m.v), 19));
}
// x = m 2^e with m in [0.75, 1.5), for positive x (subnormals included).
PD_INLINE void Split2(V x, V& m, V& e) {
  m.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  e.v = _mm512_sub_ps(_mm512_getexp_ps(x.v), _mm512_getexp_ps(m.v));
}
// Moves the lanes of m to the front of `to`, which has room for kLanes; returns their number.
PD_INLINE int64_t Compress(M m, V a, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, a.v));
  return __builtin_popcount(m);
}
PD_INLINE float Sum(V a) { return _mm512_reduce_add_ps(a.v); }
// sums[j] = Sum(x[j])
PD_INLINE void FourSums(const V (&x)[4], float* sums) {
  const __m512 ab =
      _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 cd =
      _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
PD_INLINE float MaxOf(V a) { return _mm512_reduce_max_ps(a.v); }
PD_INLINE float MinOf(V a) { return _mm512_reduce_min_ps(a.v); }
PD_INLINE V LoadBf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
PD_INLINE V LoadF16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PD_INLINE void StoreF16(V a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PD_INLINE void StoreBf16(V a, uint16_t* p) {
#if PD_TARGET >= PD_TARGET_AVX512_BF16
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
}
// Two vectors without NaN, 2 kLanes numbers.
PD_INLINE void StoreBf16(V a, V b, uint16_t* p) {
  StoreBf16(a, p);
  StoreBf16(b, p + kLanes);
}
PD_INLINE bool Aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 63) == 0; }
PD_INLINE void Stream(V a, float* p) { _mm512_stream_ps(p, a.v); }
// Pairs of 16-bit numbers, a pair a lane; and of bf16 pairs the first or the second of each.
PD_INLINE V LoadPairs(const uint16_t* p) { return Load(reinterpret_cast<const float*>(p)); }
PD_INLINE V FirstBf16(V pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))};
}
PD_INLINE V SecondBf16(V pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v),
                                               _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}
#if PD_TARGET >= PD_TARGET_AVX512_BF16
// c + a b over the pairs of bf16 in each lane, the second of a pair first; subnormals count as 0.
PD_INLINE V DotBf16(V a, V b, V c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// Pairs from 2 kLanes numbers in order, rounded.
PD_INLINE V RoundPairs(V low, V high) {
  return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high.v, low.v))};
}
// Pairs of which the firsts and the seconds come apart: bf16 numbers, or fp32 ones to be rounded.
PD_INLINE V JoinBf16(const uint16_t* firsts, const uint16_t* seconds) {
  const V low = LoadBf16(firsts), high = LoadBf16(seconds);
  return {
      _mm512_or_ps(_mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16)), high.v)};
}
PD_INLINE V JoinRounded(V firsts, V seconds) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(seconds.v, firsts.v));
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
#endif
// Lane j of x[i] becomes lane i of x[j]. Zipping x[i] with x[i + 8] moves the highest bit of the
// row's number to the bottom of the lane's; four times exchanges the two numbers.
PD_INLINE void Transpose(V (&x)[kLanes]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int round = 0; round < 4; ++round) {
    V y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i].v = _mm512_permutex2var_ps(x[i].v, low, x[i + kLanes / 2].v);
      y[2 * i + 1].v = _mm512_permutex2var_ps(x[i].v, high, x[i + kLanes / 2].v);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}
// Transpose of the vectors at line[0 .. kLanes). Quarters of four lines come together as they are
// loaded, which leaves half the shuffles.
PD_INLINE void LoadTransposed(const float* const (&line)[kLanes], V (&x)[kLanes]) {
  for (int quarter = 0; quarter < kLanes; quarter += 4) {
    const auto part = [&](int i) PD_INLINE_LAMBDA { return _mm_loadu_ps(line[i] + quarter); };
    __m512 four[4], zipped[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = _mm512_broadcast_f32x4(part(i));
      four[i] = _mm512_mask_broadcast_f32x4(four[i], 0x00f0, part(i + 4));
      four[i] = _mm512_mask_broadcast_f32x4(four[i], 0x0f00, part(i + 8));
      four[i] = _mm512_mask_broadcast_f32x4(four[i], 0xf000, part(i + 12));
    }
    for (int i = 0; i < 4; i += 2) {
      zipped[i] = _mm512_unpacklo_ps(four[i], four[i + 1]);
      zipped[i + 1] = _mm512_unpackhi_ps(four[i], four[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      x[quarter + 2 * i].v = _mm512_shuffle_ps(zipped[i], zipped[i + 2], 0x44);
      x[quarter + 2 * i + 1].v = _mm512_shuffle_ps(zipped[i], zipped[i + 2], 0xee);
    }
  }
}

#elif PD_TARGET == PD_TARGET_AVX2

inline constexpr int kLanes = 8;
struct V {
  __m256 v;
};
struct M {
  __m256 v;
};

PD_INLINE V Set(float x) { return {_mm256_set1_ps(x)}; }
PD_INLINE V Load(const float* p) { return {_mm256_loadu_ps(p)}; }
PD_INLINE void Store(V a, float* p) { _mm256_storeu_ps(p, a.v); }
PD_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
PD_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
PD_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
PD_INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
PD_INLINE V Fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PD_INLINE V Fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
PD_INLINE V Fms(V a, V b, V c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
PD_INLINE V Max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
PD_INLINE V Min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
PD_INLINE V Abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PD_INLINE V Neg(V a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
PD_INLINE V Sqrt(V a) { return {_mm256_sqrt_ps(a.v)}; }
PD_INLINE M Lt(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
PD_INLINE M Le(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
PD_INLINE M Eq(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
PD_INLINE M And(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
PD_INLINE M Or(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
PD_INLINE unsigned Bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m.v)); }
PD_INLINE V Select(M m, V yes, V no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
PD_INLINE V Where(M m, V a) { return {_mm256_and_ps(m.v, a.v)}; }
PD_INLINE V Round(V a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PD_INLINE V Pow2(__m256i n) {  // 2^n for n in [-126, 127]
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}
PD_INLINE V Scale2(V x, V n) {  // in two steps, so that n may pass the exponent's range
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return x * Pow2(half) * Pow2(_mm256_sub_epi32(whole, half));
}
// 2^n for n in [-126, 127], of which the low bits of `biased` hold n + 127.
PD_INLINE V Pow2OfLowBits(V biased) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23))};
}
PD_INLINE void Split2(V x, V& m, V& e) {
  const M tiny = Lt(x, Set(1.17549435e-38f));
  x = Select(tiny, x * Set(16777216.0f), x);
  const __m256i shifted =
      _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_castps_si256(_mm256_set1_ps(0.75f)));
  const __m256i power = _mm256_srai_epi32(shifted, 23);
  m.v =
      _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(power, 23)));
  e = V{_mm256_cvtepi32_ps(power)} - Where(tiny, Set(24.0f));
}
PD_INLINE int64_t Compress(M m, V a, float* to) {
  float lanes[kLanes];
  Store(a, lanes);
  int64_t n = 0;
  for (unsigned bits = Bits(m); bits; bits &= bits - 1) to[n++] = lanes[__builtin_ctz(bits)];
  return n;
}
PD_INLINE float Sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PD_INLINE void FourSums(const V (&x)[4], float* sums) {
  const __m256 ab = _mm256_hadd_ps(x[0].v, x[1].v), cd = _mm256_hadd_ps(x[2].v, x[3].v);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
PD_INLINE float MaxOf(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
PD_INLINE float MinOf(V a) {
  __m128 s = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_min_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
}
PD_INLINE V LoadBf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
PD_INLINE V LoadF16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PD_INLINE void StoreF16(V a, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PD_INLINE void StoreBf16(V a, uint16_t* p) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
PD_INLINE __m256i RoundedBf16(V a) {  // in the low halves, for all but NaN
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(up, 16);
}
// Two vectors without NaN, 2 kLanes numbers.
PD_INLINE void StoreBf16(V a, V b, uint16_t* p) {
  const __m256i packed = _mm256_packus_epi32(RoundedBf16(a), RoundedBf16(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
PD_INLINE bool Aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 31) == 0; }
PD_INLINE void Stream(V a, float* p) { _mm256_stream_ps(p, a.v); }
PD_INLINE V LoadPairs(const uint16_t* p) { return Load(reinterpret_cast<const float*>(p)); }
PD_INLINE V FirstBf16(V pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))};
}
PD_INLINE V SecondBf16(V pairs) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_and_ps(pairs.v, _mm256_castsi256_ps(high))};
}
PD_INLINE void Transpose(V (&x)[kLanes]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
PD_INLINE void LoadTransposed(const float* const (&line)[kLanes], V (&x)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) x[i] = Load(line[i]);
  Transpose(x);
}

#else

inline constexpr int kLanes = 1;
struct V {
  float v;
};
using M = bool;

PD_INLINE float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
PD_INLINE uint32_t ToBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
PD_INLINE V Set(float x) { return {x}; }
PD_INLINE V Load(const float* p) { return {*p}; }
PD_INLINE void Store(V a, float* p) { *p = a.v; }
PD_INLINE V operator+(V a, V b) { return {a.v + b.v}; }
PD_INLINE V operator-(V a, V b) { return {a.v - b.v}; }
PD_INLINE V operator*(V a, V b) { return {a.v * b.v}; }
PD_INLINE V operator/(V a, V b) { return {a.v / b.v}; }
// Without an FMA instruction the double product is exact and the sum rounds twice, near enough.
PD_INLINE V Fma(V a, V b, V c) { return {static_cast<float>(double(a.v) * b.v + c.v)}; }
PD_INLINE V Fnma(V a, V b, V c) { return {static_cast<float>(c.v - double(a.v) * b.v)}; }
PD_INLINE V Fms(V a, V b, V c) { return {static_cast<float>(double(a.v) * b.v - c.v)}; }
PD_INLINE V Max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
PD_INLINE V Min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
PD_INLINE V Abs(V a) { return {FromBits(ToBits(a.v) & 0x7fffffffu)}; }
PD_INLINE V Neg(V a) { return {-a.v}; }
PD_INLINE V Sqrt(V a) { return {std::sqrt(a.v)}; }
PD_INLINE M Lt(V a, V b) { return a.v < b.v; }
PD_INLINE M Le(V a, V b) { return a.v <= b.v; }
PD_INLINE M Eq(V a, V b) { return a.v == b.v; }
PD_INLINE M And(M a, M b) { return a && b; }
PD_INLINE M Or(M a, M b) { return a || b; }
PD_INLINE unsigned Bits(M m) { return m; }
PD_INLINE V Select(M m, V yes, V no) { return m ? yes : no; }
PD_INLINE V Where(M m, V a) { return {m ? a.v : 0.0f}; }
PD_INLINE V Round(V a) { return {std::nearbyint(a.v)}; }
PD_INLINE V Scale2(V x, V n) {
  const int whole = n.v == n.v ? static_cast<int>(n.v) : 0, half = whole >> 1;
  return {x.v * FromBits(uint32_t(half + 127) << 23) *
          FromBits(uint32_t(whole - half + 127) << 23)};
}
PD_INLINE V Pow2OfLowBits(V biased) { return {FromBits(ToBits(biased.v) << 23)}; }
PD_INLINE void Split2(V x, V& m, V& e) {
  const bool tiny = x.v < 1.17549435e-38f;
  const uint32_t bits = ToBits(tiny ? x.v * 16777216.0f : x.v);
  const int32_t power = static_cast<int32_t>(bits - ToBits(0.75f)) >> 23;
  m.v = FromBits(bits - (uint32_t(power) << 23));
  e.v = static_cast<float>(power) - (tiny ? 24.0f : 0.0f);
}
PD_INLINE int64_t Compress(M m, V a, float* to) {
  *to = a.v;
  return m;
}
PD_INLINE float Sum(V a) { return a.v; }
PD_INLINE void FourSums(const V (&x)[4], float* sums) {
  for (int j = 0; j < 4; ++j) sums[j] = x[j].v;
}
PD_INLINE float MaxOf(V a) { return a.v; }
PD_INLINE float MinOf(V a) { return a.v; }
PD_INLINE V LoadBf16(const uint16_t* p) { return {FromBits(uint32_t(*p) << 16)}; }
PD_INLINE V LoadF16(const uint16_t* p) {
  const uint32_t sign = uint32_t(*p & 0x8000) << 16, rest = *p & 0x7fff;
  if (rest >= 0x7c00) return {FromBits(sign | 0x7f800000u | (rest & 0x3ff) << 13)};
  if (rest >= 0x0400) return {FromBits(sign | ((rest << 13) + 0x38000000u))};
  const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
  return {FromBits(sign | ToBits(small))};
}
PD_INLINE void StoreBf16(V a, uint16_t* p) {
  const uint32_t bits = ToBits(a.v);
  *p = a.v != a.v ? uint16_t((bits | 0x400000u) >> 16)
                  : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
PD_INLINE void StoreBf16(V a, V b, uint16_t* p) {
  StoreBf16(a, p);
  StoreBf16(b, p + kLanes);
}
PD_INLINE void StoreF16(V a, uint16_t* p) {
  const uint32_t bits = ToBits(a.v), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    *p = uint16_t(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    *p = uint16_t(sign | 0x7c00u);
  } else if (rest >= 0x38800000u) {
    *p = uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  } else {  // a subnormal: the float adder rounds to multiples of 2^-24 for us
    const uint32_t half = ToBits(FromBits(rest) + 0.5f) - ToBits(0.5f);
    *p = uint16_t(sign | half);
  }
}
PD_INLINE bool Aligned(const void*) { return false; }
PD_INLINE void Stream(V a, float* p) { *p = a.v; }
PD_INLINE V LoadPairs(const uint16_t* p) { return {FromBits(uint32_t(p[1]) << 16 | p[0])}; }
PD_INLINE V FirstBf16(V pairs) { return {FromBits(ToBits(pairs.v) << 16)}; }
PD_INLINE V SecondBf16(V pairs) { return {FromBits(ToBits(pairs.v) & 0xffff0000u)}; }
PD_INLINE void Transpose(V (&)[kLanes]) {}
PD_INLINE void LoadTransposed(const float* const (&line)[kLanes], V (&x)[kLanes]) {
  x[0] = Load(line[0]);
}

#endif

}  // namespace pd::PD_NAMESPACE
#endif
