// Launch structs of the attention family: what every backend (cpu, sm80, sm90) is called with.
//
// Shapes: b batch, h heads, q query tokens, kv key tokens, d head size, nq and nkv blocks, w list width.
// Index arithmetic is 64-bit throughout: b*h*q*d exceeds 2^31 at video lengths.
#pragma once
#include <cstdint>

#include "vdit/types.h"

namespace vdit {

// Softmax(q k^T * scale) v over the key blocks that each query block lists.
//
// Blocks are uniform (q_block_size, kv_block_size; the last may be ragged) unless offsets are given; with
// offsets block i covers rows [offsets[i], offsets[i+1]), which may be empty. A query row that keeps no key
// gets out = 0 and lse = -inf, so that partial results merge. With q_index, a permutation, row i of a query
// block is row q_index[i] of q, out and lse: queries need not lie in the order of their blocks.
struct BlockSparseAttentionParams {
  void const* q = nullptr;  // [b, h, q, d]
  void const* k = nullptr;  // [b, h, kv, d]
  void const* v = nullptr;  // [b, h, kv, d]
  void* out = nullptr;      // [b, h, q, d]
  float* lse = nullptr;     // [b, h, q], natural log

  int32_t const* kv_num_blocks = nullptr;  // [b|1, h|1, nq]
  int32_t const* kv_indices = nullptr;     // [b|1, h|1, nq, w]
  int32_t const* q_offsets = nullptr;      // [b|1, h|1, nq+1] or null
  int32_t const* kv_offsets = nullptr;     // [b|1, h|1, nkv+1] or null
  int32_t const* q_index = nullptr;        // [b|1, h|1, q] or null

  Strides3 stride_q, stride_k, stride_v, stride_out;
  Strides2 stride_lse;         // rows are contiguous
  Strides3 stride_num_blocks;  // .s is the stride over query blocks
  Strides3 stride_indices;     // .s likewise; the list itself is contiguous
  Strides2 stride_q_offsets, stride_kv_offsets, stride_q_index;

