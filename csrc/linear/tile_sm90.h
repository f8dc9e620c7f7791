// Which tile a linear gets on compute capability 9.0: what was decided, apart from what was asked (the launch
// struct). Pure host code.
#pragma once
#include <cstdint>
#include <string>

#include "common/gemm_tile_sm90.h"
#include "linear/tile.h"
#include "vdit/linear.h"

namespace vdit {

struct LinearTileSm90 {
  WeightFormat format;
  int tokens;   // rows of x a tile
  int outputs;  // of n
  int stages;   // of 128 channels in shared memory
  int group;    // tiles of tokens that are worked on together

  std::string to_string() const {
    static char const* const names[] = {"int8", "int4", "nibble planes", "table"};
    return std::string("linear sm90: ") + names[static_cast<int>(format)] + ", " + std::to_string(tokens) +
           " tokens x " + std::to_string(outputs) + " outputs, " + std::to_string(stages) +
           " stages of 128, " + "tokens by " + std::to_string(group) + " tiles";
  }
};

// The tiles there are, larger first.
//
// A tile of t x o takes t + o bytes a channel from L2 (t + o / 2 with four-bit codes) for t * o / 4096 cycles
// of int8 products. An SM has some 39 bytes a cycle at most, and public kernels sustain 24 to 30:
//   int8           256 x 160: 42;  lost: 256 x 192: 37, but 192 registers of sums leave its epilogue too
//                  few, and 20 to 190 bytes are spilled whichever way it is written; 128 x 256, 256 x 128: 48
//   4-bit codes    128 x 256: 32;  lost: 256 x 128: 40
//   nibble planes  128 x 256: 48
// NOTE: calculated, nothing of this has been timed.
struct LinearTilesSm90 {
  LinearTileSm90 large, small;
};

constexpr LinearTilesSm90 linear_tiles_sm90(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt8: return {{format, 256, 160, 4, 1}, {format, 128, 128, 6, 1}};
    case WeightFormat::kNibblePlanes: return {{format, 128, 256, 4, 1}, {format, 64, 256, 5, 1}};
    default: return {{format, 128, 256, 6, 1}, {format, 64, 256, 8, 1}};
  }
}

inline LinearTileSm90 pick_linear_tile_sm90(LinearParams const& p, int multiprocessors) {
  return pick_gemm_tile_sm90(linear_tiles_sm90(p.format), p.m, p.n, p.k, multiprocessors);
}

inline GemmKernelChoice choose_linear_kernel_sm90(LinearParams const& p, int multiprocessors) {
  return choose_gemm_kernel_sm90(linear_tiles_sm90(p.format), picked_tile(p, multiprocessors), p.m, p.n,
                                 multiprocessors);
}

}  // namespace vdit
