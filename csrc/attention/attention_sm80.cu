// block_sparse_attention for sm80: the entry, and the fp16 instantiations.
#include "attention/kernel_sm80_attend.cuh"

namespace vdit {

void run_block_sparse_attention_sm80(BlockSparseAttentionParams const& p, void* stream) {
  if (p.seqlen_q == 0) return;
  AttentionTile const tile = pick_tile(p);
  if (p.dtype == DType::kFloat16) return sm80::attend<cute::half_t>(p, tile, stream);
  if (p.dtype == DType::kBFloat16) return sm80::attend_bf16(p, tile, stream);
  throw std::runtime_error("vdit::block_sparse_attention: on CUDA the dtype must be fp16 or bf16, got code " +
                           std::to_string(static_cast<int>(p.dtype)) + ".");
}

}  // namespace vdit
