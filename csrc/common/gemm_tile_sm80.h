// What decides the tile of a product on compute capability 8.0 and up, for the linear and the vq family. Pure
// host code.
#pragma once
#include <cstdint>

namespace vdit {

// Time of a product, in sums of the large tile a multiprocessor: that of the slowest one, each working on its
// tiles one after another. A Tile has `block_m`, `block_n` and `cost`.
template <class Tile>
double gemm_time_sm80(int64_t m, int64_t n, int multiprocessors, Tile const& tile) {
  int64_t const tiles = ((m + tile.block_m - 1) / tile.block_m) * ((n + tile.block_n - 1) / tile.block_n);
  int64_t const turns = (tiles + multiprocessors - 1) / multiprocessors;
  return static_cast<double>(turns) * tile.block_m * tile.block_n * tile.cost;
}

// The size that takes the least time. Size has kLarge, kMedium and kSmall; tile_of(size) is a tile.
template <class Size, class TileOf>
Size pick_gemm_size_sm80(int64_t m, int64_t n, int multiprocessors, TileOf const& tile_of) {
  Size best = Size::kLarge;
  double best_time = 0;
  for (Size size : {Size::kLarge, Size::kMedium, Size::kSmall}) {
    double const time = gemm_time_sm80(m, n, multiprocessors, tile_of(size));
    if (best_time == 0 || time < best_time) best = size, best_time = time;
  }
  return best;
}

}  // namespace vdit
