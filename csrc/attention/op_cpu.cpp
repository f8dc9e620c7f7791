// The attention family on the CPU.
#include "attention/op_impl.h"

namespace vdit {

struct CpuBackend {
  static constexpr bool kOnHost = true;
  static constexpr bool kCuda = false;
  struct Scope {
    explicit Scope(Tensor const&) {}
    ParallelFor parallel = torch_parallel_for();
  };
  static void run(Scope& s, BlockSparseAttentionParams const& p, Tensor const&) {
    run_block_sparse_attention_cpu(p, s.parallel);
  }
  static void run(Scope& s, MergeAttentionParams const& p, Tensor const&) { run_merge_attention_cpu(p, s.parallel); }
  static void run(Scope& s, PermuteRowsParams const& p, Tensor const&) { run_permute_rows_cpu(p, s.parallel); }
  static void run(Scope& s, MeanPoolBlocksParams const& p, Tensor const&) { run_mean_pool_blocks_cpu(p, s.parallel); }
  static void run(Scope& s, KMeansAssignParams const& p, Tensor const&) { run_kmeans_assign_cpu(p, s.parallel); }
  static void run(Scope& s, LabelSortParams const& p, Tensor const&) { run_label_sort_cpu(p, s.parallel); }
  static void run(Scope& s, SegmentMeanParams const& p, Tensor const&) { run_segment_mean_cpu(p, s.parallel); }
  static void run(Scope& s, TopkBlocksParams const& p, Tensor const&) { run_topk_blocks_cpu(p, s.parallel); }
  static void run(Scope& s, ToppBlocksParams const& p, Tensor const&) { run_topp_blocks_cpu(p, s.parallel); }
  static void run(Scope& s, RmsNormRopeParams const& p, Tensor const&) { run_rms_norm_rope_cpu(p, s.parallel); }
  static void run(Scope& s, BlockMassParams const& p, Tensor const&) { run_block_mass_cpu(p, s.parallel); }
  static void run(Scope& s, BlockMassTopkParams const& p, Tensor const&) { run_block_mass_topk_cpu(p, s.parallel); }
};

}  // namespace vdit

VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::AttentionOps<vdit::CpuBackend>::bind(m); }
