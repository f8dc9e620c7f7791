// What the attention family's kernels share: how a sequence is cut into blocks, and rows in shared memory.
#pragma once
#include <cstdint>

#include "common/kernel_util.cuh"

namespace vdit {

// Which (batch, head) map of a grid with heads on y and batch on z; each alone may reach 65535.
VDIT_DEVICE int64_t map_index() { return static_cast<int64_t>(block_idx_z()) * grid_dim_y() + block_idx_y(); }

struct RowSpan {
  int32_t begin = 0, rows = 0;
};

// Rows of block `i`: of block_size each, or between `offsets` where those are given. What lies outside of the
// sequence is left out; offsets that fall make an empty block.
VDIT_DEVICE RowSpan block_span(int32_t const* offsets, int64_t i, int64_t block_size, int64_t length) {
  int64_t begin = i * block_size, end = begin + block_size;
  if (offsets != nullptr) begin = offsets[i], end = offsets[i + 1];
  begin = clamp_to<int64_t>(begin, 0, length);
  end = clamp_to<int64_t>(end, begin, length);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end - begin)};
}

// 64 columns (or 32, where head_dim is no multiple of 64) of 8 rows of 2-byte elements in shared memory,
// swizzled so that ldmatrix meets no bank twice.
template <int kHeadDim>
struct SwizzledRows {
  static constexpr int kCols = kHeadDim % 64 == 0 ? 64 : 32;
  using Atom = decltype(cute::composition(
      cute::Swizzle<kCols == 64 ? 3 : 2, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::Int<kCols>>, cute::Stride<cute::Int<kCols>, cute::_1>>{}));
  template <int kRows>
  using Tile = decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>>{}));
};

// k-means: a better score, or the same at a lower index. NaN is never better.
VDIT_DEVICE void keep_best(float& best, int& label, float score, int candidate) {
  if (score > best || (score == best && candidate < label)) {
    best = score;
    label = candidate;
  }
}

}  // namespace vdit
