// Bodies of the vq family's CPU kernels, compiled once per instruction set: the unit that includes this file
// has included one simd_*.h before. Everything is internal to the unit, and nothing of the standard library
// that leaves an inline symbol is used (common/cpu/element.h says why).
//
// The product comes in two loops. For many rows, `multiply`: rows of x lie in the lanes of a vector and a
// codeword's elements are broadcast, so a code is one load of its byte and one address, and no weight is ever
// written anywhere. For few rows, `multiply_rows`: input channels lie in the lanes, a vector of weights is
// put together from the words of its codes and then used for each row.
#pragma once
#include <cstring>

#include "common/cpu/int8_gemm.h"
#include "vq/cpu_kernels.h"

namespace vdit {
namespace {

using Vec = Simd::Vec;
constexpr int kLanes = Simd::kLanes;
constexpr bool kWide = kLanes == 16;  // 32 registers, not 16

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- codes ----

template <VqFormat kFormat>
constexpr int kTileBytes = kFormat == VqFormat::k256x4 ? 512 : 768;

// Tiles of the 32 output channels from `column` on.
template <VqFormat kFormat>
inline uint8_t const* tiles_of(void const* codes, int64_t k, int64_t column) {
  int64_t const tiles = (k + kVqTileIn - 1) / kVqTileIn;
  return static_cast<uint8_t const*>(codes) + column / kVqTileOut * tiles * kTileBytes<kFormat>;
}

// The code of output 8 sub + group and inputs 32 half + 16 middle + 4 part .. + 3 of a tile (vdit/vq.h).
template <VqFormat kFormat>
inline int code_at(uint8_t const* tile, int group, int sub, int half, int middle, int part) {
  int const lane = 4 * group + part;
  if constexpr (kFormat == VqFormat::k256x4) return tile[16 * lane + 8 * half + 2 * sub + middle];
  uint16_t bits;
  std::memcpy(&bits, tile + 24 * lane + 3 * (4 * half + sub) + middle, 2);
  return middle ? bits >> 4 : bits & 4095;
}

// ---- vq_assign ----

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Ints ints(int32_t x) { return Ints{} + x; }

// How many vectors side by side fit the registers.
constexpr int assign_vecs(int dim, int count) {
  if (!kWide) return dim <= 4 && count == 1 ? 2 : 1;
  return dim <= 4 && count == 1 ? 4 : dim + 2 * count <= 10 ? 2 : 1;
}

// Puts x with its index where it belongs in the falling list best[0 .. kCount - 1], ties behind.
template <int kCount>
inline void insert(Vec (&best)[kCount], Ints (&index)[kCount], Vec x, Ints i) {
  VDIT_UNROLL
  for (int j = kCount - 1; j > 0; --j) {
    Ints const here = x > best[j], above = x > best[j - 1];
    best[j] = above ? best[j - 1] : (here ? x : best[j]);
    index[j] = above ? index[j - 1] : (here ? i : index[j]);
  }
  Ints const first = x > best[0];
  best[0] = first ? x : best[0];
  index[0] = first ? i : index[0];
}

// `codebook` has kDim floats a word, zeros past p.dim. Scores are v . c - |c|^2 / 2: the larger, the nearer.
template <int kDim, int kCount>
inline void assign_block(VqAssignParams const& p, float const* codebook, float const* half_norms,
                         int64_t begin, int rows) {
  constexpr int kVecs = assign_vecs(kDim, kCount), kRows = kVecs * kLanes;
  alignas(64) float columns[kDim][kRows] = {};
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < p.dim; ++d) columns[d][r] = p.vectors[(begin + r) * p.dim + d];
  Vec v[kVecs][kDim], best[kVecs][kCount];
  Ints index[kVecs][kCount];
  for (int i = 0; i < kVecs; ++i) {
    for (int d = 0; d < kDim; ++d) v[i][d] = Simd::load(columns[d] + i * kLanes);
    for (int j = 0; j < kCount; ++j) best[i][j] = Simd::set1(-__builtin_inff()), index[i][j] = ints(j);
  }
  for (int64_t c = 0; c < p.num_codewords; ++c, codebook += kDim) {
    VDIT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      Vec score = Simd::set1(-half_norms[c]);
      VDIT_UNROLL
      for (int d = 0; d < kDim; ++d) score = Simd::fma(v[i][d], Simd::set1(codebook[d]), score);
      insert<kCount>(best[i], index[i], score, ints(static_cast<int32_t>(c)));
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    Vec norm = Simd::set1(0.f);
    for (int d = 0; d < kDim; ++d) norm = Simd::fma(v[i][d], v[i][d], norm);
    for (int j = 0; j < min64(kCount, p.count); ++j) {
      Vec const distance = norm - (best[i][j] + best[i][j]);
      Vec const clamped = distance < 0.f ? Simd::set1(0.f) : distance;  // a NaN stays
      for (int lane = 0; lane < kLanes && i * kLanes + lane < rows; ++lane) {
        int64_t const at = (begin + i * kLanes + lane) * p.count + j;
        p.distances[at] = clamped[lane];
        p.indices[at] = index[i][j][lane];
      }
    }
  }
}

template <int kDim, int kCount>
void assign_slice(VqAssignParams const& p, float const* codebook, float const* half_norms, int64_t begin,
                  int64_t end) {
  constexpr int kRows = assign_vecs(kDim, kCount) * kLanes;
  for (; begin < end; begin += kRows)
    assign_block<kDim, kCount>(p, codebook, half_norms, begin, static_cast<int>(min64(kRows, end - begin)));
}

template <int kDim>
void assign_counts(VqAssignParams const& p, float const* codebook, float const* half_norms, int64_t begin,
                   int64_t end) {
  if (p.count == 1) return assign_slice<kDim, 1>(p, codebook, half_norms, begin, end);
  if (p.count == 2) return assign_slice<kDim, 2>(p, codebook, half_norms, begin, end);
  if (p.count <= 4) return assign_slice<kDim, 4>(p, codebook, half_norms, begin, end);
  assign_slice<kDim, 8>(p, codebook, half_norms, begin, end);
}

inline void assign(VqAssignParams const& p, float const* codebook, float const* half_norms, int64_t begin,
                   int64_t end) {
  if (p.dim <= 2) return assign_counts<2>(p, codebook, half_norms, begin, end);
  if (p.dim <= 4) return assign_counts<4>(p, codebook, half_norms, begin, end);
  if (p.dim <= 8) return assign_counts<8>(p, codebook, half_norms, begin, end);
  assign_counts<16>(p, codebook, half_norms, begin, end);
}

// ---- vq_dequantize ----

template <class T>
inline void scale_words(T const* from, int count, float scale, T* to) {
  for (int i = 0; i < count; i += kLanes)
    Simd::store(to + i, Simd::mul(Simd::load(from + i), Simd::set1(scale)));
}
inline void scale_words(int8_t const*, int, float, int8_t*) {}  // has no scale

// The 64 channels of output `row` of a tile.
template <VqFormat kFormat, class T>
inline void copy_tile(uint8_t const* tile, T const* words, int row, T* out) {
  VDIT_UNROLL
  for (int q = 0; q < 16; ++q) {
    int const code = code_at<kFormat>(tile, row % 8, row / 8, q / 8, q / 4 % 2, q % 4);
    if constexpr (kFormat == VqFormat::k256x4) {
      std::memcpy(out + 4 * q, words + 4 * code, 4 * sizeof(T));
    } else {
      std::memcpy(out + 4 * q, words + 2 * (code & 63), 2 * sizeof(T));
      std::memcpy(out + 4 * q + 2, words + 2 * (code >> 6), 2 * sizeof(T));
    }
  }
}

template <VqFormat kFormat, class T>
inline void copy_row(uint8_t const* tile, T const* words, int row, int64_t k, T* out) {
  for (; k >= kVqTileIn; k -= kVqTileIn, tile += kTileBytes<kFormat>, out += kVqTileIn)
    copy_tile<kFormat>(tile, words, row, out);
  if (k == 0) return;
  T last[kVqTileIn];
  copy_tile<kFormat>(tile, words, row, last);
  std::memcpy(out, last, k * sizeof(T));
}

template <VqFormat kFormat, class T>
void dequantize_tiles(VqDequantizeParams const& p, int64_t column) {
  constexpr int kElements = kFormat == VqFormat::k256x4 ? 1024 : 128;
  alignas(64) T scaled[kElements];
  T const* words = static_cast<T const*>(p.codebook);
  uint8_t const* const tiles = tiles_of<kFormat>(p.codes, p.k, column);
  for (int row = 0; row < min64(kVqTileOut, p.n - column); ++row) {
    if (p.row_scale != nullptr) {
      scale_words(static_cast<T const*>(p.codebook), kElements, p.row_scale[column + row], scaled);
      words = scaled;
    }
    T* const out = static_cast<T*>(p.out) + (column + row) * p.stride_out;
    copy_row<kFormat>(tiles, words, row, p.k, out);
    for (int64_t k = p.k; k < p.stride_out; ++k) out[k] = T{};
  }
}

template <VqFormat kFormat>
void dequantize_format(VqDequantizeParams const& p, int64_t column) {
  if (p.is_int8) return dequantize_tiles<kFormat, int8_t>(p, column);
  if (p.dtype == DType::kFloat32) return dequantize_tiles<kFormat, float>(p, column);
  if (p.dtype == DType::kFloat16) return dequantize_tiles<kFormat, Float16>(p, column);
  dequantize_tiles<kFormat, BFloat16>(p, column);
}

void dequantize(VqDequantizeParams const& p, int64_t column) {
  if (p.format == VqFormat::k256x4) return dequantize_format<VqFormat::k256x4>(p, column);
  dequantize_format<VqFormat::k64x2>(p, column);
}

// ---- vq_linear, few rows ----

// The four floats of a code.
template <VqFormat kFormat>
inline void four_floats(float const* words, int code, float const*& low, float const*& high) {
  low = kFormat == VqFormat::k256x4 ? words + 4 * code : words + 2 * (code & 63);
  high = kFormat == VqFormat::k256x4 ? low + 2 : words + 2 * (code >> 6);
}

#if defined(__AVX2__)
template <VqFormat kFormat>
inline __m128 four_lanes(float const* words, int code) {
  if constexpr (kFormat == VqFormat::k256x4) return _mm_loadu_ps(words + 4 * code);
  float const *low, *high;
  four_floats<kFormat>(words, code, low, high);
  __m128 const half = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<double const*>(low)));
  return _mm_loadh_pi(half, reinterpret_cast<__m64 const*>(high));
}
#endif

