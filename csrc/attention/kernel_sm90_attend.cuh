// Launches the sm90 kernel of one head size. Included by one file a type and head size, so that compilers
// share the work.
#pragma once
#include <cstdlib>
#include <cstring>

#include "attention/kernel_sm90.cuh"
#include "attention/launch_sm90.h"
#include "common/launch_util.cuh"
#include "attention/tile.h"
#include "attention/workspace_sm90.h"

namespace vdit::sm90 {

// How runs of rows are cut: VDIT_ATTENTION_RUNS is "binary" (the default) or "overlap", for benches and
// tests.
inline RunBoxes run_boxes() {
  char const* value = std::getenv("VDIT_ATTENTION_RUNS");
  return value != nullptr && std::strcmp(value, "overlap") == 0 ? RunBoxes::kOverlap : RunBoxes::kBinary;
}

template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const& p, void* workspace, void* stream) {
  using Kernel = BlockSparseAttentionKernel<T, kHeadDim>;
  using Order = OrderItemsKernel<Kernel::kBlockM>;
  static_assert(Kernel::smem_bytes() <= 227 * 1024, "The tile must fit the shared memory of an SM.");

  Workspace const space = divide_workspace(p, Kernel::kBlockM, workspace);
  if (space.bits.words != nullptr) {
    int64_t const batch = space.bits.stride.b != 0 ? p.batch : 1,
                  heads = space.bits.stride.h != 0 ? p.heads : 1;
    launch<ListBitsKernel>(Grid{ceil_div(p.num_q_blocks, ListBitsKernel::kWarps), heads, batch},
                           ListBitsKernel::smem_bytes(space.bits.row_words), stream, {p, space.bits});
  }
  launch<Order>(Grid{1, p.heads, p.batch}, Order::smem_bytes(), stream,
                {p, space.bits, space.items, space.shorts, space.next_item, space.items_head});

  typename Kernel::Params a;
  a.attention = p;
  RowsShape const queries{p.batch, p.heads, p.seqlen_q, p.head_dim};
  RowsShape const keys{p.batch, p.heads, p.seqlen_kv, p.head_dim};
  a.q = map_rows(p.q, p.stride_q, queries, 64);
  for (int i = 0; i < Kernel::kBoxes; ++i) {
    a.k[i] = map_rows(p.k, p.stride_k, keys, 1 << i);
    a.v[i] = map_rows(p.v, p.stride_v, keys, 1 << i);
  }
  a.bits = space.bits;
  a.run_boxes = run_boxes();
  a.items = space.items;
  a.next_item = space.next_item;
  a.items_head = space.items_head;
  a.num_items = p.batch * p.heads * space.items_head;
  int64_t const blocks = multiprocessors();
  launch<Kernel>(Grid{blocks < a.num_items ? blocks : a.num_items, 1, 1}, Kernel::smem_bytes(), stream, a);
}

}  // namespace vdit::sm90
