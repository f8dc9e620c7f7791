// Op schemas of the attention family. In a header because the emulator registers the same ones in a second
// namespace.
#pragma once
#include "common/torch_stable.h"

namespace vdit {

inline void define_attention_schemas(torch::stable::detail::StableLibrary& m) {
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, *, "
      "Tensor? q_offsets=None, Tensor? kv_offsets=None, Tensor? q_index=None, int q_block_size=128, "
      "int kv_block_size=128, float? scale=None) -> (Tensor, Tensor)");
  m.def("merge_attention(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor, Tensor)");
  m.def("permute_rows(Tensor x, Tensor index) -> Tensor");
  m.def("unpermute_rows(Tensor x, Tensor index) -> Tensor");
  m.def("mean_pool_blocks(Tensor x, *, Tensor? offsets=None, int block_size=128) -> Tensor");
  m.def("kmeans_assign(Tensor x, Tensor centroids) -> Tensor");
  m.def("label_sort(Tensor labels, int num_labels) -> (Tensor, Tensor)");
  m.def("segment_mean(Tensor x, Tensor sorted_idx, Tensor offsets, Tensor fallback) -> Tensor");
  m.def(
      "topk_blocks(Tensor scores, int k, *, bool per_head=False, bool keep_row_max=True) -> (Tensor, Tensor)");
  m.def("topp_blocks(Tensor scores, float p, *, Tensor? weights=None, int min_blocks=1) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_rope(Tensor x, Tensor? weight=None, Tensor? cos=None, Tensor? sin=None, *, Tensor? index=None, "
      "bool across_heads=False, bool interleaved=True, int rope_start=0, float? eps=1e-6) -> Tensor");
  m.def(
      "block_mass(Tensor q, Tensor k, Tensor lse, *, Tensor? kv_lengths=None, int q_block_size=64, "
      "int kv_block_size=64, float? scale=None) -> Tensor");
  m.def(
      "block_mass_topk(Tensor q, Tensor k, Tensor lse, int k_max, *, Tensor? forced=None, Tensor? kv_lengths=None, "
      "int q_block_size=64, int kv_block_size=64, float? scale=None) -> (Tensor, Tensor, Tensor)");
}

}  // namespace vdit
