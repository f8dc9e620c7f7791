// The work of one block_sparse_attention launch, cut into items and put in order.
//
// Head after head, because thread blocks that run at the same time should read the same keys and values from
// L2; within a head the longest key lists first, so that no long item is left for the end. A list's length is
// its number of blocks: near enough to sort by, and known without reading the list.
//
// A tile of at most 64 query rows (a 64-row block, or what is left of a cluster) would keep one of the
// consumers busy and let the others idle. Two of them share an item then, each with a key list of its own;
// what both lists hold is loaded once. For that the lists are written as bits beforehand.
#pragma once
#include "attention/kernel_list.cuh"

namespace vdit::sm90 {

// Queries [row0, row0 + rows) of one head, all of one query block.
struct WorkPart {
  int32_t row0, rows;  // rows 0: none
  int32_t q_block;     // num_q_blocks: rows past the last offset, which no block covers and which see nothing
};

// What the consumers of a thread block do at a time. A second part comes beside a first of at most kPairRows.
struct WorkItem {
  WorkPart part[2];  // the first without rows: nothing to do
};
constexpr int kPairRows = 64;

// The key lists of one launch as bits, bit i % 32 of word i / 32 for block i.
struct ListBits {
  uint32_t* words = nullptr;  // [lists, row_words]; null: tiles are not paired
  int64_t row_words = 0;      // the last one is 1 where the bits say what the list does
  Strides3 stride;            // in rows: batch, head, query block; 0 where lists are shared

  VDIT_DEVICE uint32_t* row(int64_t b, int64_t h, int64_t q_block) const {
    return words + (b * stride.b + h * stride.h + q_block * stride.s) * row_words;
  }
  // Lists that name a block twice, or none that there is, stay lists: rows past the offsets have none.
  VDIT_DEVICE bool has(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t q_block) const {
    return words != nullptr && q_block < p.num_q_blocks && row(b, h, q_block)[row_words - 1] != 0;
  }
};

// Grid: x query blocks by warps, y heads, z batch (1 where the lists are shared). A warp writes one list's
// bits.
struct ListBitsKernel {
  struct Params {
    BlockSparseAttentionParams attention;
    ListBits bits;
  };
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxWords = 2048;  // of a row: up to 65,504 key blocks

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    BlockSparseAttentionParams const& p = a.attention;
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const q_block = static_cast<int64_t>(block_idx_x()) * kWarps + warp_idx();
    if (q_block >= p.num_q_blocks) return;
    int const words = static_cast<int>(a.bits.row_words) - 1;
    uint32_t* bits = reinterpret_cast<uint32_t*>(smem) + warp_idx() * words;
    for (int i = lane_idx(); i < words; i += 32) bits[i] = 0;
    sync_warp();

    bool wrong = false;
    int32_t const length = list_length(p, b, h, q_block, wrong);
    int32_t const* list = key_list(p, b, h, q_block);
    for (int32_t at = lane_idx(); at < length; at += 32) {
      int32_t const block = list[at];
      if (block < 0 || block >= p.num_kv_blocks) {
        wrong = true;
      } else {
        uint32_t const bit = 1u << (block & 31);
        if (atomic_or(&bits[block >> 5], bit) & bit) wrong = true;  // named twice, and so counted twice
      }
    }
    wrong = warp_any(wrong);
    uint32_t* out = a.bits.row(b, h, q_block);
    for (int i = lane_idx(); i < words; i += 32) out[i] = bits[i];
    if (lane_idx() == 0) out[words] = wrong ? 0 : 1;
  }

  static constexpr int64_t smem_bytes(int64_t row_words) { return kWarps * row_words * 4; }
};

// Grid: y heads, z batch. One thread block sorts the items of a head by counting; the tiles of one query
// block stay together, for they read the same keys.
template <int kBlockM>
struct OrderItemsKernel {
  struct Params {
    BlockSparseAttentionParams attention;
    ListBits bits;
    WorkItem* items;     // [b, h, items_head]
    int32_t* shorts;     // [b, h, num_q_blocks], query blocks that end in a tile to be paired
    int32_t* next_item;  // becomes 0
    int64_t items_head;
  };
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBuckets = kThreads;  // of list lengths, the longest first
  static_assert(kBlockM > kPairRows, "Paired tiles leave consumers over.");

  struct Shared {
    int32_t start[kBuckets];        // of items; counts first
    int32_t short_start[kBuckets];  // of tiles to be paired
    int32_t bucket[kThreads];
    int32_t warp_sums[kThreads / 32];
  };
  static constexpr int smem_bytes() { return sizeof(Shared); }

  // A query block's tiles: `tiles` for itself and, where it is_short, a last one for pairing.
  struct Block {
    int32_t begin, rows, bucket, tiles;
    bool is_short;
    VDIT_DEVICE int32_t short_row() const { return tiles * kBlockM; }
  };

