// Launches the tile that pick_tile chose. Included by one file a type and head size, so that compilers share
// the work.
#pragma once
#include "attention/kernel_sm80.cuh"
#include "common/launch_util.cuh"

namespace vdit::sm80 {

template <class T, int kHeadDim, int kBlockM>
void attend(BlockSparseAttentionParams const& p, void* stream) {
  using Kernel = BlockSparseAttentionKernel<T, kHeadDim, kBlockM>;
  int64_t const tiles = max_query_tiles(p, kBlockM);
  launch<Kernel>(Grid{tiles, p.heads, p.batch}, Kernel::kTile.smem_bytes(), stream, p);
}

template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream) {
  if (tile.block_m == 64) return attend<T, kHeadDim, 64>(p, stream);
  attend<T, kHeadDim, 128>(p, stream);
}

}  // namespace vdit::sm80
