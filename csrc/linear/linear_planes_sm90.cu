// The linear of two planes of 4-bit codes for sm90.
#include "linear/decode_sm90.cuh"
#include "linear/launch_sm90.h"

namespace vdit::sm90 {
namespace {

constexpr LinearTilesSm90 kPlanesTiles = linear_tiles_sm90(WeightFormat::kNibblePlanes);

template <int kTokens, int kStages>
void run_planes(LinearParams const& p, int group, void* stream) {
  using Kernel = RegisterWeightsKernel<NibblePlaneWeights, kTokens, kStages>;
  auto a = gemm_params<Kernel>(p, 1, group);
  a.weights.high = map_plane(p.weight, p.n, p.k);
  a.weights.low = map_plane(p.weight_low, p.n, p.k);
  launch_persistent<Kernel>(a, stream);
}

}  // namespace

void linear_planes(LinearParams const& p, LinearTileSm90 const& tile, void* stream) {
  if (tile.tokens == kPlanesTiles.large.tokens)
    return run_planes<kPlanesTiles.large.tokens, kPlanesTiles.large.stages>(p, tile.group, stream);
  run_planes<kPlanesTiles.small.tokens, kPlanesTiles.small.stages>(p, tile.group, stream);
}

}  // namespace vdit::sm90
