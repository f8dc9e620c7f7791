// Launchers of kernel_sm80.cuh. Each weight format has a file of its own, so that they compile side by side.
#pragma once
#include "common/launch_util.cuh"
#include "linear/kernel_sm80.cuh"
#include "linear/tile.h"

namespace vdit {

void launch_linear_int8_sm80(LinearParams const& p, void* stream);
void launch_linear_int4_sm80(LinearParams const& p, void* stream);
void launch_linear_planes_sm80(LinearParams const& p, void* stream);
void launch_linear_table_sm80(LinearParams const& p, void* stream);

template <LinearTileSize kSize, bool kPacked>
struct LinearTileOf {
  static constexpr LinearTile kTile = linear_tile(kSize, kPacked);
  using type = GemmTileSm80<kTile.block_m, kTile.block_n, kTile.warps_m, kTile.warps_n, kTile.warps_k,
                            kTile.stages, kTile.blocks_sm>;
};

template <LinearTileSize kSize, bool kPacked, template <class> class WeightsOf>
void launch_linear_tile(LinearParams const& p, void* stream) {
  using Tile = typename LinearTileOf<kSize, kPacked>::type;
  using Kernel = LinearKernel<Tile, WeightsOf>;
  typename Kernel::Params a{};
  a.x = {p.x, p.stride_x, p.m, p.k};
  a.weight = {p.weight, p.weight_low, p.table, p.stride_weight, p.n, p.k};
  a.epilogue = epilogue_of_rows(p.epilogue, p.m);
  a.order = {static_cast<int32_t>(ceil_div(p.m, Tile::kBlockM)),
             static_cast<int32_t>(ceil_div(p.n, Tile::kBlockN)), Tile::kOrderGroup};
  a.wide = epilogue_is_wide(p.epilogue, p.n);
  Grid const grid{static_cast<int64_t>(a.order.tiles_m) * a.order.tiles_n, 1, 1};
  launch<Kernel>(grid, Kernel::kSmemBytes, stream, a);
}

template <bool kPacked, template <class> class WeightsOf>
void launch_linear(LinearParams const& p, void* stream) {
  switch (pick_tile(p, multiprocessors())) {
    case LinearTileSize::kLarge:
      return launch_linear_tile<LinearTileSize::kLarge, kPacked, WeightsOf>(p, stream);
    case LinearTileSize::kMedium:
      return launch_linear_tile<LinearTileSize::kMedium, kPacked, WeightsOf>(p, stream);
    default: return launch_linear_tile<LinearTileSize::kSmall, kPacked, WeightsOf>(p, stream);
  }
}

}  // namespace vdit
