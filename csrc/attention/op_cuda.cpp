// The attention family on CUDA: which kernels run, and their workspaces.
#include "attention/op_impl.h"
#include "common/op_cuda.h"
#ifdef VDIT_EMU
#include "attention/schema.h"
#endif

namespace vdit {
namespace {  // the emulator has this file twice, with and without sm90

struct CudaBackend {
  using Scope = CudaScope;
  static constexpr bool kOnHost = CudaScope::kOnHost;
  static constexpr bool kCuda = true;

  static Tensor workspace(Tensor const& like, int64_t bytes) { return cuda_workspace(like, bytes); }

#ifdef VDIT_HAS_SM90  // the kernels for compute capability 9.0 are in this build
  static bool use_sm90(Tensor const& t) {
    static bool const asked = is_sm90_asked("VDIT_ATTENTION_KERNEL");
    return vdit::use_sm90(t, asked);
  }
#endif

  static void run(Scope& s, BlockSparseAttentionParams const& p, Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (use_sm90(like) && can_run_block_sparse_attention_sm90(p)) {
      Tensor space = workspace(like, block_sparse_attention_sm90_workspace_bytes(p));
      return run_block_sparse_attention_sm90(p, space.mutable_data_ptr(), s.stream);
    }
#endif
    run_block_sparse_attention_sm80(p, s.stream);
  }
  static void run(Scope& s, MergeAttentionParams const& p, Tensor const&) { run_merge_attention_sm80(p, s.stream); }
  static void run(Scope& s, PermuteRowsParams const& p, Tensor const&) { run_permute_rows_sm80(p, s.stream); }
  static void run(Scope& s, MeanPoolBlocksParams const& p, Tensor const&) { run_mean_pool_blocks_sm80(p, s.stream); }
  static void run(Scope& s, KMeansAssignParams const& p, Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (use_sm90(like) && can_run_kmeans_assign_sm90(p)) {
      Tensor space = workspace(like, kmeans_assign_sm90_workspace_bytes(p));
      return run_kmeans_assign_sm90(p, space.mutable_data_ptr(), s.stream);
    }
#endif
    run_kmeans_assign_sm80(p, s.stream);
  }
  static void run(Scope& s, LabelSortParams const& p, Tensor const& like) {
    Tensor space = workspace(like, label_sort_workspace_bytes(p));
    run_label_sort_sm80(p, space.mutable_data_ptr(), s.stream);
  }
  static void run(Scope& s, SegmentMeanParams const& p, Tensor const&) { run_segment_mean_sm80(p, s.stream); }
  static void run(Scope& s, TopkBlocksParams const& p, Tensor const& like) {
    Tensor space = workspace(like, topk_blocks_workspace_bytes(p));
    run_topk_blocks_sm80(p, space.mutable_data_ptr(), s.stream);
  }
  static void run(Scope& s, ToppBlocksParams const& p, Tensor const& like) {
    Tensor space = workspace(like, topp_blocks_workspace_bytes(p));
    run_topp_blocks_sm80(p, space.mutable_data_ptr(), s.stream);
  }
  static void run(Scope& s, RmsNormRopeParams const& p, Tensor const& like) {
    Tensor space = workspace(like, rms_norm_rope_workspace_bytes(p));
    run_rms_norm_rope_sm80(p, space.mutable_data_ptr(), s.stream);
  }
  static void run(Scope& s, BlockMassParams const& p, [[maybe_unused]] Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (use_sm90(like) && can_run_block_mass_sm90(p)) return run_block_mass_sm90(p, s.stream);
#endif
    run_block_mass_sm80(p, s.stream);
  }
  static void run(Scope& s, BlockMassTopkParams const& p, [[maybe_unused]] Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (use_sm90(like) && can_run_block_mass_sm90(p.row)) return run_block_mass_topk_sm90(p, s.stream);
#endif
    run_block_mass_topk_sm80(p, s.stream);
  }
};

}  // namespace
}  // namespace vdit

#ifdef VDIT_EMU
VDIT_LIBRARY(VDIT_OP_NAMESPACE, m) { vdit::define_attention_schemas(m); }
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::AttentionOps<vdit::CudaBackend>::bind(m); }
#else
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CUDA, m) { vdit::AttentionOps<vdit::CudaBackend>::bind(m); }
#endif
