// The linear of 4-bit codes for sm90.
#include "linear/decode_sm90.cuh"
#include "linear/launch_sm90.h"

namespace vdit::sm90 {
namespace {

constexpr LinearTilesSm90 kInt4Tiles = linear_tiles_sm90(WeightFormat::kInt4);

template <int kTokens, int kStages>
void run_int4(LinearParams const& p, int group, void* stream) {
  using Kernel = RegisterWeightsKernel<Int4Weights, kTokens, kStages>;
  auto a = gemm_params<Kernel>(p, 1, group);
  a.weights.codes = map_plane(p.weight, p.n, p.k);
  launch_persistent<Kernel>(a, stream);
}

}  // namespace

void linear_int4(LinearParams const& p, LinearTileSm90 const& tile, void* stream) {
  if (tile.tokens == kInt4Tiles.large.tokens)
    return run_int4<kInt4Tiles.large.tokens, kInt4Tiles.large.stages>(p, tile.group, stream);
  run_int4<kInt4Tiles.small.tokens, kInt4Tiles.small.stages>(p, tile.group, stream);
}

}  // namespace vdit::sm90
