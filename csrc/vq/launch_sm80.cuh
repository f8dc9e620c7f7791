// Launchers of the products. Each type has a file of its own, so that they compile side by side.
#pragma once
#include "common/launch_util.cuh"
#include "vq/kernel_sm80_halves.cuh"
#include "vq/kernel_sm80_rows.cuh"
#include "vq/path.h"
#include "vq/tile.h"

namespace vdit {

void launch_vq_int8_sm80(VqLinearParams const& p, void* stream);
void launch_vq_bf16_sm80(VqLinearParams const& p, void* stream);
void launch_vq_fp16_sm80(VqLinearParams const& p, void* stream);

template <VqTileSize kSize, bool kInt8>
struct VqTileOf {
  static constexpr VqTile kTile = vq_tile(kSize, kInt8);
  using type = GemmTileSm80<kTile.block_m, kTile.block_n, kTile.warps_m, kTile.warps_n, kTile.warps_k,
                            kTile.stages, kTile.blocks_sm>;
};

template <class Kernel, class Tile>
void launch_vq_tile(VqLinearParams const& p, void* stream) {
  typename Kernel::Params a{};
  a.x = {static_cast<decltype(a.x.x)>(p.x), p.stride_x, p.m, p.k};
  a.weight = {p.codes, p.codebook, p.n, p.k};
  a.epilogue = epilogue_of_rows(p.epilogue, p.m);
  a.order = {static_cast<int32_t>(ceil_div(p.m, Tile::kBlockM)),
             static_cast<int32_t>(ceil_div(p.n, Tile::kBlockN)), Tile::kOrderGroup};
  a.wide = epilogue_is_wide(p.epilogue, p.n);
  Grid const grid{static_cast<int64_t>(a.order.tiles_m) * a.order.tiles_n, 1, 1};
  launch<Kernel>(grid, Kernel::kSmemBytes, stream, a);
}

template <class T, VqFormat kFormat>
void launch_vq_rows(VqLinearParams const& p, void* stream) {
  using Kernel = VqRowsKernel<T, kFormat>;
  typename Kernel::Params a{};
  a.x = {p.x, p.stride_x, p.m, p.k};
  a.weight = {p.codes, p.codebook, p.n, p.k};
  a.epilogue = epilogue_of_rows(p.epilogue, p.m);
  a.wide = epilogue_is_wide(p.epilogue, p.n);
  launch<Kernel>(Grid{ceil_div(p.n, 32), 1, 1}, Kernel::kSmemBytes, stream, a);
}

template <class T, VqFormat kFormat, VqTileSize kSize>
void launch_vq_sized(VqLinearParams const& p, void* stream) {
  constexpr bool kInt8 = std::is_same<T, int8_t>::value;
  using Tile = typename VqTileOf<kSize, kInt8>::type;
  if constexpr (kInt8) {
    launch_vq_tile<VqInt8Kernel<Tile, kFormat>, Tile>(p, stream);
  } else {
    launch_vq_tile<VqHalfKernel<T, Tile, kFormat>, Tile>(p, stream);
  }
}

template <class T, VqFormat kFormat>
void launch_vq_format(VqLinearParams const& p, void* stream) {
  if constexpr (!std::is_same<T, int8_t>::value) {
    if (p.m <= kVqFewRows) return launch_vq_rows<T, kFormat>(p, stream);
  }
  switch (pick_vq_tile(p, multiprocessors())) {
    case VqTileSize::kLarge: return launch_vq_sized<T, kFormat, VqTileSize::kLarge>(p, stream);
    case VqTileSize::kMedium: return launch_vq_sized<T, kFormat, VqTileSize::kMedium>(p, stream);
    default: return launch_vq_sized<T, kFormat, VqTileSize::kSmall>(p, stream);
  }
}

template <class T>
void launch_vq(VqLinearParams const& p, void* stream) {
  if (p.format == VqFormat::k256x4) return launch_vq_format<T, VqFormat::k256x4>(p, stream);
  launch_vq_format<T, VqFormat::k64x2>(p, stream);
}

}  // namespace vdit
