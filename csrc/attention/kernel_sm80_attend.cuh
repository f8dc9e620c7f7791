// Launches the tile that pick_tile chose. Included by one file a type, so that two compilers can share the
// work.
#pragma once
#include "attention/kernel_sm80.cuh"
#include "attention/kernel_sm80_launch.cuh"

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

template <class T>
void attend(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream) {
  if (tile.head_dim == 64) return attend<T, 64>(p, tile, stream);
  if (tile.head_dim == 96) return attend<T, 96>(p, tile, stream);
  attend<T, 128>(p, tile, stream);
}

// attention_bf16_sm80.cu
void attend_bf16(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream);

}  // namespace vdit::sm80
