// What the launchers of block_sparse_attention check for callers that come without torch, before anything
// runs.
#pragma once
#include "common/launch_util.cuh"
#include "attention/tile.h"
#include "vdit/attention.h"

namespace vdit {

// The kernels move 16 bytes at a time. A dimension of one entry is never stepped over.
inline bool rows_are_aligned(BlockSparseAttentionParams const& p) {
  auto const aligned = [&](void const* rows, Strides3 const& stride, int64_t length) {
    return all_multiples(16, {rows}, 2,
                         {p.batch > 1 ? stride.b : 0, p.heads > 1 ? stride.h : 0, length > 1 ? stride.s : 0});
  };
  return aligned(p.q, p.stride_q, p.seqlen_q) && aligned(p.out, p.stride_out, p.seqlen_q) &&
         aligned(p.k, p.stride_k, p.seqlen_kv) && aligned(p.v, p.stride_v, p.seqlen_kv);
}

// Throws std::runtime_error with one sentence.
inline void check_cuda_attention(BlockSparseAttentionParams const& p) {
  auto const refuse = [](std::string const& sentence) {
    throw std::runtime_error("vdit::block_sparse_attention: " + sentence);
  };
  check_cuda_head_dim(p.head_dim);
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    refuse("on CUDA the dtype must be fp16 or bf16, got code " + std::to_string(static_cast<int>(p.dtype)) +
           ".");
  }
  if (!rows_are_aligned(p)) {
    refuse(
        "on CUDA the rows of q, k, v and out must start at multiples of 16 bytes, got a pointer or a stride "
        "that is not; align them.");
  }
}

}  // namespace vdit
