// A query block's key list as the attention kernels read it: never past what the tensors hold, whatever the
// lists say.
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// Entries of the list of a query block, as many as there can be; num_q_blocks is the rows that no block
// covers and which see nothing. Sets `bad` for a length that no list has.
VDIT_DEVICE int32_t list_length(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t q_block,
                                bool& bad) {
  if (q_block >= p.num_q_blocks) return 0;
  int32_t const length = p.kv_num_blocks[b * p.stride_num_blocks.b + h * p.stride_num_blocks.h +
                                         q_block * p.stride_num_blocks.s];
  bad = bad || length < 0 || length > p.list_width;
  return clamp_to<int32_t>(length, 0, p.list_width);
}

// Rows of a key block that there is.
VDIT_DEVICE RowSpan key_block_rows(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t block) {
  int32_t const* offsets = p.kv_offsets;
  if (offsets != nullptr) offsets += b * p.stride_kv_offsets.b + h * p.stride_kv_offsets.h;
  return block_span(offsets, block, p.kv_block_size, p.seqlen_kv);
}

VDIT_DEVICE int32_t const* key_list(BlockSparseAttentionParams const& p, int64_t b, int64_t h,
                                    int64_t q_block) {
  return p.kv_indices + b * p.stride_indices.b + h * p.stride_indices.h + q_block * p.stride_indices.s;
}

// Rows of the key block that entry `at` of a list names. Sets `bad` when there is no such block.
VDIT_DEVICE RowSpan listed_rows(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t q_block,
                                int32_t at, bool& bad) {
  int64_t const block = key_list(p, b, h, q_block)[at];
  if (block < 0 || block >= p.num_kv_blocks) {
    bad = true;
    return {};
  }
  return key_block_rows(p, b, h, block);
}

}  // namespace vdit
