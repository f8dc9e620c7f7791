// The linear layer on compute capability 8.0 and up: int8 rows times int8, 4-bit, nibble-plane or table
// weights.
#pragma once
#include "linear/kernel_sm80_weights.cuh"

namespace vdit {

// out = epilogue(x weight^T). Grid: one block a tile of [m, n], in TileOrder.
template <class Tile, template <class> class WeightsOf>
struct LinearKernel {
  using Weights = WeightsOf<Tile>;
  using Gemm = GemmS8Sm80<Tile, Weights>;
  struct Params {
    GemmRows x;
    typename Weights::Params weight;
    LinearEpilogue epilogue;
    TileOrder order;
    bool wide;  // epilogue_is_wide
  };
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = Tile::kMinBlocks;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int tile_m, tile_n;
    p.order.find(block_idx_x(), tile_m, tile_n);
    int64_t const m0 = static_cast<int64_t>(tile_m) * Tile::kBlockM;
    int64_t const n0 = static_cast<int64_t>(tile_n) * Tile::kBlockN;
    typename Gemm::Sums sums;
    Gemm::run(p.x, p.weight, m0, n0, smem, sums);
    Gemm::store(p.epilogue, p.wide, p.x.m, p.weight.n, m0, n0, sums);
  }
};

}  // namespace vdit