// Weights of output 8 sub + group and kLanes inputs from 32 half + 16 middle + kLanes piece on.
template <VqFormat kFormat>
inline Vec weights_at(uint8_t const* tile, float const* words, int group, int sub, int half, int middle,
                      int piece) {
  auto const code = [&](int part) { return code_at<kFormat>(tile, group, sub, half, middle, part); };
#if defined(__AVX512F__)
  __m512 w = _mm512_castps128_ps512(four_lanes<kFormat>(words, code(0)));
  w = _mm512_insertf32x4(w, four_lanes<kFormat>(words, code(1)), 1);
  w = _mm512_insertf32x4(w, four_lanes<kFormat>(words, code(2)), 2);
  return _mm512_insertf32x4(w, four_lanes<kFormat>(words, code(3)), 3);
#elif defined(__AVX2__)
  __m256 const w = _mm256_castps128_ps256(four_lanes<kFormat>(words, code(2 * piece)));
  return _mm256_insertf128_ps(w, four_lanes<kFormat>(words, code(2 * piece + 1)), 1);
#else
  float const *low, *high;
  four_floats<kFormat>(words, code(piece), low, high);
  return Vec{low[0], low[1], high[0], high[1]};
#endif
}

// Tiles along k whose part of x is passed over once for each output: their rows of x stay in the nearest
// cache.
constexpr int kRowTiles = 8;

