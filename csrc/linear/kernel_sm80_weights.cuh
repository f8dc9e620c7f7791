// How the weight formats of vdit/linear.h become registers of mma.m16n8k32: the weight sources of the int8
// main loop (common/gemm_s8_sm80.cuh).
#pragma once
#include "common/gemm_s8_sm80.cuh"
#include "linear/codes.cuh"
#include "vdit/linear.h"

namespace vdit {

// Registers of 32 columns and 32 k: [columns 8 j .. 8 j + 7][k half].
using WeightRegisters = uint32_t[4][2];

// A lane's 16 bytes of a kInt4 tile. Word 2 h + i holds k half h; its low nibbles are columns 8 i on, its
// high nibbles columns 8 i + 16 on.
VDIT_DEVICE void decode_nibbles(uint4 tile, uint32_t (*b)[2]) {
  uint32_t const words[4] = {tile.x, tile.y, tile.z, tile.w};
  CUTE_UNROLL
  for (int w = 0; w < 4; ++w) {
    b[w % 2][w / 2] = words[w] & kLowNibbles;
    b[w % 2 + 2][w / 2] = words[w] >> 4 & kLowNibbles;
  }
}

// The same of two planes.
VDIT_DEVICE void decode_planes(uint4 high_tile, uint4 low_tile, uint32_t (*b)[2]) {
  uint32_t const high[4] = {high_tile.x, high_tile.y, high_tile.z, high_tile.w};
  uint32_t const low[4] = {low_tile.x, low_tile.y, low_tile.z, low_tile.w};
  CUTE_UNROLL
  for (int w = 0; w < 4; ++w) merge_planes(high[w], low[w], b[w % 2][w / 2], b[w % 2 + 2][w / 2]);
}

// A lane's 16 bytes of a kTable tile: word j holds columns 8 j on, k half h in its half h.
template <int kSize>
VDIT_DEVICE void decode_codes(uint4 tile, TableRow<kSize> const (&tables)[4], uint32_t (*b)[2]) {
  uint32_t const words[4] = {tile.x, tile.y, tile.z, tile.w};
  CUTE_UNROLL
  for (int j = 0; j < 4; ++j) tables[j].look_up(words[j], b[j][0], b[j][1]);
}

VDIT_DEVICE uint4 lane_bytes(char const* tile) { return reinterpret_cast<uint4 const*>(tile)[lane_idx()]; }

// What a weight source is told; not every format has all of it.
struct WeightView {
  void const* weight;
  void const* weight_low;
  int8_t const* table;
  int64_t stride, n, k;
};

template <class Tile>
struct Int8Weights {
  using Params = WeightView;
  using Panels = BytePanels<Tile, Tile::kBlockN>;
  static constexpr int kFixedBytes = 0, kStageBytes = Panels::kBytes;
  Panels panels;

  VDIT_DEVICE Int8Weights(Params const& p, int64_t n0, char*)
      : panels(static_cast<int8_t const*>(p.weight), p.stride, n0, p.n, p.k) {}

  VDIT_DEVICE void fetch(char* stage, int64_t block) const { panels.fetch(stage, block); }

  VDIT_DEVICE void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const {
    CUTE_UNROLL
    for (int j = 0; j < Tile::kMmaN; j += 2) {
      uint32_t r[4];
      Panels::load_halves_first(stage, Tile::warp_n() + 8 * j, step, r);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  }
};

template <class Tile>
struct Int4Weights {
  using Params = WeightView;
  using Tiles = PackedTiles<Tile, 32, 512>;
  static constexpr int kFixedBytes = 0, kStageBytes = Tiles::kStageBytes;
  Tiles tiles;

  VDIT_DEVICE Int4Weights(Params const& p, int64_t n0, char*) : tiles(p.weight, p.n, p.k, n0) {}

  VDIT_DEVICE void fetch(char* stage, int64_t block) const { tiles.fetch(stage, block); }

  VDIT_DEVICE void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const {
    CUTE_UNROLL
    for (int group = 0; group < Tile::kMmaN / 4; ++group) {
      decode_nibbles(lane_bytes(Tiles::tile(stage, group, step)), b + 4 * group);
    }
  }
};

template <class Tile>
struct PlaneWeights {
  using Params = WeightView;
  using Tiles = PackedTiles<Tile, 32, 512>;
  static constexpr int kFixedBytes = 0, kStageBytes = 2 * Tiles::kStageBytes;
  Tiles high, low;

  VDIT_DEVICE PlaneWeights(Params const& p, int64_t n0, char*)
      : high(p.weight, p.n, p.k, n0), low(p.weight_low, p.n, p.k, n0) {}

  VDIT_DEVICE void fetch(char* stage, int64_t block) const {
    high.fetch(stage, block);
    low.fetch(stage + Tiles::kStageBytes, block);
  }

  VDIT_DEVICE void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const {
    CUTE_UNROLL
    for (int group = 0; group < Tile::kMmaN / 4; ++group) {
      char const* tile = Tiles::tile(stage, group, step);
      decode_planes(lane_bytes(tile), lane_bytes(tile + Tiles::kStageBytes), b + 4 * group);
    }
  }
};

// The tables of a lane's columns stay in registers for the whole loop.
template <class Tile, int kSize>
struct TableWeights {
  using Params = WeightView;
  using Tiles = PackedTiles<Tile, 32, 512>;
  static constexpr int kFixedBytes = 0, kStageBytes = Tiles::kStageBytes;
  static_assert(Tile::kMmaN == 4, "Tables of more than 32 columns a warp would not fit in registers.");
  Tiles tiles;
  TableRow<kSize> tables[4];

  VDIT_DEVICE TableWeights(Params const& p, int64_t n0, char*) : tiles(p.weight, p.n, p.k, n0) {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) tables[j].load(p.table, n0 + Tile::warp_n() + 8 * j + lane_idx() / 4, p.n);
  }

  VDIT_DEVICE void fetch(char* stage, int64_t block) const { tiles.fetch(stage, block); }

  VDIT_DEVICE void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const {
    decode_codes<kSize>(lane_bytes(Tiles::tile(stage, 0, step)), tables, b);
  }
};

template <class Tile>
using Table8Weights = TableWeights<Tile, 8>;
template <class Tile>
using Table16Weights = TableWeights<Tile, 16>;

}  // namespace vdit