  int64_t batch = 0, heads = 0, seqlen_q = 0, seqlen_kv = 0;
  int64_t num_q_blocks = 0, num_kv_blocks = 0;
  int32_t list_width = 0;
  int32_t head_dim = 0;
  int32_t q_block_size = 128, kv_block_size = 128;
  float scale = 1.f;
  DType dtype = DType::kFloat32;
};

// Joins two partial attention results over disjoint keys, weighted by exp(lse).
struct MergeAttentionParams {
  void const* out1 = nullptr;   // [b, h, s, d]
  float const* lse1 = nullptr;  // [b, h, s]
  void const* out2 = nullptr;   // [b, h, s, d]
  float const* lse2 = nullptr;  // [b, h, s]
  void* out = nullptr;          // [b, h, s, d]
  float* lse = nullptr;         // [b, h, s]
  Strides3 stride_out1, stride_out2, stride_out;
  Strides3 stride_lse1, stride_lse2, stride_lse;  // .s is the stride over rows
  int64_t batch = 0, heads = 0, seqlen = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kFloat32;
};

// inverse == false: out[i] = x[index[i]].  inverse == true: out[index[i]] = x[i].
struct PermuteRowsParams {
  void const* x = nullptr;         // [b, h, s_in, row_bytes]
  void* out = nullptr;             // [b, h, s_out, row_bytes]
  int32_t const* index = nullptr;  // [b|1, h|1, n]
  Strides3 stride_x, stride_out;   // in bytes
  Strides2 stride_index;
  int64_t batch = 0, heads = 0, num_index = 0, rows_in = 0, rows_out = 0;
  int64_t row_bytes = 0;
  bool inverse = false;
};

// out[i] = fp32 mean of the rows of block i; an empty block gives 0.
struct MeanPoolBlocksParams {
  void const* x = nullptr;           // [b, h, s, d]
  float* out = nullptr;              // [b, h, n, d] contiguous
  int32_t const* offsets = nullptr;  // [b|1, h|1, n+1] or null
  Strides3 stride_x;
  Strides2 stride_offsets;
  int64_t batch = 0, heads = 0, seqlen = 0, num_blocks = 0;
  int32_t head_dim = 0, block_size = 128;
  DType dtype = DType::kFloat32;
};

// labels[i] = argmax_c x_i . c - |c|^2 / 2 in fp32, which is the nearest centroid; ties go to the lowest c.
struct KMeansAssignParams {
  void const* x = nullptr;          // [b, h, n, d]
  void const* centroids = nullptr;  // [b, h, c, d], same dtype
  int32_t* labels = nullptr;        // [b, h, n] contiguous
  Strides3 stride_x, stride_centroids;
  int64_t batch = 0, heads = 0, num_rows = 0, num_centroids = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kFloat32;
};

// Stable counting sort of labels: sorted_idx lists the rows of label 0, then of label 1, ...;
// offsets[c] is where label c begins, offsets[num_labels] == n.
struct LabelSortParams {
  int32_t const* labels = nullptr;  // [b, h, n] contiguous, values in [0, num_labels)
  int32_t* sorted_idx = nullptr;    // [b, h, n] contiguous
  int32_t* offsets = nullptr;       // [b, h, num_labels+1] contiguous
  int64_t batch = 0, heads = 0, num_rows = 0;
  int32_t num_labels = 0;
};

// out[c] = mean over i in [offsets[c], offsets[c+1]) of x[sorted_idx[i]], fp32 sums in that order (no
// atomics, so the result does not depend on timing). An empty segment takes fallback[c], and so does, as a whole,
// one whose mean has a column that is not finite in x's type.
struct SegmentMeanParams {
  void const* x = nullptr;              // [b, h, n, d]
  int32_t const* sorted_idx = nullptr;  // [b, h, n] contiguous
  int32_t const* offsets = nullptr;     // [b, h, c+1] contiguous
  void const* fallback = nullptr;       // [b, h, c, d]
  void* out = nullptr;                  // [b, h, c, d] contiguous
  Strides3 stride_x, stride_fallback;
  int64_t batch = 0, heads = 0, num_rows = 0, num_segments = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kFloat32;
};

// Keeps the k largest scores: of each row (per_head == false) or of the whole flattened [nq, nkv] map of a
// head (per_head == true). Ties go to the lowest flat index; NaN ranks below -inf. keep_row_max adds
// each row's argmax (lowest index) when it is not kept already. Lists come out in ascending order and the
// unused tail is 0.
struct TopkBlocksParams {
  float const* scores = nullptr;     // [b, h, nq, nkv]
  int32_t* kv_num_blocks = nullptr;  // [b, h, nq] contiguous
  int32_t* kv_indices = nullptr;     // [b, h, nq, nkv] contiguous
  Strides3 stride_scores;
  int64_t batch = 0, heads = 0, num_q_blocks = 0, num_kv_blocks = 0;
  int64_t k = 0;
  bool per_head = false;
  bool keep_row_max = true;
};

// P_j = weight_j e^{s_j} / sum_m weight_m e^{s_m}; keeps the shortest prefix of the descending order whose
// cumulative mass exceeds p (all blocks when p >= 1), and at least min_blocks. Ties go to the lowest index.
// Weight 0 means mass 0: such blocks sort last.
struct ToppBlocksParams {
  float const* scores = nullptr;     // [b, h, nq, nkv], logits
  int32_t const* weights = nullptr;  // [b|1, h|1, nkv] block sizes in tokens, or null for all 1
  int32_t* kv_num_blocks = nullptr;  // [b, h, nq] contiguous
  int32_t* kv_indices = nullptr;     // [b, h, nq, nkv] contiguous
  Strides3 stride_scores;
  Strides2 stride_weights;
  int64_t batch = 0, heads = 0, num_q_blocks = 0, num_kv_blocks = 0;
  float p = 0.9f;
  int64_t min_blocks = 1;
};

// out[i] = rope(norm(x[index[i]])), the norm and the rotation of the token that is read; fp32 throughout, rounded once.
//   norm: x / sqrt(mean of squares + eps) * weight, the mean over the head, or over all heads of the token.
//   rope: out_c = x_c cos_c -+ x_c' sin_c over pairs (c, c') of channels, minus for the first of a pair; pairs are
//   neighbours (interleaved) or d / 2 apart. Tokens outside of [rope_start, rope_start + rope_rows) are not rotated.
struct RmsNormRopeParams {
  void const* x = nullptr;         // [b, h, s, d]
  void const* weight = nullptr;    // [d] or [h, d], contiguous, or null for all 1
  void const* cos = nullptr;       // [b|1, h|1, r, d or d/2] or null: no rotation
  void const* sin = nullptr;       // likewise
  int32_t const* index = nullptr;  // [b|1, h|1, s], a permutation, or null for the order of x
  void* out = nullptr;             // [b, h, s, d]
  Strides3 stride_x, stride_out, stride_cos, stride_sin;
  Strides2 stride_index;
  int64_t stride_weight_h = 0;  // 0 or d
  int64_t batch = 0, heads = 0, seqlen = 0;
  int64_t rope_start = 0, rope_rows = 0;
  int32_t head_dim = 0;
  int32_t rope_width = 0;  // d: a value for each channel; d/2: one for each pair
  float eps = 1e-6f;
  bool norm = true, across_heads = false, interleaved = true;
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32, rope_dtype = DType::kFloat32;  // fp32 or dtype
};

// mass[i][j] = sum over the rows r of query block i and the keys t of key block j of
// exp(min(scale * q_r . k_t - lse_r, 30)), fp32 terms and sums in a fixed order. With the lse of dense attention it is
// the softmax mass of the block; with an older one it is not normalised, which the clamp keeps finite. Keys at or past
// kv_lengths[b] do not count, nor do rows whose lse is -inf. NaN in a row or its lse reaches the row of its query block,
// in a key the column of its key block. Blocks are uniform; the last may be ragged.
struct BlockMassParams {
  void const* q = nullptr;              // [b, h, q, d]
  void const* k = nullptr;              // [b, h, kv, d], same dtype
  float const* lse = nullptr;           // [b, h, q], natural log
  int32_t const* kv_lengths = nullptr;  // [b], or null for kv
  float* mass = nullptr;                // [b, h, nq, nkv] contiguous
  Strides3 stride_q, stride_k;
  Strides3 stride_lse;  // .s is the stride over rows
  int64_t stride_kv_lengths = 0;
  int64_t batch = 0, heads = 0, seqlen_q = 0, seqlen_kv = 0;
  int64_t num_q_blocks = 0, num_kv_blocks = 0;
  int32_t head_dim = 0;
  int32_t q_block_size = 64, kv_block_size = 64;
  float scale = 1.f;
  DType dtype = DType::kFloat32;
};

// The first k_max of each row's blocks: the forced ones in rising order, then the others by falling mass, ties to the
// lowest index, NaN last. No [nq, nkv] matrix exists: on CUDA a row lives in shared memory. `total` is the sum of the
// whole row.
struct BlockMassTopkParams {
  BlockMassParams row;           // .mass is not used
  bool const* forced = nullptr;  // [b|1, h|1, nkv] or null
  int32_t* indices = nullptr;    // [b, h, nq, k_max] contiguous
  float* mass = nullptr;         // [b, h, nq, k_max] contiguous
  float* total = nullptr;        // [b, h, nq] contiguous
  Strides2 stride_forced;
  int64_t k_max = 0;  // at most nkv
};

// CPU: portable, AVX2 and AVX-512 bodies, chosen at run time. Arguments are trusted: the callers' checks
// (csrc/attention/checks.h) come first.
void run_block_sparse_attention_cpu(BlockSparseAttentionParams const& p, ParallelFor const& parallel);
void run_merge_attention_cpu(MergeAttentionParams const& p, ParallelFor const& parallel);
void run_permute_rows_cpu(PermuteRowsParams const& p, ParallelFor const& parallel);
void run_mean_pool_blocks_cpu(MeanPoolBlocksParams const& p, ParallelFor const& parallel);
void run_kmeans_assign_cpu(KMeansAssignParams const& p, ParallelFor const& parallel);
void run_label_sort_cpu(LabelSortParams const& p, ParallelFor const& parallel);
void run_segment_mean_cpu(SegmentMeanParams const& p, ParallelFor const& parallel);
void run_topk_blocks_cpu(TopkBlocksParams const& p, ParallelFor const& parallel);
void run_topp_blocks_cpu(ToppBlocksParams const& p, ParallelFor const& parallel);
void run_rms_norm_rope_cpu(RmsNormRopeParams const& p, ParallelFor const& parallel);
void run_block_mass_cpu(BlockMassParams const& p, ParallelFor const& parallel);
void run_block_mass_topk_cpu(BlockMassTopkParams const& p, ParallelFor const& parallel);

// CUDA, compute capability 8.0 and up. `stream` is a cudaStream_t. Nothing waits for the device.
// Attention wants its rows (q, k, v, out) at multiples of 16 bytes, and throws std::runtime_error where they are not.
void run_block_sparse_attention_sm80(BlockSparseAttentionParams const& p, void* stream);
// Compute capability 9.0: the same with wgmma and TMA. `workspace`: ..._workspace_bytes(p) bytes on the device, aligned
// to 16, need not be cleared. Not for every tensor (one without keys, say): can_run_... tells.
void run_block_sparse_attention_sm90(BlockSparseAttentionParams const& p, void* workspace, void* stream);
int64_t block_sparse_attention_sm90_workspace_bytes(BlockSparseAttentionParams const& p);
bool can_run_block_sparse_attention_sm90(BlockSparseAttentionParams const& p);
void run_merge_attention_sm80(MergeAttentionParams const& p, void* stream);
void run_permute_rows_sm80(PermuteRowsParams const& p, void* stream);
void run_mean_pool_blocks_sm80(MeanPoolBlocksParams const& p, void* stream);
void run_kmeans_assign_sm80(KMeansAssignParams const& p, void* stream);
// `workspace`: label_sort_workspace_bytes(p) bytes on the device, need not be cleared.
void run_label_sort_sm80(LabelSortParams const& p, void* workspace, void* stream);
int64_t label_sort_workspace_bytes(LabelSortParams const& p);
void run_segment_mean_sm80(SegmentMeanParams const& p, void* stream);
void run_topk_blocks_sm80(TopkBlocksParams const& p, void* workspace, void* stream);
int64_t topk_blocks_workspace_bytes(TopkBlocksParams const& p);
void run_topp_blocks_sm80(ToppBlocksParams const& p, void* workspace, void* stream);
int64_t topp_blocks_workspace_bytes(ToppBlocksParams const& p);
// `workspace` holds the inverse of an index per head; without one, 0 bytes.
void run_rms_norm_rope_sm80(RmsNormRopeParams const& p, void* workspace, void* stream);
int64_t rms_norm_rope_workspace_bytes(RmsNormRopeParams const& p);
// Compute capability 9.0: as for attention. What can_run_... refuses, fp32 for one, is for run_kmeans_assign_sm80.
void run_kmeans_assign_sm90(KMeansAssignParams const& p, void* workspace, void* stream);
int64_t kmeans_assign_sm90_workspace_bytes(KMeansAssignParams const& p);
bool can_run_kmeans_assign_sm90(KMeansAssignParams const& p);
// fp16 and bf16, head sizes 64, 96 and 128; rows of q and k at multiples of 16 bytes, else std::runtime_error.
// block_mass_topk takes at most kMaxMassBlocks key blocks, and as many as the device's shared memory holds.
constexpr int64_t kMaxMassBlocks = 24576;
void run_block_mass_sm80(BlockMassParams const& p, void* stream);
void run_block_mass_topk_sm80(BlockMassTopkParams const& p, void* stream);
// Compute capability 9.0: the same with wgmma and TMA, for query blocks of 64, 128 or 256 rows, key blocks of a multiple
// of 64, and rows of masses that fit the shared memory: can_run_... tells.
void run_block_mass_sm90(BlockMassParams const& p, void* stream);
void run_block_mass_topk_sm90(BlockMassTopkParams const& p, void* stream);
bool can_run_block_mass_sm90(BlockMassParams const& p);

}  // namespace vdit
