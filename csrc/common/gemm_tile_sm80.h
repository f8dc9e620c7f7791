// What decides the tile of a product on compute capability 8.0 and up, for the linear and the vq family. Pure
// host code.
#pragma once
#include <cstdint>

namespace vdit {

// The size whose slowest SM is done first, each SM working on its tiles one after another. Size has kLarge,
// kMedium and kSmall; tile_of(size) has `block_m`, `block_n` and `cost`.
template <class Size, class TileOf>
Size pick_gemm_size_sm80(int64_t m, int64_t n, int multiprocessors, TileOf const& tile_of) {
  Size best = Size::kLarge;
  double best_time = 0;
  for (Size size : {Size::kLarge, Size::kMedium, Size::kSmall}) {
    auto const tile = tile_of(size);
    int64_t const tiles = ((m + tile.block_m - 1) / tile.block_m) * ((n + tile.block_n - 1) / tile.block_n);
    int64_t const turns = (tiles + multiprocessors - 1) / multiprocessors;
    double const time = static_cast<double>(turns) * tile.block_m * tile.block_n * tile.cost;
    if (best_time == 0 || time < best_time) best = size, best_time = time;
  }
  return best;
}

}  // namespace vdit
