// What decides the tile of a product on compute capability 9.0, for the linear and the vq family. Pure host
// code.
#pragma once
#include <cstdint>

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

}  // namespace vdit