// Outputs whose sums are in registers at a time: they share loads of x, and their chains of additions
// overlap.
constexpr int outputs_of(int rows) { return kWide || rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// sums[8 sub + group] += the products with rows of x over `tiles` tiles, spread over the lanes, for subs from
// `sub` on.
template <VqFormat kFormat, int kRows>
inline void add_tiles(uint8_t const* tile, int tiles, float const* words, float const* x, int64_t pitch,
                      int group, int sub, Vec (&sums)[kVqTileOut][kRows]) {
  constexpr int kOutputs = outputs_of(kRows);
  Vec acc[kOutputs][kRows];
  VDIT_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) acc[o][r] = sums[8 * (sub + o) + group][r];
  }
  for (int t = 0; t < tiles; ++t, tile += kTileBytes<kFormat>, x += kVqTileIn) {
    VDIT_UNROLL
    for (int step = 0; step < 4; ++step) {
      VDIT_UNROLL
      for (int piece = 0; piece < 16 / kLanes; ++piece) {
        Vec w[kOutputs];
        VDIT_UNROLL
        for (int o = 0; o < kOutputs; ++o)
          w[o] = weights_at<kFormat>(tile, words, group, sub + o, step / 2, step % 2, piece);
        VDIT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          Vec const row = Simd::load(x + r * pitch + 16 * step + kLanes * piece);
          VDIT_UNROLL
          for (int o = 0; o < kOutputs; ++o) acc[o][r] = Simd::fma(w[o], row, acc[o][r]);
        }
      }
    }
  }
  VDIT_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) sums[8 * (sub + o) + group][r] = acc[o][r];
  }
}

