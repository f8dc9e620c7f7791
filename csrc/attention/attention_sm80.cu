// block_sparse_attention for sm80: the entry.
#include "attention/launch_checks.h"
#include "attention/tile.h"

namespace vdit {
namespace sm80 {

// attention_<type>_d<head size>_sm80.cu
template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream);

template <class T>
void attend_any(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream) {
  if (tile.head_dim == 64) return attend<T, 64>(p, tile, stream);
  if (tile.head_dim == 96) return attend<T, 96>(p, tile, stream);
  attend<T, 128>(p, tile, stream);
}

}  // namespace sm80

void run_block_sparse_attention_sm80(BlockSparseAttentionParams const& p, void* stream) {
  if (p.seqlen_q == 0) return;
  check_cuda_attention(p);
  AttentionTile const tile = pick_tile(p);
  if (p.dtype == DType::kFloat16) return sm80::attend_any<cute::half_t>(p, tile, stream);
  sm80::attend_any<cute::bfloat16_t>(p, tile, stream);
}

}  // namespace vdit
