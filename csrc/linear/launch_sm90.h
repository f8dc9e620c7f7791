// What the launchers for sm90 share: maps of weight tiles, and which file has which format.
#pragma once
#include "common/gemm_launch_sm90.h"
#include "linear/tile_sm90.h"
#include "vdit/linear.h"

namespace vdit::sm90 {

// The tiles [n / 32, k / 32] of 512 bytes of a plane of codes; boxes of 4 tiles along k x 8 strips. As values
// of two bytes, because a box has at most 256 along a side.
inline TensorMap map_plane(void const* plane, int64_t n, int64_t k) {
  int64_t const tiles = ceil_div(k, 32);
  return make_tensor_map(plane, 2, {256, tiles, ceil_div(n, 32)}, {512, tiles * 512}, {256, 4, 8},
                         SmemSwizzle::kNone);
}

// linear_<format>_sm90.cu
void linear_int8(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_int4(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_planes(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_table(LinearParams const& p, LinearTileSm90 const& tile, void* stream);

}  // namespace vdit::sm90
