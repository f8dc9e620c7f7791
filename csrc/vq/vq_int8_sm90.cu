// vq_linear of int8 words for sm90: words are looked up where the registers of wgmma's first operand are
// filled.
#include "common/gemm_launch_sm90.h"
#include "vq/decode_sm90.cuh"
#include "vq/tile_sm90.h"

namespace vdit {
namespace sm90 {
namespace {

constexpr VqTilesSm90 kVqTiles = vq_tiles_sm90(VqFormat::k256x4);

// Tiles [n / 32, k / 64] in pieces of at most 512 bytes; boxes of 128 channels x 8 strips.
template <class Weights>
TensorMap map_vq_tiles(VqLinearParams const& p) {
  constexpr int kPieces = Weights::kTileBytes > 512 ? 2 : 1, kPiece = Weights::kTileBytes / kPieces;
  int64_t const tiles = ceil_div(p.k, 64), pieces = tiles * kPieces;
  return make_tensor_map(p.codes, 2, {kPiece / 2, pieces, ceil_div(p.n, 32)},
                         {kPiece, tiles * Weights::kTileBytes}, {kPiece / 2, 2 * kPieces, 8},
                         SmemSwizzle::kNone);
}

template <class Weights, int kTokens, int kStages>
void run_vq(VqLinearParams const& p, int group, void* stream) {
  using Kernel = RegisterWeightsKernel<Weights, kTokens, kStages>;
  auto a = gemm_params<Kernel>(p, 1, group);
  a.weights = {map_vq_tiles<Weights>(p), p.codebook};
  launch_persistent<Kernel>(a, stream);
}

template <class Weights>
void run_vq_tile(VqLinearParams const& p, VqTileSm90 const& tile, void* stream) {
  if (tile.tokens == kVqTiles.large.tokens) {
    return run_vq<Weights, kVqTiles.large.tokens, kVqTiles.large.stages>(p, tile.group, stream);
  }
  run_vq<Weights, kVqTiles.small.tokens, kVqTiles.small.stages>(p, tile.group, stream);
}

void vq_int8(VqLinearParams const& p, VqTileSm90 const& tile, void* stream) {
  if (p.format == VqFormat::k256x4) return run_vq_tile<VqWeights256x4>(p, tile, stream);
  run_vq_tile<VqWeights64x2>(p, tile, stream);
}

}  // namespace
}  // namespace sm90

bool can_run_vq_linear_sm90(VqLinearParams const& p) {
  // As can_run_linear_sm90.
  return (p.m <= 1 || p.stride_x >= p.k) && p.is_int8 && p.m > 0 && p.n > 0 && p.k > 0 && p.k % 16 == 0 &&
         p.k <= 65536 && p.m < (int64_t{1} << 30) && p.n < (int64_t{1} << 30) &&
         (p.m + 63) / 64 * ((p.n + 255) / 256) < (int64_t{1} << 30) &&
         all_multiples(16, {p.x, p.codes}, 1, {p.m > 1 ? p.stride_x : 0}) && address(p.codebook) % 4 == 0;
}

bool is_vq_linear_sm90_faster(VqLinearParams const& p) {
  return choose_vq_kernel_sm90(p, multiprocessors()).kernel == 90;
}

void run_vq_linear_sm90(VqLinearParams const& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  if (!can_run_vq_linear_sm90(p)) {
    throw std::runtime_error(
        "vdit::vq_linear: int8 rows of 16 to 65,536 channels, a multiple of 16, at multiples of 16 bytes "
        "were expected by the sm90 kernel, got others; call run_vq_linear_sm80.");
  }
  sm90::vq_int8(p, pick_vq_tile_sm90(p, multiprocessors()), stream);
}

}  // namespace vdit