// The sums of row r of all outputs: turned round, the lanes of kLanes sums are added at once.
template <int kRows>
inline void add_lanes(Vec const (&sums)[kVqTileOut][kRows], int r, float* whole) {
  for (int o = 0; o < kVqTileOut; o += kLanes) {
    Vec lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = sums[o + i][r];
    Simd::transpose(lanes);
    for (int i = 1; i < kLanes; ++i) lanes[0] = Simd::add(lanes[0], lanes[i]);
    Simd::store(whole + o, lanes[0]);
  }
}

// Rows [row, row + rows), at most kRows of them: x has as many, what is too much is not stored.
template <VqFormat kFormat, int kRows>
void multiply_some(VqLinearParams const& p, float const* x, float const* words, int64_t row, int rows,
                   int64_t column) {
  int const tiles = static_cast<int>((p.k + kVqTileIn - 1) / kVqTileIn);
  int64_t const pitch = vq_row_pitch(p.k);
  uint8_t const* const codes = tiles_of<kFormat>(p.codes, p.k, column);
  Vec sums[kVqTileOut][kRows] = {};
  for (int t = 0; t < tiles; t += kRowTiles) {
    float const* const at = x + row * pitch + t * kVqTileIn;
    for (int group = 0; group < 8; ++group)
      for (int sub = 0; sub < 4; sub += outputs_of(kRows))
        add_tiles<kFormat>(codes + t * kTileBytes<kFormat>, static_cast<int>(min64(kRowTiles, tiles - t)),
                           words, at, pitch, group, sub, sums);
  }
  for (int r = 0; r < rows; ++r) {
    alignas(64) float whole[kVqTileOut];
    add_lanes(sums, r, whole);
    store_outputs(p.epilogue, p.n, row + r, column, static_cast<int>(min64(kVqTileOut, p.n - column)), whole);
  }
}

