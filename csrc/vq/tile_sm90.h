// Which tile vq_linear gets on compute capability 9.0: what was decided, apart from what was asked (the
// launch struct). Pure host code.
#pragma once
#include <cstdint>
#include <string>

#include "common/gemm_tile_sm90.h"
#include "vdit/vq.h"
#include "vq/tile.h"

namespace vdit {

struct VqTileSm90 {
  VqFormat format;
  int tokens;   // rows of x a tile
  int outputs;  // of n
  int stages;   // of 128 channels in shared memory
  int group;    // tiles of tokens that are worked on together

  std::string to_string() const {
    return std::string("vq_linear sm90: ") + (format == VqFormat::k256x4 ? "256 x 4" : "64 x 2") + ", " +
           std::to_string(tokens) + " tokens x " + std::to_string(outputs) + " outputs, " +
           std::to_string(stages) + " stages of 128, tokens by " + std::to_string(group) + " tiles";
  }
};

struct VqTilesSm90 {
  VqTileSm90 large, small;
};

constexpr VqTilesSm90 vq_tiles_sm90(VqFormat format) {
  return {{format, 128, 256, 7, 1}, {format, 64, 256, 8, 1}};
}

inline VqTileSm90 pick_vq_tile_sm90(VqLinearParams const& p, int multiprocessors) {
  return pick_gemm_tile_sm90(vq_tiles_sm90(p.format), p.m, p.n, p.k, multiprocessors);
}

inline GemmKernelChoice choose_vq_kernel_sm90(VqLinearParams const& p, int multiprocessors) {
  return choose_gemm_kernel_sm90(vq_tiles_sm90(p.format), picked_vq_tile(p, multiprocessors), p.m, p.n,
                                 multiprocessors);
}

}  // namespace vdit
