// A program that does not know torch: one query block that sees the second of two key blocks.
#include <cmath>
#include <cstdio>
#include <vector>

#include "vdit/attention.h"
#include "vdit/threads.h"

int main() {
  constexpr int kRows = 4, kDim = 64;
  std::vector<float> q(kRows * kDim, 0.f), k(2 * kRows * kDim, 0.f), v(2 * kRows * kDim), out(kRows * kDim, NAN),
      lse(kRows, NAN);
  for (int row = 0; row < 2 * kRows; ++row)
    for (int d = 0; d < kDim; ++d) v[row * kDim + d] = static_cast<float>(row);
  int32_t const num_blocks = 1, list = 1;

  vdit::BlockSparseAttentionParams p;
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
  p.kv_num_blocks = &num_blocks, p.kv_indices = &list;
  p.stride_q = p.stride_out = {kRows * kDim, kRows * kDim, kDim};
  p.stride_k = p.stride_v = {2 * kRows * kDim, 2 * kRows * kDim, kDim};
  p.stride_lse = {kRows, kRows};
  p.batch = p.heads = 1, p.seqlen_q = kRows, p.seqlen_kv = 2 * kRows;
  p.num_q_blocks = 1, p.num_kv_blocks = 2, p.list_width = 1;
  p.head_dim = kDim, p.q_block_size = p.kv_block_size = kRows;
  vdit::run_block_sparse_attention_cpu(p, vdit::std_parallel_for(2));

  // Equal scores: the mean of values 4, 5, 6, 7, and log 4.
  for (float x : out)
    if (std::abs(x - 5.5f) > 1e-5f) return std::printf("out %f, expected 5.5\n", x), 1;
  for (float x : lse)
    if (std::abs(x - std::log(4.f)) > 1e-5f) return std::printf("lse %f, expected %f\n", x, std::log(4.f)), 1;
  std::printf("ok\n");
}
