// block_sparse_attention for sm80: the bf16 instantiations.
#include "attention/kernel_sm80_attend.cuh"

namespace vdit::sm80 {

void attend_bf16(BlockSparseAttentionParams const& p, AttentionTile const& tile, void* stream) {
  attend<cute::bfloat16_t>(p, tile, stream);
}

}  // namespace vdit::sm80
