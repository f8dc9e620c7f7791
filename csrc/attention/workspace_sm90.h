// What a launch of block_sparse_attention for sm90 keeps in its workspace.
#pragma once
#include "attention/kernel_sm90_order.cuh"
#include "attention/tile.h"

namespace vdit::sm90 {

struct Workspace {
  ListBits bits;
  WorkItem* items = nullptr;
  int32_t* shorts = nullptr;
  int32_t* next_item = nullptr;
  int64_t items_head = 0;
  int64_t bytes = 0;
};

// Whether some query block may end in a tile of at most kPairRows rows. A uniform sequence's last block is
// one of very many.
inline bool has_short_tiles(BlockSparseAttentionParams const& p, int block_m) {
  if (p.q_offsets != nullptr) return true;
  int const left = p.q_block_size % block_m;
  return left > 0 && left <= kPairRows && p.num_q_blocks > 1;
}

// Bits of the lists, where tiles are to be paired and the bits do not outgrow their use.
inline ListBits shape_of_bits(BlockSparseAttentionParams const& p, int block_m) {
  ListBits bits;
  bits.row_words = (p.num_kv_blocks + 31) / 32 + 1;
  bool const shared_h = p.stride_num_blocks.h == 0 && p.stride_indices.h == 0;
  bool const shared_b = p.stride_num_blocks.b == 0 && p.stride_indices.b == 0;
  bits.stride.s = 1;
  bits.stride.h = shared_h ? 0 : p.num_q_blocks;
  bits.stride.b = shared_b ? 0 : p.num_q_blocks * (shared_h ? 1 : p.heads);
  if (!has_short_tiles(p, block_m) || bits.row_words > ListBitsKernel::kMaxWords) bits.row_words = 0;
  return bits;
}

// Cuts up `memory`; null just counts the bytes.
inline Workspace divide_workspace(BlockSparseAttentionParams const& p, int block_m, void* memory) {
  Workspace w;
  auto const take = [&](int64_t count, int64_t size) {
    void* const at = memory == nullptr ? nullptr : static_cast<char*>(memory) + w.bytes;
    w.bytes += (count * size + 15) / 16 * 16;
    return at;
  };
  int64_t const maps = p.batch * p.heads;
  w.items_head = max_query_tiles(p, block_m);
  w.items = static_cast<WorkItem*>(take(maps * w.items_head, sizeof(WorkItem)));
  w.next_item = static_cast<int32_t*>(take(1, sizeof(int32_t)));
  w.bits = shape_of_bits(p, block_m);
  if (w.bits.row_words > 0) {
    int64_t const lists =
        p.num_q_blocks * (w.bits.stride.h != 0 ? p.heads : 1) * (w.bits.stride.b != 0 ? p.batch : 1);
    w.bits.words = static_cast<uint32_t*>(take(lists * w.bits.row_words, sizeof(uint32_t)));
    w.shorts = static_cast<int32_t*>(take(maps * p.num_q_blocks, sizeof(int32_t)));
  }
  return w;
}

}  // namespace vdit::sm90
