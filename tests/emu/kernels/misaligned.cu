// What a C++ caller of run_block_sparse_attention_sm80 is told before anything is launched: the kernels
// behind it are left out here, and say so where they would run.
#include <cstdio>
#include <cstring>

#include "attention/attention_sm80.cu"

namespace vdit::sm80 {
template <class T, int kHeadDim>
void attend(BlockSparseAttentionParams const&, AttentionTile const&, void*) {
  printf("launched\n");
}
}  // namespace vdit::sm80

int main(int, char** arguments) {
  using namespace vdit;
  alignas(16) static char rows[4096];
  BlockSparseAttentionParams p;
  p.q = p.k = p.v = p.out = rows;
  p.batch = p.heads = 1, p.seqlen_q = p.seqlen_kv = 4, p.num_q_blocks = p.num_kv_blocks = 1;
  p.head_dim = 64, p.dtype = DType::kBFloat16;
  for (Strides3* stride : {&p.stride_q, &p.stride_k, &p.stride_v, &p.stride_out}) *stride = {3, 5, 64};
  if (!strcmp(arguments[1], "pointer")) p.v = rows + 2;
  if (!strcmp(arguments[1], "stride")) p.stride_k.s = 68;
  if (!strcmp(arguments[1], "heads")) p.heads = 2;  // its stride of 5 then counts
  if (!strcmp(arguments[1], "dtype")) p.dtype = DType::kFloat32;
  try {
    run_block_sparse_attention_sm80(p, nullptr);
  } catch (std::exception const& problem) {
    printf("%s\n", problem.what());
  }
}
