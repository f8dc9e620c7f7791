// Weights of every format as panels of bytes (common/cpu/int8_gemm.h), and as rows of int8.
#pragma once
#include "common/cpu/int8_gemm.h"
#include "linear/params.h"

namespace vdit {
namespace {

constexpr int kTileCodes = 32, kTileBytes = 512;
constexpr int kPanelPitch = kGemmColumns * 4;  // bytes from quad to quad of a panel

typedef uint32_t Words __attribute__((vector_size(sizeof(Simd::Vec))));

inline uint32_t load_word(void const* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
inline void store_word(void* p, uint32_t word) { std::memcpy(p, &word, 4); }

// ---- int8 ----

// kLanes rows, kLanes neighbouring words of each: words of one column become vectors of neighbouring rows.
inline void transpose_words(uint8_t const* const (&row)[Simd::kLanes], int64_t k, uint8_t* panel) {
  Simd::Vec words[Simd::kLanes];
  for (int i = 0; i < Simd::kLanes; ++i) {
    Simd::Vec const x = Simd::load(reinterpret_cast<float const*>(row[i] + k));
    words[i] = (Simd::Vec)((Words)x ^ 0x80808080u);
  }
  Simd::transpose(words);
  for (int i = 0; i < Simd::kLanes; ++i)
    Simd::store(reinterpret_cast<float*>(panel + i * kPanelPitch), words[i]);
}

struct Int8Panel {
  static constexpr int kOffset = 128;
  int8_t const* weight;
  int64_t stride, n, k;

  void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const {
    constexpr int kStep = 4 * Simd::kLanes;
    int const whole = static_cast<int>(k - k0 < depth ? k - k0 : depth) / kStep * kStep;
    for (int column = 0; column < kGemmColumns; column += Simd::kLanes) {
      uint8_t const* row[Simd::kLanes];
      for (int i = 0; i < Simd::kLanes; ++i) {
        int64_t const at = n0 + column + i < n ? n0 + column + i : n - 1;
        row[i] = reinterpret_cast<uint8_t const*>(weight) + at * stride + k0;
      }
      uint8_t* const out = panel + column * 4;
      for (int at = 0; at < whole; at += kStep) {
        for (int i = 0; i < Simd::kLanes; ++i) __builtin_prefetch(row[i] + at + 4 * kStep);
        transpose_words(row, at, out + at / 4 * kPanelPitch);
      }
      for (int i = 0; i < Simd::kLanes; ++i) copy_rest(row[i], whole, k0, depth, out + i * 4);
    }
  }

 private:
  // A row's last words, byte by byte where the row ends in one.
  void copy_rest(uint8_t const* row, int at, int64_t k0, int depth, uint8_t* out) const {
    for (; at < depth; at += 4) {
      uint32_t word = 0;
      std::memcpy(&word, row + at, k - k0 - at < 4 ? static_cast<size_t>(k - k0 - at) : 4);
      store_word(out + at / 4 * kPanelPitch, word ^ 0x80808080u);
    }
  }
};

// ---- tiles ----

// Where tiles of 32 x 32 codes begin. Past the last tile of n the one before is read: those columns go
// nowhere.
struct Tiles {
  int64_t n, k;

  int64_t per_row() const { return (k + kTileCodes - 1) / kTileCodes; }
  int64_t rows() const { return (n + kTileCodes - 1) / kTileCodes; }
  int64_t offset(int64_t n0, int64_t k0) const {
    int64_t const row = n0 / kTileCodes;
    return ((row < rows() ? row : rows() - 1) * per_row() + k0 / kTileCodes) * kTileBytes;
  }
};

// Calls widen(n, k, out) for the tiles of a panel; out is where the first column's word of the first quad
// belongs.
template <class Widen>
inline void for_tiles(int64_t n0, int64_t k0, int depth, uint8_t* panel, Widen const& widen) {
  for (int at = 0; at < depth; at += kTileCodes)
    for (int column = 0; column < kGemmColumns; column += kTileCodes)
      widen(n0 + column, k0 + at, panel + at / 4 * kPanelPitch + column * 4);
}

// Calls put(from, to) for the words of a tile of 4-bit codes. By linear.h a word's byte is 4 (16 row + 4 quad
// + 2 half + sub), quads counted within their half; its low nibbles are column 8 sub + row, the high ones 16
// columns (64 bytes) on.
template <class Put>
inline void for_words(uint8_t* out, Put const& put) {
  for (int row = 0; row < 8; ++row)
    for (int quad = 0; quad < 8; ++quad)
      for (int sub = 0; sub < 2; ++sub)
        put(4 * (16 * row + 4 * (quad % 4) + 2 * (quad / 4) + sub),
            out + quad * kPanelPitch + 4 * (8 * sub + row));
}

inline void widen_nibbles(uint8_t const* tile, uint8_t* out) {
  for_words(out, [&](int from, uint8_t* to) {
    uint32_t const word = load_word(tile + from);
    store_word(to, word & 0x0f0f0f0fu);
    store_word(to + 64, word >> 4 & 0x0f0f0f0fu);
  });
}

struct Int4Panel {
  static constexpr int kOffset = 0;
  uint8_t const* weight;
  Tiles tiles;

  void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const {
    for_tiles(n0, k0, depth, panel,
              [&](int64_t n, int64_t k, uint8_t* out) { widen_nibbles(weight + tiles.offset(n, k), out); });
  }
};

struct NibblePlanesPanel {
  static constexpr int kOffset = 128;
  uint8_t const *high, *low;
  Tiles tiles;

  void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const {
    for_tiles(n0, k0, depth, panel, [&](int64_t n, int64_t k, uint8_t* out) {
      int64_t const at = tiles.offset(n, k);
      widen_planes(high + at, low + at, out);
    });
  }

  static void widen_planes(uint8_t const* high, uint8_t const* low, uint8_t* out) {
    uint8_t joined[2][kTileBytes];  // the codes of the low nibbles, then of the high ones
    for (int i = 0; i < kTileBytes; ++i) {
      joined[0][i] = static_cast<uint8_t>(high[i] << 4 | (low[i] & 15));
      joined[1][i] = static_cast<uint8_t>((high[i] & 0xf0) | low[i] >> 4);
    }
    for_words(out, [&](int from, uint8_t* to) {
      store_word(to, load_word(joined[0] + from));
      store_word(to + 64, load_word(joined[1] + from));
    });
  }
};

// ---- tables ----

#if defined(__AVX512BW__)

// Sixteen entries a row, those of a row of eight twice. Words 0 to 3 of every lane (linear.h) belong to rows
// 0 and 8 of a tile's sub-rows, words 4 to 7 to rows 16 and 24: two rows of tables for a vector of codes.
inline __m512i look_up(__m512i codes, __m128i first, __m128i second) {
  __m512i const one = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(first), codes);
  return _mm512_mask_shuffle_epi8(one, 0xff00ff00ff00ff00ull, _mm512_broadcast_i32x4(second), codes);
}

// tables[n] are the entries of row n, with 128 added.
inline void widen_table_tile(uint8_t const* tile, __m128i const (&tables)[kTileCodes], uint8_t* out) {
  Simd::Vec words[16];  // by row (0 to 7 of sub-rows 0 and 1, then of 2 and 3), then by column
  __m512i const nibble = _mm512_set1_epi8(15);
  for (int row = 0; row < 8; ++row) {
    __m512i const both = _mm512_loadu_si512(tile + 64 * row);
    __m512i const even = _mm512_and_si512(both, nibble);
    __m512i const odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    words[row] = _mm512_castsi512_ps(look_up(_mm512_unpacklo_epi8(even, odd), tables[row], tables[8 + row]));
    words[8 + row] =
        _mm512_castsi512_ps(look_up(_mm512_unpackhi_epi8(even, odd), tables[16 + row], tables[24 + row]));
  }
  Simd::transpose(words);
  for (int quad = 0; quad < 8; ++quad) {
    int const at = quad % 4 * 4 + quad / 4;
    float* const to = reinterpret_cast<float*>(out + quad * kPanelPitch);
    Simd::store(to, _mm512_shuffle_f32x4(words[at], words[at + 2], 0x44));
    Simd::store(to + 16, _mm512_shuffle_f32x4(words[at], words[at + 2], 0xee));
  }
}

#endif

// Entries of a row's table, with 128 added. Three-bit codes leave bit 3 unread.
struct TablePanel {
  static constexpr int kOffset = 128;
  uint8_t const* weight;
  int8_t const* table;
  int32_t table_size;
  Tiles tiles;

