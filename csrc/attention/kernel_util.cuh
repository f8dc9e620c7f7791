// What the attention family's kernels share: vectors of 16 bytes seen as floats, how a thread block is cut
// into rows and column chunks, a sequence into blocks, and rows in shared memory.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace vdit {

// Elements of T in 16 bytes.
template <class T>
inline constexpr int kVecOf = static_cast<int>(16 / sizeof(T));

// kVec is 1, or kVecOf<T> when `p` is 16-byte aligned.
template <class T, int kVec>
VDIT_DEVICE void load_floats(T const* p, float (&out)[kVec]) {
  static_assert(kVec == 1 || kVec == kVecOf<T>, "kVec is one element or 16 bytes.");
  if constexpr (kVec == 1) {
    out[0] = static_cast<float>(*p);
  } else if constexpr (sizeof(T) == 4) {
    float4 const v = *reinterpret_cast<float4 const*>(p);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
    uint4 const v = *reinterpret_cast<uint4 const*>(p);
    uint32_t const words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
      float2 const pair = unpack2<T>(words[i]);
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int kVec>
VDIT_DEVICE void store_floats(T* p, float const (&v)[kVec]) {
  static_assert(kVec == 1 || kVec == kVecOf<T>, "kVec is one element or 16 bytes.");
  if constexpr (kVec == 1) {
    *p = static_cast<T>(v[0]);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  } else {
    *reinterpret_cast<uint4*>(p) =
        uint4{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])};
  }
}

// A block works on `groups` rows at a time, `lanes` threads a row, one chunk of columns a thread. Threads
// past the last whole group are idle.
struct RowLanes {
  int lanes, groups, group, lane;

  VDIT_DEVICE RowLanes(int64_t chunks, int threads) {
    lanes = chunks < threads ? static_cast<int>(chunks) : threads;
    groups = threads / lanes;
    group = thread_idx() / lanes;
    lane = thread_idx() % lanes;
  }
  VDIT_DEVICE bool active() const { return group < groups; }
};

// Which (batch, head) map of a grid with heads on y and batch on z; each alone may reach 65535.
VDIT_DEVICE int64_t map_index() { return static_cast<int64_t>(block_idx_z()) * grid_dim_y() + block_idx_y(); }

// The mask of the lanes below this one.
VDIT_DEVICE uint32_t lanes_below() { return (1u << lane_idx()) - 1u; }

// Inclusive sum over the warp's lanes.
template <class T>
VDIT_DEVICE T warp_prefix_sum(T v) {
  CUTE_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    T const below = shfl_up(v, step);
    if (lane_idx() >= step) v += below;
  }
  return v;
}

template <class T>
VDIT_DEVICE T clamp_to(T v, T low, T high) {
  return v < low ? low : (v > high ? high : v);
}

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
