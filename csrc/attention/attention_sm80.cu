// Launcher of kernel_sm80.cuh. One instantiation a type, head size and tile height.
#include "attention/kernel_sm80.cuh"
#include "attention/kernel_sm80_launch.cuh"

namespace vdit {
namespace {

template <class T, int kHeadDim, int kBlockM>
void attend(BlockSparseAttentionParams const& p, void* stream) {
  using Kernel = BlockSparseAttentionKernel<T, kHeadDim, kBlockM>;
  int64_t const tiles = max_query_tiles(p, kBlockM);
  launch<Kernel>(Grid{tiles, p.heads, p.batch},
                 Kernel::kTile.smem_bytes(), stream, p);
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

}  // namespace

void run_block_sparse_attention_sm80(BlockSparseAttentionParams const& p, void* stream) {
  if (p.seqlen_q == 0) return;
  AttentionTile const tile = pick_tile(p);
  if (p.dtype == DType::kFloat16) return attend<cute::half_t>(p, tile, stream);
  if (p.dtype == DType::kBFloat16) return attend<cute::bfloat16_t>(p, tile, stream);
  throw std::runtime_error("vdit::block_sparse_attention: on CUDA the dtype must be fp16 or bf16, got code " +
                           std::to_string(static_cast<int>(p.dtype)) + ".");
}

}  // namespace vdit
