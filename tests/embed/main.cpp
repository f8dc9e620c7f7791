// A program that does not know torch: an attention and a quantized linear layer.
#include <cmath>
#include <cstdio>
#include <vector>

#include "vdit/attention.h"
#include "vdit/linear.h"
#include "vdit/threads.h"

namespace {

// One query block that sees the second of two key blocks.
int attend() {
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
  return 0;
}

// Rows of 1, 2, 3, ... quantized and multiplied by weights of 1 and of -1.
int multiply() {
  constexpr int kRows = 3, kChannels = 32, kOutputs = 2;
  std::vector<float> x(kRows * kChannels), scale(kRows), weight_scale(kOutputs, 1.f), out(kRows * kOutputs, NAN);
  std::vector<int8_t> codes(kRows * kChannels), weight(kOutputs * kChannels, 1);
  std::vector<int32_t> sum(kRows);
  for (int i = 0; i < kRows * kChannels; ++i) x[i] = static_cast<float>(i / kChannels + 1);
  for (int k = 0; k < kChannels; ++k) weight[kChannels + k] = -1;

  vdit::QuantizeRowsParams q;
  q.x = x.data(), q.codes = codes.data(), q.scale = scale.data(), q.sum = sum.data();
  q.stride_x = {0, kChannels}, q.stride_codes = kChannels;
  q.batch = 1, q.tokens = kRows, q.channels = kChannels;
  vdit::run_quantize_rows_cpu(q, vdit::std_parallel_for(2));

  vdit::LinearParams p;
  p.x = codes.data(), p.weight = weight.data();
  p.stride_x = p.stride_weight = kChannels;
  p.m = kRows, p.n = kOutputs, p.k = kChannels;
  p.epilogue.x_scale = scale.data(), p.epilogue.weight_scale = weight_scale.data(), p.epilogue.out = out.data();
  p.epilogue.rows_per_batch = kRows, p.epilogue.out_dtype = vdit::DType::kFloat32;
  vdit::run_linear_cpu(p, vdit::std_parallel_for(2));

  for (int i = 0; i < kRows * kOutputs; ++i) {
    float const expected = static_cast<float>((i / kOutputs + 1) * (i % kOutputs == 0 ? kChannels : -kChannels));
    if (std::abs(out[i] - expected) > 1e-3f)
      return std::printf("product %f, expected %f\n", out[i], expected), 1;
  }
  return 0;
}

}  // namespace

int main() {
  if (attend() != 0 || multiply() != 0) return 1;
  std::printf("ok\n");
}