  VDIT_DEVICE static Block read_block(Params const& a, int64_t b, int64_t h, int64_t i) {
    BlockSparseAttentionParams const& p = a.attention;
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
    int32_t const left = span.rows % kBlockM;
    bool const is_short = left > 0 && left <= kPairRows && a.bits.has(p, b, h, i);
    return {span.begin, span.rows, static_cast<int32_t>(bucket),
            span.rows / kBlockM + (left > 0 && !is_short ? 1 : 0), is_short};
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    BlockSparseAttentionParams const& p = a.attention;
    int64_t const b = block_idx_z(), h = block_idx_y();
    Shared& s = *reinterpret_cast<Shared*>(smem);
    WorkItem* items = a.items + map_index() * a.items_head;
    int32_t* shorts = a.shorts + map_index() * p.num_q_blocks;
    if (thread_idx() == 0 && map_index() == 0) *a.next_item = 0;

    s.start[thread_idx()] = s.short_start[thread_idx()] = 0;
    sync_block();
    for (int64_t i = thread_idx(); i <= p.num_q_blocks; i += kThreads) {
      Block const block = read_block(a, b, h, i);
      if (block.tiles > 0) atomic_add(&s.start[block.bucket], block.tiles);
      if (block.is_short) atomic_add(&s.short_start[pair_bucket(p, block)], 1);
    }
    sync_block();
    int32_t const num_shorts = scan(s.short_start, s.warp_sums);
    sync_block();
    sort_shorts(a, b, h, s, shorts);
    // A pair counts as its longer list, which comes first where lists differ.
    for (int32_t at = thread_idx() * 2; at < num_shorts; at += kThreads * 2) {
      atomic_add(&s.start[read_block(a, b, h, shorts[at]).bucket], 1);
    }
    sync_block();
    int32_t const total = scan(s.start, s.warp_sums);
    sync_block();

    for (int64_t i = thread_idx(); i <= p.num_q_blocks; i += kThreads) {
      Block const block = read_block(a, b, h, i);
      if (block.tiles == 0) continue;
      int32_t at = atomic_add(&s.start[block.bucket], block.tiles);
      // NOTE: offsets that fall name more tiles than there is room for; no plan of ours has them, and the GPU
      // does not read plans beforehand.
      for (int32_t tile = 0; tile < block.tiles && at < a.items_head; ++tile, ++at) {
        int32_t const row = tile * kBlockM, left = block.rows - row;
        items[at] = {{{block.begin + row, left < kBlockM ? left : kBlockM, static_cast<int32_t>(i)}, {}}};
      }
    }
    for (int32_t i = thread_idx() * 2; i < num_shorts; i += kThreads * 2) {
      Block const first = read_block(a, b, h, shorts[i]);
      int32_t const at = atomic_add(&s.start[first.bucket], 1);
      if (at >= a.items_head) continue;
      items[at].part[0] = short_part(first, shorts[i]);
      items[at].part[1] = WorkPart{};
      if (i + 1 < num_shorts)
        items[at].part[1] = short_part(read_block(a, b, h, shorts[i + 1]), shorts[i + 1]);
    }
    for (int64_t at = total + thread_idx(); at < a.items_head; at += kThreads) items[at] = {};
  }

  VDIT_DEVICE static WorkPart short_part(Block const& block, int32_t q_block) {
    return {block.begin + block.short_row(), block.rows - block.short_row(), q_block};
  }

  // Neighbours in a uniform sequence see much the same keys and are paired as they come; clusters are in no
  // order, and those with lists of one length are.
  VDIT_DEVICE static int32_t pair_bucket(BlockSparseAttentionParams const& p, Block const& block) {
    return p.q_offsets == nullptr ? 0 : block.bucket;
  }

  // Query blocks with a tile to be paired, stably by bucket: who is paired with whom decides the order of
  // sums, which must not depend on timing. Thread by thread, kThreads blocks at a time.
  VDIT_DEVICE static void sort_shorts(Params const& a, int64_t b, int64_t h, Shared& s, int32_t* shorts) {
    if (a.bits.words == nullptr) return;
    for (int64_t i0 = 0; i0 < a.attention.num_q_blocks; i0 += kThreads) {
      int64_t const i = i0 + thread_idx();
      int32_t bucket = -1;
      if (i < a.attention.num_q_blocks) {
        Block const block = read_block(a, b, h, i);
        if (block.is_short) bucket = pair_bucket(a.attention, block);
      }
      s.bucket[thread_idx()] = bucket;
      sync_block();
      int32_t before = 0, all = 0;
      for (int t = 0; t < kThreads; ++t) {
        bool const same = s.bucket[t] == bucket;
        if (same && t < thread_idx()) ++before;
        if (same) ++all;
      }
      int32_t const at = bucket < 0 ? 0 : s.short_start[bucket] + before;
      sync_block();
      if (bucket >= 0) shorts[at] = static_cast<int32_t>(i);
      if (bucket >= 0 && before == all - 1) s.short_start[bucket] = at + 1;
    }
    sync_block();
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
};

}  // namespace vdit::sm90
