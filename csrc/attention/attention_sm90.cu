// block_sparse_attention for sm90: the entry.
#include "attention/launch_checks.h"
#include "attention/launch_sm90.h"
#include "attention/tile.h"
#include "attention/workspace_sm90.h"

namespace vdit {
namespace sm90 {

// attention_<type>_d<head size>_sm90.cu
template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const& p, void* workspace, void* stream);

template <class T>
void attend_any(BlockSparseAttentionParams const& p, void* workspace, void* stream) {
  if (p.head_dim == 64) return attend<T, 64>(p, workspace, stream);
  if (p.head_dim == 96) return attend<T, 96>(p, workspace, stream);
  attend<T, 128>(p, workspace, stream);
}

}  // namespace sm90

bool can_run_block_sparse_attention_sm90(BlockSparseAttentionParams const& p) {
  return p.seqlen_kv > 0 && sm90::can_walk(p.stride_q, p.batch, p.heads, p.seqlen_q) &&
         sm90::can_walk(p.stride_k, p.batch, p.heads, p.seqlen_kv) &&
         sm90::can_walk(p.stride_v, p.batch, p.heads, p.seqlen_kv);
}

int64_t block_sparse_attention_sm90_workspace_bytes(BlockSparseAttentionParams const& p) {
  return sm90::divide_workspace(p, attention_tile_sm90(p.head_dim).block_m(), nullptr).bytes;
}

void run_block_sparse_attention_sm90(BlockSparseAttentionParams const& p, void* workspace, void* stream) {
  if (p.seqlen_q == 0) return;
  check_cuda_attention(p);
  if (!can_run_block_sparse_attention_sm90(p)) {
    throw std::runtime_error(
        "vdit::block_sparse_attention: keys and strides above 0 were expected by the sm90 kernel, got none; "
        "call run_block_sparse_attention_sm80.");
  }
  if (p.dtype == DType::kFloat16) return sm90::attend_any<cute::half_t>(p, workspace, stream);
  sm90::attend_any<cute::bfloat16_t>(p, workspace, stream);
}

}  // namespace vdit
