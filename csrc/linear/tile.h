// Which tile a product of the linear family gets on compute capability 8.0 and up: what was decided, apart
// from what was asked (the launch struct). Pure host code.
#pragma once
#include <cstdint>
#include <string>

#include "common/gemm_tile_sm80.h"
#include "vdit/linear.h"

namespace vdit {

enum class LinearTileSize : int32_t { kLarge = 0, kMedium = 1, kSmall = 2 };

struct LinearTile {
  int block_m, block_n;           // sums a thread block
  int warps_m, warps_n, warps_k;  // warps along k share sums, each with its own part of k
  int stages;                     // steps of x and weight in shared memory
  int blocks_sm;                  // thread blocks that share an SM of an A100
  double cost;                    // a product's time beside the large tile's

  constexpr int block_k() const { return 64 * warps_k; }
  constexpr int threads() const { return 32 * warps_m * warps_n * warps_k; }

  std::string to_string() const {
    return "linear sm80: " + std::to_string(block_m) + " x " + std::to_string(block_n) + " x " +
           std::to_string(block_k()) + " tile, " + std::to_string(stages) + " stages, " +
           std::to_string(threads() / 32) + " warps";
  }
};

// Packed weights are unpacked by the warp that multiplies them. In the large tile the four warps stand side
// by side along n, so that each code is unpacked once a block and the tables of 32 columns stay in 16
// registers; int8 weights get warps of 64 x 64, which read the least from shared memory. The small tile is
// for products that only read the weight: as many blocks as there are, with much of k under way in each.
// NOTE: `cost` is an estimate from shared-memory reads a product, not measured.
constexpr LinearTile linear_tile(LinearTileSize size, bool packed) {
  switch (size) {
    case LinearTileSize::kLarge:
      return packed ? LinearTile{128, 128, 1, 4, 1, 4, 2, 1.0} : LinearTile{128, 128, 2, 2, 1, 4, 2, 1.0};
    case LinearTileSize::kMedium: return LinearTile{64, 64, 2, 2, 1, 4, 4, 1.25};
    default: return LinearTile{32, 32, 1, 1, 4, 4, 2, 2.0};
  }
}

inline LinearTileSize pick_tile(LinearParams const& p, int multiprocessors) {
  return pick_gemm_size_sm80<LinearTileSize>(p.m, p.n, multiprocessors, [&](auto size) {
    return linear_tile(size, p.format != WeightFormat::kInt8);
  });
}

inline LinearTile picked_tile(LinearParams const& p, int multiprocessors) {
  return linear_tile(pick_tile(p, multiprocessors), p.format != WeightFormat::kInt8);
}

}  // namespace vdit
