// Launchers of kernel_sm80_kmeans.cuh and kernel_sm80_sort.cuh.
#include "attention/kernel_sm80_kmeans.cuh"
#include "attention/kernel_sm80_sort.cuh"
#include "common/launch_util.cuh"

namespace vdit {
namespace {

template <class Kernel>
void assign(KMeansAssignParams const& p, int64_t rows_per_block, void* stream) {
  Grid const grid{ceil_div(p.num_rows, rows_per_block), p.heads, p.batch};
  launch<Kernel>(grid, Kernel::kSmemBytes, stream, p);
}

template <class T, int kHeadDim>
void assign_mma(KMeansAssignParams const& p, void* stream) {
  using Kernel = KMeansAssignKernel<T, kHeadDim>;
  assign<Kernel>(p, Kernel::kBlockM, stream);
}

// A chunk is one warp's work. It has at least as many rows as there are labels, so that the counts of all
// chunks never outgrow the labels themselves by much.
LabelSortLaunch plan_sort(LabelSortParams const& p) {
  constexpr int kMaxSmemLabels = 12288;  // 48 KB of counters
  LabelSortLaunch plan{};
  plan.sort = p;
  plan.chunk_rows = 1024;
  while (plan.chunk_rows < p.num_labels) plan.chunk_rows *= 2;
  plan.num_chunks = (p.num_rows + plan.chunk_rows - 1) / plan.chunk_rows;
  plan.counters_in_smem = p.num_labels <= kMaxSmemLabels;
  return plan;
}

}  // namespace

void run_kmeans_assign_sm80(KMeansAssignParams const& p, void* stream) {
  bool const aligned = all_multiples(16, {p.x, p.centroids}, 2,
                                     {p.stride_x.b, p.stride_x.h, p.stride_x.s, p.stride_centroids.b,
                                      p.stride_centroids.h, p.stride_centroids.s});
  with_type("kmeans_assign", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (aligned && p.head_dim == 64) return assign_mma<T, 64>(p, stream);
      if (aligned && p.head_dim == 96) return assign_mma<T, 96>(p, stream);
      if (aligned && p.head_dim == 128) return assign_mma<T, 128>(p, stream);
    }
    assign<KMeansAssignSimpleKernel<T>>(p, KMeansAssignSimpleKernel<T>::kBlock, stream);
  });
}

int64_t label_sort_workspace_bytes(LabelSortParams const& p) {
  LabelSortLaunch const plan = plan_sort(p);
  return p.batch * p.heads * plan.num_chunks * p.num_labels * static_cast<int64_t>(sizeof(uint32_t));
}

void run_label_sort_sm80(LabelSortParams const& p, void* workspace, void* stream) {
  LabelSortLaunch plan = plan_sort(p);
  plan.counts = static_cast<uint32_t*>(workspace);
  size_t const counter_bytes =
      plan.counters_in_smem ? static_cast<size_t>(p.num_labels) * sizeof(uint32_t) : 0;
  Grid const chunks{plan.num_chunks, p.heads, p.batch};
  launch<LabelCountKernel>(chunks, counter_bytes, stream, plan);
  launch<LabelScanKernel>(Grid{p.batch * p.heads, 1, 1}, LabelScanKernel::kSmemBytes, stream, plan);
  launch<LabelScatterKernel>(chunks, counter_bytes, stream, plan);
}

}  // namespace vdit
