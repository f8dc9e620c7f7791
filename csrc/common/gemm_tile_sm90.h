// What decides the tile of a product on compute capability 9.0, for the linear and the vq family. Pure host
// code.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "common/gemm_tile_sm80.h"

namespace vdit {

// Time of a product by tiles of tokens x outputs, in sums a multiprocessor: all of them work on one tile each
// at a time, and the last round may be short.
inline double gemm_rounds_sm90(int64_t m, int64_t n, int tokens, int outputs, int multiprocessors) {
  int64_t const count = (m + tokens - 1) / tokens * ((n + outputs - 1) / outputs);
  return static_cast<double>((count + multiprocessors - 1) / multiprocessors) * tokens * outputs;
}

// Tiles of tokens that are worked on together: their activations of k bytes a row stay in L2 (a third of its
// 50 MB) while all weights pass by.
inline int gemm_group_sm90(int64_t k, int tokens) {
  int64_t const fitting = (int64_t{16} << 20) / (tokens * (k > 0 ? k : 1));
  return static_cast<int>(fitting < 1 ? 1 : fitting > 32 ? 32 : fitting);
}

// NOTE: that a small tile takes 1.3 times as long for the same products is an estimate from its traffic.
inline constexpr double kSmallTileCostSm90 = 1.3;

// The large tile, unless the small one keeps the multiprocessors busy with less padding and fewer idle ones.
// A Tiles is a pair `large`, `small` of tiles with `tokens`, `outputs` and `group`, which is filled in.
template <class Tiles>
auto pick_gemm_tile_sm90(Tiles const& tiles, int64_t m, int64_t n, int64_t k, int multiprocessors) {
  auto const rounds = [&](auto const& tile) {
    return gemm_rounds_sm90(m, n, tile.tokens, tile.outputs, multiprocessors);
  };
  auto tile = rounds(tiles.large) <= kSmallTileCostSm90 * rounds(tiles.small) ? tiles.large : tiles.small;
  tile.group = gemm_group_sm90(k, tile.tokens);
  return tile;
}

// Which architecture's kernel multiplies on compute capability 9.0.
struct GemmKernelChoice {
  int kernel = 90;       // the compute capability that it was written for
  double sm80_time = 0;  // beside the sm90 kernel's; 0 where they were not compared

  std::string to_string() const {
    std::string const chosen = "by the sm" + std::to_string(kernel) + " kernel";
    if (sm80_time == 0) return chosen;
    char text[64];
    std::snprintf(text, sizeof text, ": sm80 would take %.2f of sm90's time (estimate)", sm80_time);
    return chosen + text;
  }
};

// What products of 8 bits by mma.sync reach of wgmma's.
inline constexpr double kMmaSyncRateSm90 = 0.6;

// The sm80 kernel with `tile` where rows do not fill the smallest sm90 tile and its slowest multiprocessor is
// done first. 16 rows by 5,120 outputs of packed codes are 20 tiles of 64 x 256: three quarters of each are
// padding, and 112 of 132 multiprocessors get none. The sm80 kernel's 160 tiles of 32 x 32 are two rounds of
// all, 0.32 of the time. It falls behind where outputs alone keep multiprocessors busy: past 25,344 packed
// ones up to 32 rows, past 16,896 above.
// NOTE: calculated from padding and rounds of 132 multiprocessors, not timed. Where tiles are full, what is
// left is the error of these estimates, so nothing is compared there.
template <class Tiles, class TileSm80>
GemmKernelChoice choose_gemm_kernel_sm90(Tiles const& tiles, TileSm80 const& tile, int64_t m, int64_t n,
                                         int multiprocessors) {
  GemmKernelChoice choice;
  if (m < 1 || n < 1 || m >= tiles.small.tokens) return choice;
  auto const rounds = [&](auto const& t) {
    return gemm_rounds_sm90(m, n, t.tokens, t.outputs, multiprocessors);
  };
  double const sm90 = std::min(rounds(tiles.large), kSmallTileCostSm90 * rounds(tiles.small));
  choice.sm80_time = gemm_time_sm80(m, n, multiprocessors, tile) / (kMmaSyncRateSm90 * sm90);
  if (choice.sm80_time < 1) choice.kernel = 80;
  return choice;
}

}  // namespace vdit
