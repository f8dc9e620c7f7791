// Eight-lane vectors: AVX2, FMA, F16C. The conventions are in simd_portable.h.
#pragma once
#include <immintrin.h>

#include "common/cpu/element.h"

namespace vdit {
namespace {

struct Simd {
  static constexpr char const* kName = "avx2";
  static constexpr int kLanes = 8, kRows = 4, kMaxVecs = 3;
  static constexpr bool kDotBf16 = false;
  using Vec = __m256;
  using IntVec = __m256i;

  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec load(float const* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec load(Float16 const* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)));
  }
  static Vec load(BFloat16 const* p) {
    __m256i const wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store(Float16* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, Vec x) {
    __m256i const u = _mm256_castps_si256(x);
    __m256i const odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i const rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i const quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i const is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i const high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    __m128i const packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }

  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec zero_if_neg_inf(Vec x) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-__builtin_inff()), _CMP_EQ_OQ), x);
  }
  static Vec zero_if_zero(Vec x, Vec y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(0.f), _CMP_EQ_OQ), y);
  }

  static Vec swap_pairs(Vec x) { return _mm256_permute_ps(x, 0xb1); }

  static void keep_larger(Vec& best, IntVec& index, Vec x, int32_t i) {
    Vec const larger = _mm256_cmp_ps(x, best, _CMP_GT_OQ);
    best = _mm256_blendv_ps(best, x, larger);
    index = _mm256_blendv_epi8(index, _mm256_set1_epi32(i), _mm256_castps_si256(larger));
  }
  static IntVec int_zero() { return _mm256_setzero_si256(); }
  static void store(int32_t* p, IntVec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

  template <bool kPrecise>
  static Vec exp2(Vec x) {
    x = _mm256_max_ps(set1(-127.f), x);
    Vec const n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec const f = _mm256_sub_ps(x, n);
    Vec p = set1(1.327647129e-3f);
    p = fma(p, f, set1(9.675540961e-3f));
    p = fma(p, f, set1(5.550713092e-2f));
    p = fma(p, f, set1(2.402212024e-1f));
    p = fma(p, f, set1(6.931469440e-1f));
    p = fma(p, f, set1(1.f));
    __m256i const biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));  // factor +0 for x < -126.5
  }

  static void transpose(Vec (&r)[8]) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2) {  // 2x2 in each quarter
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // 4x4 in each half
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace vdit
