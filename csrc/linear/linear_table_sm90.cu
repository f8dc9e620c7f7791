// The linear of 3- and 4-bit codes that index a table of int8, for sm90.
#include "linear/decode_sm90.cuh"
#include "linear/launch_sm90.h"

namespace vdit::sm90 {
namespace {

constexpr LinearTilesSm90 kTableTiles = linear_tiles_sm90(WeightFormat::kTable);

template <int kTableSize, int kTokens, int kStages>
void run_table(LinearParams const& p, int group, void* stream) {
  using Kernel = RegisterWeightsKernel<TableWeights<kTableSize>, kTokens, kStages>;
  auto a = gemm_params<Kernel>(p, 1, group);
  a.weights.codes = map_plane(p.weight, p.n, p.k);
  a.weights.table = p.table;
  a.weights.n = p.n;
  launch_persistent<Kernel>(a, stream);
}

template <int kTableSize>
void run_table_tile(LinearParams const& p, LinearTileSm90 const& tile, void* stream) {
  if (tile.tokens == kTableTiles.large.tokens) {
    return run_table<kTableSize, kTableTiles.large.tokens, kTableTiles.large.stages>(p, tile.group, stream);
  }
  run_table<kTableSize, kTableTiles.small.tokens, kTableTiles.small.stages>(p, tile.group, stream);
}

}  // namespace

void linear_table(LinearParams const& p, LinearTileSm90 const& tile, void* stream) {
  if (p.table_size == 16) return run_table_tile<16>(p, tile, stream);
  run_table_tile<8>(p, tile, stream);
}

}  // namespace vdit::sm90