  void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const {
    for (int column = 0; column < kGemmColumns; column += kTileCodes) {
      alignas(16) uint8_t entries[kTileCodes][16];
      for (int row = 0; row < kTileCodes; ++row) copy_entries(n0 + column + row, entries[row]);
      for (int at = 0; at < depth; at += kTileCodes)
        widen_tile(weight + tiles.offset(n0 + column, k0 + at), entries,
                   panel + at / 4 * kPanelPitch + column * 4);
    }
  }

 private:
  void copy_entries(int64_t n, uint8_t* entries) const {
    int8_t const* const from = table + (n < tiles.n ? n : tiles.n - 1) * table_size;
    for (int i = 0; i < 16; ++i) entries[i] = static_cast<uint8_t>(from[i & (table_size - 1)] ^ 0x80);
  }

  static void widen_tile(uint8_t const* tile, uint8_t const (&entries)[kTileCodes][16], uint8_t* out) {
#if defined(__AVX512BW__)
    __m128i tables[kTileCodes];
    std::memcpy(tables, entries, sizeof tables);
    widen_table_tile(tile, tables, out);
#else
    for (int row = 0; row < kTileCodes; ++row)
      for (int quad = 0; quad < 8; ++quad) {
        uint8_t const* const codes = tile + 16 * (row % 8 * 4 + quad % 4) + 2 * (quad / 4 + row / 8 * 2);
        uint8_t* const to = out + quad * kPanelPitch + 4 * row;
        for (int t = 0; t < 4; ++t) to[t] = entries[row][codes[t / 2] >> t % 2 * 4 & 15];
      }
#endif
  }
};

}  // namespace
}  // namespace vdit
