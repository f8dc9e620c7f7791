// The work of one block_sparse_attention launch, cut into items and put in order.
//
// Head after head, because thread blocks that run at the same time should read the same keys and values from
// L2; within a head the longest key lists first, so that no long item is left for the end. A list's length is
// its number of blocks: near enough to sort by, and known without reading the list.
#pragma once
#include "attention/kernel_list.cuh"

namespace vdit::sm90 {

// Queries [row0, row0 + rows) of one head, all of one query block. rows == 0: nothing to do.
struct WorkItem {
  int32_t row0, rows;
  int32_t q_block;  // num_q_blocks: rows past the last offset, which no block covers and which see nothing
  int32_t unused;
};

// Grid: y heads, z batch. One thread block sorts the items of a head by counting; the tiles of one query
// block stay together, for they read the same keys.
template <int kBlockM>
struct OrderItemsKernel {
  struct Params {
    BlockSparseAttentionParams attention;
    WorkItem* items;     // [b, h, items_head]
    int32_t* next_item;  // becomes 0
    int64_t items_head;
  };
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBuckets = kThreads;  // of list lengths, the longest first

  struct Block {
    int32_t begin, rows, bucket;
    VDIT_DEVICE int32_t tiles() const { return (rows + kBlockM - 1) / kBlockM; }
  };

  VDIT_DEVICE static Block read_block(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t i) {
    int32_t const* offsets = p.q_offsets;
    if (offsets != nullptr) offsets += b * p.stride_q_offsets.b + h * p.stride_q_offsets.h;
    RowSpan span;
    if (i < p.num_q_blocks) {
      span = block_span(offsets, i, p.q_block_size, p.seqlen_q);
    } else if (offsets != nullptr) {  // rows past the last offset
      span.begin = clamp_to<int32_t>(offsets[i], 0, static_cast<int32_t>(p.seqlen_q));
      span.rows = static_cast<int32_t>(p.seqlen_q) - span.begin;
    }
    bool bad = false;  // the producer asks again, and tells
    int64_t const length = list_length(p, b, h, i, bad);
    int64_t const bucket = (p.list_width - length) * kBuckets / (static_cast<int64_t>(p.list_width) + 1);
    return {span.begin, span.rows, static_cast<int32_t>(bucket)};
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    BlockSparseAttentionParams const& p = a.attention;
    int64_t const b = block_idx_z(), h = block_idx_y();
    int32_t* start = reinterpret_cast<int32_t*>(smem);  // [kBuckets], then [warps]
    int32_t* warp_sums = start + kBuckets;
    if (thread_idx() == 0 && map_index() == 0) *a.next_item = 0;

    start[thread_idx()] = 0;
    sync_block();
    for (int64_t i = thread_idx(); i <= p.num_q_blocks; i += kThreads) {
      Block const block = read_block(p, b, h, i);
      if (block.rows > 0) atomic_add(&start[block.bucket], block.tiles());
    }
    sync_block();
    int32_t const total = scan(start, warp_sums);
    sync_block();

    WorkItem* items = a.items + map_index() * a.items_head;
    for (int64_t i = thread_idx(); i <= p.num_q_blocks; i += kThreads) {
      Block const block = read_block(p, b, h, i);
      if (block.rows == 0) continue;
      int32_t at = atomic_add(&start[block.bucket], block.tiles());
      // NOTE: offsets that fall name more tiles than there is room for; no plan of ours has them, and the GPU
      // does not read plans beforehand.
      for (int32_t row = 0; row < block.rows && at < a.items_head; row += kBlockM, ++at) {
        int32_t const left = block.rows - row;
        items[at] = {block.begin + row, left < kBlockM ? left : kBlockM, static_cast<int32_t>(i), 0};
      }
    }
    for (int64_t at = total + thread_idx(); at < a.items_head; at += kThreads) items[at] = {};
  }

  // Counts become the buckets' first places; returns their sum.
  VDIT_DEVICE static int32_t scan(int32_t* start, int32_t* warp_sums) {
    int32_t const mine = start[thread_idx()];
    int32_t const upto = warp_prefix_sum(mine);
    if (lane_idx() == 31) warp_sums[warp_idx()] = upto;
    sync_block();
    int32_t before = 0, total = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i < warp_idx()) before += warp_sums[i];
      total += warp_sums[i];
    }
    start[thread_idx()] = before + upto - mine;
    return total;
  }

  static constexpr int smem_bytes() { return (kBuckets + kThreads / 32) * 4; }
};

}  // namespace vdit::sm90
