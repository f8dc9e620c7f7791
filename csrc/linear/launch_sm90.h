// What the launchers for sm90 share: maps of activations and of weight tiles, and how a kernel is started.
#pragma once
#include "common/gemm_sm90.cuh"
#include "common/launch_util.cuh"
#include "linear/tile_sm90.h"
#include "vdit/linear.h"

namespace vdit::sm90 {


// The tiles [n / 32, k / 32] of 512 bytes of a plane of codes; boxes of 4 tiles along k x 8 strips. As values of two
// bytes, because a box has at most 256 along a side.
inline TensorMap map_plane(void const* plane, int64_t n, int64_t k) {
  int64_t const tiles = ceil_div(k, 32);
  return make_tensor_map(plane, 2, {256, tiles, ceil_div(n, 32)}, {512, tiles * 512}, {256, 4, 8},
                         SmemSwizzle::kNone);
}

// What all kernels take. Shapes are those of a LinearParams or VqLinearParams.
template <class Kernel, class P>
typename Kernel::Params gemm_params(P const& p, int element_bytes, int group) {
  typename Kernel::Params a;
  a.epilogue = p.epilogue;
  if (a.epilogue.rows_per_batch >= p.m) a.epilogue.rows_per_batch = p.m;
  a.x = make_tensor_map(p.x, element_bytes, {p.k, p.m},
                        {p.m > 1 ? p.stride_x * element_bytes : int64_t{16}},
                        {kStepBytes / element_bytes, Kernel::kTokens}, SmemSwizzle::k128);
  a.m = p.m, a.n = p.n;
  a.order = {static_cast<int32_t>(ceil_div(p.m, Kernel::kTokens)),
             static_cast<int32_t>(ceil_div(p.n, Kernel::kOutputs)), group};
  a.steps = static_cast<int32_t>(ceil_div(p.k * element_bytes, kStepBytes));
  a.wide = epilogue_is_wide(p.epilogue, p.n);
  return a;
}

template <class Kernel>
void launch_persistent(typename Kernel::Params const& a, void* stream) {
  int64_t const tiles = static_cast<int64_t>(a.order.token_tiles) * a.order.output_tiles, blocks = multiprocessors();
  launch<Kernel>(Grid{blocks < tiles ? blocks : tiles, 1, 1}, Kernel::smem_bytes(), stream, a);
}

// linear_<format>_sm90.cu
void linear_int8(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_int4(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_planes(LinearParams const& p, LinearTileSm90 const& tile, void* stream);
void linear_table(LinearParams const& p, LinearTileSm90 const& tile, void* stream);

}  // namespace vdit::sm90