template <VqFormat kFormat>
void multiply_rows_format(VqLinearParams const& p, float const* x, float const* words, int64_t column) {
  for (int64_t row = 0; row < p.m; row += kVqRowMultiple) {
    int const rows = static_cast<int>(min64(kVqRowMultiple, p.m - row));
    if (rows == 1) {
      multiply_some<kFormat, 1>(p, x, words, row, rows, column);
    } else if (rows == 2) {
      multiply_some<kFormat, 2>(p, x, words, row, rows, column);
    } else {
      multiply_some<kFormat, kVqRowMultiple>(p, x, words, row, rows, column);
    }
  }
}

void multiply_rows(VqLinearParams const& p, float const* x, float const* words, int64_t column) {
  if (p.format == VqFormat::k256x4) return multiply_rows_format<VqFormat::k256x4>(p, x, words, column);
  multiply_rows_format<VqFormat::k64x2>(p, x, words, column);
}

// ---- vq_linear, many rows ----

// Vectors of rows side by side. With 32 registers 4 outputs by 6 vectors of sums, with 16 registers 4 by 3.
constexpr int kBlockVecs = kWide ? 6 : 3, kBlockRows = kBlockVecs * kLanes;

// Groups of four outputs that share a pass over x: where few vectors hold all rows, more sums at a time keep
// the multipliers busy.
constexpr int groups_of(int vecs) {
  return kWide ? (vecs == 1 ? 4 : vecs <= 3 ? 2 : 1) : (vecs == 1 ? 2 : 1);
}

struct alignas(64) Scratch {
  float x[kVqBlockChannels *
          kBlockRows];  // [words along k, rows]; when all is summed [rows, columns] of results
  float sums[kVqSumColumns * kBlockRows];  // [columns, rows]
};

// The bf16 functions of Simd exist in one unit only; S makes their names depend on a template argument.
template <bool kDot, class S = Simd>
inline Vec multiply_add(Vec a, Vec b, Vec acc) {
  if constexpr (kDot) {
    return S::dot(acc, a, b);
  } else {
    return S::fma(a, b, acc);
  }
}

// A word of x is one fp32 value or, with kDot, two bf16 neighbours. kLanes words from channel k0 on, zeros
// past k.
template <bool kDot, class T>
inline Vec load_words(T const* row, int64_t k0, int64_t k) {
  constexpr int kChannels = kDot ? 2 * kLanes : kLanes;
  T rest[kChannels] = {};
  if (k0 + kChannels > k) {
    for (int i = 0; i < kChannels && k0 + i < k; ++i) rest[i] = row[k0 + i];
    row = rest - k0;
  }
  if constexpr (kDot) {
    return Simd::load(reinterpret_cast<float const*>(row + k0));
  } else {
    return Simd::load(row + k0);
  }
}

// x[words, rows] of rows [row, row + rows) and channels [k0, k0 + words * (kDot ? 2 : 1)).
template <bool kDot, class T>
void pack_rows(VqLinearParams const& p, VqItem const& item, int64_t k0, int words, int vecs, float* x) {
  T const* const base = static_cast<T const*>(p.x);
  for (int v = 0; v < vecs; ++v) {
    for (int w = 0; w < words; w += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        int const row = v * kLanes + i;
        r[i] = row < item.rows
                   ? load_words<kDot>(base + (item.row + row) * p.stride_x, k0 + (kDot ? 2 : 1) * w, p.k)
                   : Simd::set1(0.f);
      }
      Simd::transpose(r);
      for (int i = 0; i < kLanes; ++i) Simd::store(x + ((w + i) * vecs + v) * kLanes, r[i]);
    }
  }
}

// Where the words of a code begin for its first and its last two channels.
template <bool kDot, VqFormat kFormat>
inline void find_words(float const* words, int code, float const*& low, float const*& high) {
  constexpr int kHalf = kDot ? 1 : 2;
  low = words + kHalf * (kFormat == VqFormat::k256x4 ? 2 * code : code & 63);
  high = kFormat == VqFormat::k256x4 ? low + kHalf : words + kHalf * (code >> 6);
}

