// Which tile a fused vq_linear gets on compute capability 8.0 and up. Pure host code.
#pragma once
#include <cstdint>

#include "common/gemm_tile_sm80.h"
#include "vdit/vq.h"

namespace vdit {

enum class VqTileSize : int32_t { kLarge = 0, kMedium = 1, kSmall = 2 };

struct VqTile {
  int block_m, block_n;           // sums a thread block
  int warps_m, warps_n, warps_k;  // warps along k share sums, each with its own part of k
  int stages;                     // steps of x and codes in shared memory
  int blocks_sm;                  // thread blocks that share an SM
  double cost;                    // a product's time beside the large tile's
};

// A code is looked up by each warp that multiplies it. int8 warps stand side by side along n, so that it is
// looked up once a block; those of floats are 64 x 64, because x is what their shared memory is busiest with.
// NOTE: `cost` is an estimate from shared-memory reads a product, not measured. With three stages two float
// blocks take 172 KB of an SM: on an A100, whose blocks get 163 KB together, only one is resident.
constexpr VqTile vq_tile(VqTileSize size, bool is_int8) {
  switch (size) {
    case VqTileSize::kLarge:
      return is_int8 ? VqTile{128, 128, 1, 4, 1, 4, 2, 1.0} : VqTile{128, 128, 2, 2, 1, 3, 2, 1.0};
    case VqTileSize::kMedium: return VqTile{64, 64, 2, 2, 1, 4, 3, 1.3};
    default: return VqTile{32, 32, 1, 1, 4, 3, 2, 2.0};
  }
}

inline VqTileSize pick_vq_tile(VqLinearParams const& p, int multiprocessors) {
  return pick_gemm_size_sm80<VqTileSize>(p.m, p.n, multiprocessors,
                                         [&](auto size) { return vq_tile(size, p.is_int8); });
}

inline VqTile picked_vq_tile(VqLinearParams const& p, int multiprocessors) {
  return vq_tile(pick_vq_tile(p, multiprocessors), p.is_int8);
}

}  // namespace vdit
