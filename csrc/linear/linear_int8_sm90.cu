// The linear of int8 weights for sm90.
#include "linear/kernel_sm90_int8.cuh"
#include "linear/launch_sm90.h"

namespace vdit::sm90 {
namespace {

constexpr LinearTilesSm90 kInt8Tiles = linear_tiles_sm90(WeightFormat::kInt8);

template <class Kernel>
void run_int8(LinearParams const& p, int group, void* stream) {
  auto a = gemm_params<Kernel>(p, 1, group);
  a.weight = make_tensor_map(p.weight, 1, {p.k, p.n}, {p.n > 1 ? p.stride_weight : int64_t{16}},
                             {kStepBytes, Kernel::kOutputs}, SmemSwizzle::k128);
  launch_persistent<Kernel>(a, stream);
}

}  // namespace

void linear_int8(LinearParams const& p, LinearTileSm90 const& tile, void* stream) {
  using Large =
      Int8LinearKernel<kInt8Tiles.large.tokens / 128, kInt8Tiles.large.outputs, kInt8Tiles.large.stages>;
  using Small =
      Int8LinearKernel<kInt8Tiles.small.tokens / 128, kInt8Tiles.small.outputs, kInt8Tiles.small.stages>;
  if (tile.tokens == Large::kTokens) return run_int8<Large>(p, tile.group, stream);
  run_int8<Small>(p, tile.group, stream);
}

}  // namespace vdit::sm90
