// Dot products of unsigned and signed bytes, four at a time, for each instruction set that a unit may be
// compiled for. One struct Int8Dot each:
//   kRows, kVecs   the register block: rows, and vectors of kColumns columns
//   kDepth         depth of a panel, a multiple of 64: GemmScratch fits the cache
//   Activation     what rows are read as; take_rows() gives `count` of them, converted into `space` where
//   need be dot(sums, w, x)   adds to every column's sum its four products; exact, and modulo 2^32 beyond
//   store(c, sums, add)   kColumns sums to memory, or added to what lies there
// NOTE: vpmaddubsw is not used: it saturates at 16 bits, which 2 * 255 * 127 exceeds.
#pragma once
#include "common/cpu/element.h"

#define VDIT_UNROLL _Pragma("GCC unroll 16")

namespace vdit {
namespace {

#if defined(__AVX2__)
// NOTE: without this barrier gcc 12 loads a vector again for every row that takes it, and a Zen 4 core loads
// one of 64 bytes a cycle: products took 1.3 x as long.
template <class Register>
inline Register keep(Register w) {
  asm("" : "+v"(w));
  return w;
}
#endif

#if defined(__AVX512VNNI__)

struct Int8Dot {
  static constexpr int kRows = 6, kVecs = 4, kColumns = 16, kDepth = 4096;
  using Activation = int8_t;
  using Sums = __m512i;
  using Weights = __m512i;
  using Quad = __m512i;

  static Activation const* take_rows(int8_t const* x, int64_t&, int, int, Activation*) { return x; }
  static Sums zero() { return _mm512_setzero_si512(); }
  static Weights load(uint8_t const* p) { return keep(_mm512_load_si512(p)); }
  static Quad broadcast(Activation const* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  static Sums dot(Sums sums, Weights w, Quad x) { return _mm512_dpbusd_epi32(sums, w, x); }
  static void store(int32_t* c, Sums sums, bool add) {
    _mm512_store_si512(c, add ? _mm512_add_epi32(sums, _mm512_load_si512(c)) : sums);
  }
};

#else

// Rows widened to 16 bits, so that a multiplication of 16-bit pairs is exact.
struct WidenedRows {
  using Activation = int16_t;

  static Activation const* take_rows(int8_t const* x, int64_t& stride, int count, int depth,
                                     Activation* space) {
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < depth; ++k) space[r * depth + k] = x[r * stride + k];
    stride = depth;
    return space;
  }
};

#if defined(__AVX512BW__)

// Two neighbouring sums a column, added at the end.
struct Int8Dot : WidenedRows {
  static constexpr int kRows = 6, kVecs = 4, kColumns = 8, kDepth = 1024;
  using Sums = __m512i;
  using Weights = __m512i;
  using Quad = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }
  static Weights load(uint8_t const* p) {
    return keep(_mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<__m256i const*>(p))));
  }
  static Quad broadcast(Activation const* p) {
    long long quad;
    std::memcpy(&quad, p, 8);
    return _mm512_set1_epi64(quad);
  }
  static Sums dot(Sums sums, Weights w, Quad x) { return _mm512_add_epi32(sums, _mm512_madd_epi16(w, x)); }
  static void store(int32_t* c, Sums sums, bool add) {
    __m256i y = _mm512_cvtepi64_epi32(_mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32)));
    __m256i* const out = reinterpret_cast<__m256i*>(c);
    if (add) y = _mm256_add_epi32(y, _mm256_load_si256(out));
    _mm256_store_si256(out, y);
  }
};

#elif defined(__AVX2__)

struct Int8Dot : WidenedRows {
  static constexpr int kRows = 6, kVecs = 2, kColumns = 4, kDepth = 1024;
  using Sums = __m256i;
  using Weights = __m256i;
  using Quad = __m256i;

  static Sums zero() { return _mm256_setzero_si256(); }
  static Weights load(uint8_t const* p) {
    return keep(_mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<__m128i const*>(p))));
  }
  static Quad broadcast(Activation const* p) {
    long long quad;
    std::memcpy(&quad, p, 8);
    return _mm256_set1_epi64x(quad);
  }
  static Sums dot(Sums sums, Weights w, Quad x) { return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x)); }
  static void store(int32_t* c, Sums sums, bool add) {
    __m256i const both = _mm256_add_epi32(sums, _mm256_srli_epi64(sums, 32));  // in the even lanes
    __m256i const order = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
    __m128i y = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(both, order));
    __m128i* const out = reinterpret_cast<__m128i*>(c);
    if (add) y = _mm_add_epi32(y, _mm_load_si128(out));
    _mm_store_si128(out, y);
  }
};

#else

struct Int8Dot : WidenedRows {
  static constexpr int kRows = 6, kVecs = 1, kColumns = 4, kDepth = 1024;
  typedef int32_t Sums __attribute__((vector_size(16)));
  struct Weights {
    Sums part[4];  // each column's t-th byte
  };
  struct Quad {
    int32_t x[4];
  };

  static Sums zero() { return Sums{0, 0, 0, 0}; }
  static Weights load(uint8_t const* p) {
    Sums words;
    std::memcpy(&words, p, 16);
    return {{words & 255, words >> 8 & 255, words >> 16 & 255, words >> 24 & 255}};
  }
  static Quad broadcast(Activation const* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Sums dot(Sums sums, Weights w, Quad x) {
    for (int t = 0; t < 4; ++t) sums += w.part[t] * x.x[t];
    return sums;
  }
  static void store(int32_t* c, Sums sums, bool add) {
    Sums old = zero();
    if (add) std::memcpy(&old, c, 16);
    old += sums;
    std::memcpy(c, &old, 16);
  }
};

#endif
#endif

}  // namespace
}  // namespace vdit
