// Launches the sm90 kernel of one head size. Included by one file a type and head size, so that compilers
// share the work.
#pragma once
#include "attention/kernel_sm90.cuh"
#include "attention/launch_util.cuh"
#include "attention/tile.h"

namespace vdit::sm90 {

// Tokens of one tensor as TMA sees them: columns, rows, heads, batch.
inline TensorMap map_rows(void const* rows, Strides3 const& stride, BlockSparseAttentionParams const& p,
                          int64_t length, int box_rows) {
  // A dimension of one entry is never stepped over; its stride may be anything, TMA's may not.
  auto const bytes = [](int64_t size, int64_t elements) { return size > 1 ? elements * 2 : int64_t{16}; };
  return make_tensor_map(rows, 2, {p.head_dim, length, p.heads, p.batch},
                         {bytes(length, stride.s), bytes(p.heads, stride.h), bytes(p.batch, stride.b)},
                         {64, box_rows, 1, 1}, SmemSwizzle::k128);
}

template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const& p, void* workspace, void* stream) {
  constexpr AttentionTileSm90 kTile = attention_tile_sm90(kHeadDim);
  using Kernel = BlockSparseAttentionKernel<T, kHeadDim, kTile.consumers, kTile.block_n>;
  using Order = OrderItemsKernel<Kernel::kBlockM>;
  static_assert(Kernel::smem_bytes() <= 227 * 1024, "The tile must fit the shared memory of an SM.");

  int64_t const items_head = max_query_tiles(p, Kernel::kBlockM);
  auto* const items = static_cast<WorkItem*>(workspace);
  auto* const next_item = reinterpret_cast<int32_t*>(items + p.batch * p.heads * items_head);
  launch<Order>(Grid{1, p.heads, p.batch}, Order::smem_bytes(), stream, {p, items, next_item, items_head});

  typename Kernel::Params a;
  a.attention = p;
  a.q = map_rows(p.q, p.stride_q, p, p.seqlen_q, 64);
  for (int i = 0; i < Kernel::kBoxes; ++i) {
    a.k[i] = map_rows(p.k, p.stride_k, p, p.seqlen_kv, 1 << i);
    a.v[i] = map_rows(p.v, p.stride_v, p, p.seqlen_kv, 1 << i);
  }
  a.items = items;
  a.next_item = next_item;
  a.items_head = items_head;
  a.num_items = p.batch * p.heads * items_head;
  int64_t const blocks = multiprocessors();
  launch<Kernel>(Grid{blocks < a.num_items ? blocks : a.num_items, 1, 1}, Kernel::smem_bytes(), stream, a);
}

}  // namespace vdit::sm90