template <bool kDot, int kVecs>
inline void add_word(Vec (&acc)[kVecs], Vec const (&row)[kVecs], float word) {
  Vec const all = Simd::set1(word);
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) acc[v] = multiply_add<kDot>(row[v], all, acc[v]);
}

// sums[8 sub + group] += products over `quads` quads of channels, for kGroups groups from `group` on.
template <bool kDot, VqFormat kFormat, int kVecs, int kGroups>
inline void add_products(uint8_t const* tile, int quads, int group, float const* words, float const* x,
                         float* sums) {
  constexpr int kPitch = kVecs * kLanes, kHalf = kDot ? 1 : 2;
  // A quad's rows are loaded before its codes are read where both fit the registers.
  constexpr bool kRowsFirst = kVecs * (4 * kGroups + 2 * kHalf) + 2 <= (kWide ? 32 : 16);
  Vec acc[kGroups][4][kVecs];
  VDIT_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    VDIT_UNROLL
    for (int s = 0; s < 4; ++s) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v)
        acc[g][s][v] = Simd::load(sums + (8 * s + group + g) * kPitch + v * kLanes);
    }
  }
  for (int q = 0; q < quads; ++q, x += 2 * kHalf * kPitch) {
    uint8_t const* const at = tile + q / 16 * kTileBytes<kFormat>;
    auto const find = [&](int g, int s, float const*& low, float const*& high) {
      find_words<kDot, kFormat>(words, code_at<kFormat>(at, group + g, s, q / 8 % 2, q / 4 % 2, q % 4), low,
                                high);
    };
    if constexpr (kRowsFirst) {
      Vec rows[2 * kHalf][kVecs];
      VDIT_UNROLL
      for (int w = 0; w < 2 * kHalf; ++w) {
        VDIT_UNROLL
        for (int v = 0; v < kVecs; ++v) rows[w][v] = Simd::load(x + w * kPitch + v * kLanes);
      }
      VDIT_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        VDIT_UNROLL
        for (int s = 0; s < 4; ++s) {
          float const *low, *high;
          find(g, s, low, high);
          VDIT_UNROLL
          for (int w = 0; w < 2 * kHalf; ++w)
            add_word<kDot>(acc[g][s], rows[w], w < kHalf ? low[w] : high[w - kHalf]);
        }
      }
    } else {
      float const *low[kGroups][4], *high[kGroups][4];
      VDIT_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        VDIT_UNROLL
        for (int s = 0; s < 4; ++s) find(g, s, low[g][s], high[g][s]);
      }
      VDIT_UNROLL
      for (int w = 0; w < 2 * kHalf; ++w) {
        Vec row[kVecs];
        VDIT_UNROLL
        for (int v = 0; v < kVecs; ++v) row[v] = Simd::load(x + w * kPitch + v * kLanes);
        VDIT_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          VDIT_UNROLL
          for (int s = 0; s < 4; ++s)
            add_word<kDot>(acc[g][s], row, w < kHalf ? low[g][s][w] : high[g][s][w - kHalf]);
        }
      }
    }
  }
  VDIT_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    VDIT_UNROLL
    for (int s = 0; s < 4; ++s) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v)
        Simd::store(sums + (8 * s + group + g) * kPitch + v * kLanes, acc[g][s][v]);
    }
  }
}

template <bool kDot, VqFormat kFormat, int kVecs>
inline void add_block(VqLinearParams const& p, VqItem const& item, float const* words, int64_t k0, int quads,
                      Scratch& scratch) {
  for (int column = 0; column < item.columns; column += kVqTileOut) {
    uint8_t const* const tile =
        tiles_of<kFormat>(p.codes, p.k, item.column + column) + k0 / kVqTileIn * kTileBytes<kFormat>;
    for (int group = 0; group < 8; group += groups_of(kVecs))
      add_products<kDot, kFormat, kVecs, groups_of(kVecs)>(tile, quads, group, words, scratch.x,
                                                           scratch.sums + column * kVecs * kLanes);
  }
}

