// Sixteen-lane vectors: AVX-512 F, BW, DQ, VL, and the bf16 dot product where the unit is compiled for it.
// The conventions are in simd_portable.h.
#pragma once
// gcc 12 takes the undefined inputs inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "common/cpu/element.h"

namespace vdit {
namespace {

struct Simd {
  static constexpr int kLanes = 16, kRows = 8, kMaxVecs = 3;
#ifdef __AVX512BF16__
  static constexpr char const* kName = "avx512_bf16";
  static constexpr bool kDotBf16 = true;
#else
  static constexpr char const* kName = "avx512";
  static constexpr bool kDotBf16 = false;
#endif
  using Vec = __m512;
  using IntVec = __m512i;

  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec load(float const* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec load(Float16 const* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)));
  }
  static Vec load(BFloat16 const* p) {
    __m512i const wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store(Float16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, Vec x) {
    __m512i const u = _mm512_castps_si512(x);
    __m512i const odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 const is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, u, _mm512_set1_epi32(0x400000));
    __m256i const packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }

  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec zero_if_neg_inf(Vec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }
  static Vec zero_if_zero(Vec x, Vec y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(0.f), _CMP_NEQ_UQ), y);
  }

  static Vec swap_pairs(Vec x) { return _mm512_permute_ps(x, 0xb1); }

  static void keep_larger(Vec& best, IntVec& index, Vec x, int32_t i) {
    __mmask16 const larger = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, larger, x);
    index = _mm512_mask_mov_epi32(index, larger, _mm512_set1_epi32(i));
  }
  static IntVec int_zero() { return _mm512_setzero_si512(); }
  static void store(int32_t* p, IntVec x) { _mm512_storeu_si512(p, x); }

  // 2^x = 2^floor(x) * 2^f with f in [0, 1). Relative error 1.5e-7, or 2.7e-6 where the result is rounded to
  // bf16 anyway. vreduceps gives f = 0 for -inf and vscalefps then gives 0, so nothing is clamped.
  template <bool kPrecise>
  static Vec exp2(Vec x) {
    Vec const f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    Vec p;
    if constexpr (kPrecise) {
      p = set1(1.8775765784e-3f);
      p = fma(p, f, set1(8.9893406257e-3f));
      p = fma(p, f, set1(5.5826317519e-2f));
      p = fma(p, f, set1(2.4015361071e-1f));
      p = fma(p, f, set1(6.9315308332e-1f));
      p = fma(p, f, set1(1.f));
    } else {
      p = set1(1.3534166850e-2f);
      p = fma(p, f, set1(5.2011463791e-2f));
      p = fma(p, f, set1(2.4144275486e-1f));
      p = fma(p, f, set1(6.9300383329e-1f));
      p = fma(p, f, set1(1.0000026226f));
    }
    return _mm512_scalef_ps(p, x);
  }

#ifdef __AVX512BF16__
  static Vec dot(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // Lane i: bf16(even[i]) in the low half, bf16(odd[i]) in the high half.
  static Vec pack_bf16(Vec even, Vec odd) {
    __m512i const halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // 16 of even, then 16 of odd
    __m512i const order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
  }
  // The same for 16 elements in memory.
  static Vec load_pairs(BFloat16 const* even, BFloat16 const* odd) {
    __m512i const low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(even)));
    __m512i const high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(odd)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif

  static void transpose(Vec (&r)[16]) {
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {  // 2x2 in each quarter
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // 4x4 in each quarter: r[i + j] holds columns j, j+4, j+8, j+12
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {  // quarters: first pairs of row groups, then pairs of pairs
      Vec const a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      Vec const c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      Vec const d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace vdit
