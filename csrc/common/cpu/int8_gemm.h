// The product of int8 activations and weights of any format, exact in int32: one core for the linear and the
// vq family. Compiled once an instruction set, after one simd_*.h and int8_dot.h; everything is internal to
// the unit.
//
// Weights reach the core as panels of unsigned bytes, 64 columns (n) by some depth (k):
//   [depth / 4][64][4]
// so that four neighbours in k of one column are one 32-bit word, as the dot product instructions take them.
// Signed weights come with 128 added, which the sums of the activations' rows take out again. A panel is
// filled once for up to kGemmRows rows, so that what a format costs to widen hardly counts; activations are
// read as they lie.
//
// A panel source is any type with
//   static constexpr int kOffset                       what its bytes are above the weights: 0 or 128
//   void fill(uint8_t* panel, int64_t n0, int64_t k0, int depth) const
// where n0 and k0 are multiples of 64 and depth is one of 4. Past the last n or k it may write anything.
#pragma once
#include "common/cpu/epilogue.h"
#include "common/cpu/gemm_item.h"
#include "common/cpu/int8_dot.h"

namespace vdit {
namespace {

// int8 [m, k]; every row is zero from k up to the next multiple of 4.
struct GemmRows {
  int8_t const* data;
  int64_t stride, k;
};

// sums[i] = the sum of row i, for i in [begin, end): what int8_gemm takes an offset out with.
inline void sum_rows(GemmRows const& x, int64_t begin, int64_t end, int32_t* sums) {
  for (int64_t row = begin; row < end; ++row) {
    int32_t sum = 0;
    for (int64_t k = 0; k < x.k; ++k) sum += x.data[row * x.stride + k];
    sums[row] = sum;
  }
}

constexpr int kDotRows = Int8Dot::kRows, kDotColumns = Int8Dot::kVecs * Int8Dot::kColumns;

struct alignas(64) GemmScratch {
  uint8_t panel[Int8Dot::kDepth * kGemmColumns];
  int32_t sums[kGemmRows * kGemmColumns];
  Int8Dot::Activation rows[kDotRows * Int8Dot::kDepth];
};

// c[r][n] (+)= sum over k of rows[r] and the panel's columns, kRowsHere rows by kDotColumns columns.
template <int kRowsHere>
inline void dot_block(Int8Dot::Activation const* rows, int64_t stride, uint8_t const* panel, int depth,
                      bool add, int32_t* c) {
  using D = Int8Dot;
  D::Sums acc[kRowsHere][D::kVecs];
  VDIT_UNROLL
  for (int r = 0; r < kRowsHere; ++r) {
    VDIT_UNROLL
    for (int v = 0; v < D::kVecs; ++v) acc[r][v] = D::zero();
  }
  for (int begin = 0; begin < depth; begin += 64) {
    // The next rows, which a short row's end keeps the hardware from seeing.
    VDIT_UNROLL
    for (int r = 0; r < kRowsHere; ++r) __builtin_prefetch(rows + (kRowsHere + r) * stride + begin, 0, 2);
    int const end = begin + 64 < depth ? begin + 64 : depth;
    for (int k = begin; k < end; k += 4) {
      D::Weights w[D::kVecs];
      VDIT_UNROLL
      for (int v = 0; v < D::kVecs; ++v) w[v] = D::load(panel + v * D::kColumns * 4);
      VDIT_UNROLL
      for (int r = 0; r < kRowsHere; ++r) {
        D::Quad const x = D::broadcast(rows + r * stride + k);
        VDIT_UNROLL
        for (int v = 0; v < D::kVecs; ++v) acc[r][v] = D::dot(acc[r][v], w[v], x);
      }
      panel += kGemmColumns * 4;
    }
  }
  VDIT_UNROLL
  for (int r = 0; r < kRowsHere; ++r) {
    VDIT_UNROLL
    for (int v = 0; v < D::kVecs; ++v) D::store(c + r * kGemmColumns + v * D::kColumns, acc[r][v], add);
  }
}

using DotBlock = void (*)(Int8Dot::Activation const*, int64_t, uint8_t const*, int, bool, int32_t*);

// The whole width of a panel for `count` rows, at most kDotRows.
inline void dot_rows(GemmRows const& x, int64_t m, int count, int64_t k0, int depth, GemmScratch& s,
                     int32_t* c) {
  static_assert(kDotRows == 6, "one block for each number of rows");
  constexpr DotBlock kBlocks[] = {dot_block<1>, dot_block<2>, dot_block<3>,
                                  dot_block<4>, dot_block<5>, dot_block<6>};
  int64_t stride = x.stride;
  Int8Dot::Activation const* const rows =
      Int8Dot::take_rows(x.data + m * x.stride + k0, stride, count, depth, s.rows);
  for (int n = 0; n < kGemmColumns; n += kDotColumns)
    kBlocks[count - 1](rows, stride, s.panel + n * 4, depth, k0 != 0, c + n);
}

// Sums become what the weights themselves would have given, and then outputs.
inline void finish_rows(LinearEpilogue const& e, int64_t n, GemmItem const& item, int64_t m, int count,
                        int offset, int32_t const* x_sums, int32_t const* c) {
  int const columns = static_cast<int>(n - item.n0 < kGemmColumns ? n - item.n0 : kGemmColumns);
  for (int r = 0; r < count; ++r, c += kGemmColumns) {
    uint32_t const sum = offset == 0 ? 0 : static_cast<uint32_t>(x_sums[m + r]);
    store_outputs(e, n, m + r, item.n0, columns, c, static_cast<uint32_t>(offset) * sum);
  }
}

// NOTE: what lost, or gained nothing, at M 4096 and K and N 1536 on a busy Zen 4 core (47 to 48 ms, of which
// the dot products alone are 41): items of 240, 384 or 1536 rows; two panels side by side; results' lines
// asked for while their sums are computed; sums finished 48 rows at a time.
//
// One item of for_each_gemm_item: its sums and their epilogue. x_sums may be null where Panel::kOffset is 0.
template <class Panel>
inline void int8_gemm(GemmRows const& x, int64_t n, Panel const& source, LinearEpilogue const& e,
                      GemmItem const& item, int32_t const* x_sums, void* scratch) {
  GemmScratch& s = *static_cast<GemmScratch*>(scratch);
  int64_t const pieces = (x.k + Int8Dot::kDepth - 1) / Int8Dot::kDepth;
  int64_t const depth = ((x.k + pieces - 1) / pieces + 63) / 64 * 64;
  for (int64_t k0 = 0; k0 < x.k; k0 += depth) {
    int const here = static_cast<int>(x.k - k0 < depth ? (x.k - k0 + 3) / 4 * 4 : depth);
    source.fill(s.panel, item.n0, k0, here);
    for (int row = 0; row < item.rows; row += kDotRows) {
      int const count = item.rows - row < kDotRows ? item.rows - row : kDotRows;
      int32_t* const c = s.sums + (pieces == 1 ? 0 : row * kGemmColumns);
      dot_rows(x, item.m0 + row, count, k0, here, s, c);
      if (k0 + depth >= x.k) finish_rows(e, n, item, item.m0 + row, count, Panel::kOffset, x_sums, c);
    }
  }
}

}  // namespace
}  // namespace vdit