template <bool kDot, VqFormat kFormat, int kVecs = 1>
inline void add_block_of(int vecs, VqLinearParams const& p, VqItem const& item, float const* words,
                         int64_t k0, int quads, Scratch& scratch) {
  if (vecs == kVecs) return add_block<kDot, kFormat, kVecs>(p, item, words, k0, quads, scratch);
  if constexpr (kVecs < kBlockVecs)
    add_block_of<kDot, kFormat, kVecs + 1>(vecs, p, item, words, k0, quads, scratch);
}

// Sums lie with rows in the lanes: a vector of rows at a time is turned round, finished and stored.
void store_item(VqLinearParams const& p, VqItem const& item, int vecs, Scratch& scratch) {
  float* const turned = scratch.x;
  int const columns = static_cast<int>(min64(item.columns, p.n - item.column));
  for (int v = 0; v < vecs; ++v) {
    for (int column = 0; column < item.columns; column += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = Simd::load(scratch.sums + ((column + i) * vecs + v) * kLanes);
      Simd::transpose(r);
      for (int i = 0; i < kLanes; ++i) Simd::store(turned + i * kVqSumColumns + column, r[i]);
    }
    for (int i = 0; i < kLanes && v * kLanes + i < item.rows; ++i)
      store_outputs(p.epilogue, p.n, item.row + v * kLanes + i, item.column, columns,
                    turned + i * kVqSumColumns);
  }
}

template <bool kDot, VqFormat kFormat, class T>
void multiply_item(VqLinearParams const& p, float const* words, VqItem const& item, Scratch& scratch) {
  int const vecs = (item.rows + kLanes - 1) / kLanes;
  for (int i = 0; i < item.columns * vecs * kLanes; i += kLanes)
    Simd::store(scratch.sums + i, Simd::set1(0.f));
  for (int64_t k0 = 0; k0 < p.k; k0 += kVqBlockChannels) {
    // Whole vectors of words, zeros past k.
    int const quads = static_cast<int>((min64(kVqBlockChannels, p.k - k0) + 3) / 4);
    int const vectors = (quads * (kDot ? 2 : 4) + kLanes - 1) / kLanes;
    pack_rows<kDot, T>(p, item, k0, vectors * kLanes, vecs, scratch.x);
    add_block_of<kDot, kFormat>(vecs, p, item, words, k0, quads, scratch);
  }
  store_item(p, item, vecs, scratch);
}

template <VqFormat kFormat>
void multiply_format(VqLinearParams const& p, float const* words, VqItem const& item, Scratch& scratch) {
  if (p.dtype == DType::kFloat32) return multiply_item<false, kFormat, float>(p, words, item, scratch);
  if (p.dtype == DType::kFloat16) return multiply_item<false, kFormat, Float16>(p, words, item, scratch);
  multiply_item<Simd::kDotBf16, kFormat, BFloat16>(p, words, item, scratch);
}

void multiply(VqLinearParams const& p, float const* words, VqItem const& item, void* scratch) {
  Scratch& space = *static_cast<Scratch*>(scratch);
  if (p.format == VqFormat::k256x4) return multiply_format<VqFormat::k256x4>(p, words, item, space);
  multiply_format<VqFormat::k64x2>(p, words, item, space);
}

// ---- vq_linear, int8 ----

// Words of the codebook, 128 added to each byte, as panels of the int8 product. A word of 64x2 is in the low
// half.
template <VqFormat kFormat>
struct VqPanel {
  static constexpr int kOffset = 128;
  VqLinearParams const& p;
  uint32_t const* words;

  void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const {
    for (int64_t n = n0; n < n0 + kGemmColumns && n < p.n; n += kVqTileOut) {
      uint8_t const* const tiles = tiles_of<kFormat>(p.codes, p.k, n) + k0 / kVqTileIn * kTileBytes<kFormat>;
      for (int k = 0; k < depth; k += kVqTileIn)
        fill_tile(tiles + k / kVqTileIn * kTileBytes<kFormat>, panel + k * kGemmColumns + 4 * (n - n0));
    }
  }

 private:
  void fill_tile(uint8_t const* tile, uint8_t* out) const {
    for (int row = 0; row < kVqTileOut; ++row) {
      VDIT_UNROLL
      for (int q = 0; q < 16; ++q) {
        int const code = code_at<kFormat>(tile, row % 8, row / 8, q / 8, q / 4 % 2, q % 4);
        uint32_t const word =
            kFormat == VqFormat::k256x4 ? words[code] : words[code & 63] | words[code >> 6] << 16;
        std::memcpy(out + q * 4 * kGemmColumns + 4 * row, &word, 4);
      }
    }
  }
};

void multiply_int8(VqLinearParams const& p, uint32_t const* words, GemmItem const& item,
                   int32_t const* x_sums, void* scratch) {
  GemmRows const x{static_cast<int8_t const*>(p.x), p.stride_x, p.k};
  if (p.format == VqFormat::k256x4) {
    int8_gemm(x, p.n, VqPanel<VqFormat::k256x4>{p, words}, p.epilogue, item, x_sums, scratch);
  } else {
    int8_gemm(x, p.n, VqPanel<VqFormat::k64x2>{p, words}, p.epilogue, item, x_sums, scratch);
  }
}

void sum_vq_rows(VqLinearParams const& p, int64_t begin, int64_t end, int32_t* sums) {
  sum_rows(GemmRows{static_cast<int8_t const*>(p.x), p.stride_x, p.k}, begin, end, sums);
}

// ---- what a unit is given ----

template <class T>
inline void widen_words(T const* from, int count, float* to) {
  for (int i = 0; i < count; i += kLanes) Simd::store(to + i, Simd::load(from + i));
}

// The codebook in fp32, or as it is where pairs of bf16 are multiplied.
void make_words(VqLinearParams const& p, bool pairs, float* words) {
  int const count = p.format == VqFormat::k256x4 ? 1024 : 128;
  if (p.dtype == DType::kFloat32) return widen_words(static_cast<float const*>(p.codebook), count, words);
  if (p.dtype == DType::kFloat16) return widen_words(static_cast<Float16 const*>(p.codebook), count, words);
  if (!pairs || !Simd::kDotBf16) return widen_words(static_cast<BFloat16 const*>(p.codebook), count, words);
  std::memcpy(words, p.codebook, count * 2);
}

void widen_row(VqLinearParams const& p, int64_t row, float* out) {
  for (int64_t k = 0; k < vq_row_pitch(p.k); k += kLanes) {
    Vec x;
    if (p.dtype == DType::kFloat32) {
      x = load_words<false>(static_cast<float const*>(p.x) + row * p.stride_x, k, p.k);
    } else if (p.dtype == DType::kFloat16) {
      x = load_words<false>(static_cast<Float16 const*>(p.x) + row * p.stride_x, k, p.k);
    } else {
      x = load_words<false>(static_cast<BFloat16 const*>(p.x) + row * p.stride_x, k, p.k);
    }
    Simd::store(out + k, x);
  }
}

}  // namespace
}  // namespace vdit

#define VDIT_VQ_CPU_KERNELS                                                                  \
  {vdit::Simd::kName, vdit::kBlockRows,    sizeof(vdit::Scratch), sizeof(vdit::GemmScratch), \
   vdit::assign,      vdit::dequantize,    vdit::multiply_rows,   vdit::multiply,            \
   vdit::sum_vq_rows, vdit::multiply_int8, vdit::make_words,      vdit::widen_row}
