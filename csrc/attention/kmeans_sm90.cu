// Launcher of kernel_sm90_kmeans.cuh.
#include "attention/kernel_sm90_kmeans.cuh"
#include "attention/launch_sm90.h"
#include "common/launch_util.cuh"

namespace vdit {
namespace sm90 {
namespace {

constexpr int kCentroidTile = 128;

int64_t centroid_tiles(KMeansAssignParams const& p) { return ceil_div(p.num_centroids, kCentroidTile); }

template <class T, int kHeadDim>
void assign(KMeansAssignParams const& p, void* workspace, void* stream) {
  using Kernel = KMeansAssignKernel<T, kHeadDim>;
  using Starts = KMeansStartsKernel<T>;
  static_assert(Kernel::kBlockN == kCentroidTile, "The workspace is sized in the kernel's tiles.");
  static_assert(Kernel::smem_bytes() <= 227 * 1024, "The tile must fit the shared memory of an SM.");
  auto* const starts = static_cast<float*>(workspace);
  int64_t const padded = centroid_tiles(p) * kCentroidTile;
  launch<Starts>(Grid{ceil_div(padded, Starts::kRows), p.heads, p.batch}, 0, stream, {p, starts, padded});

  typename Kernel::Params a;
  a.assign = p;
  a.x = map_rows(p.x, p.stride_x, {p.batch, p.heads, p.num_rows, kHeadDim}, Kernel::kBlockM);
  a.centroids = map_rows(p.centroids, p.stride_centroids, {p.batch, p.heads, p.num_centroids, kHeadDim},
                         Kernel::kBlockN);
  a.starts = starts;
  a.items_head = ceil_div(p.num_rows, Kernel::kBlockM);
  a.num_items = p.batch * p.heads * a.items_head;
  a.num_tiles = static_cast<int32_t>(centroid_tiles(p));
  int64_t const blocks = multiprocessors();
  launch<Kernel>(Grid{blocks < a.num_items ? blocks : a.num_items, 1, 1}, Kernel::smem_bytes(), stream, a);
}

template <class T>
void assign_any(KMeansAssignParams const& p, void* workspace, void* stream) {
  if (p.head_dim == 64) return assign<T, 64>(p, workspace, stream);
  if (p.head_dim == 96) return assign<T, 96>(p, workspace, stream);
  assign<T, 128>(p, workspace, stream);
}

}  // namespace
}  // namespace sm90

bool can_run_kmeans_assign_sm90(KMeansAssignParams const& p) {
  return p.dtype != DType::kFloat32 && (p.head_dim == 64 || p.head_dim == 96 || p.head_dim == 128) &&
         all_multiples(16, {p.x, p.centroids}, 2,
                       {p.stride_x.b, p.stride_x.h, p.stride_x.s, p.stride_centroids.b, p.stride_centroids.h,
                        p.stride_centroids.s}) &&
         sm90::can_walk(p.stride_x, p.batch, p.heads, p.num_rows) &&
         sm90::can_walk(p.stride_centroids, p.batch, p.heads, p.num_centroids);
}

int64_t kmeans_assign_sm90_workspace_bytes(KMeansAssignParams const& p) {
  return p.batch * p.heads * sm90::centroid_tiles(p) * sm90::kCentroidTile *
         static_cast<int64_t>(sizeof(float));
}

void run_kmeans_assign_sm90(KMeansAssignParams const& p, void* workspace, void* stream) {
  if (!can_run_kmeans_assign_sm90(p)) {
    throw std::runtime_error(
        "vdit::kmeans_assign: fp16 or bf16 rows of 64, 96 or 128 columns at multiples of 16 bytes were "
        "expected "
        "by the sm90 kernel, got others; call run_kmeans_assign_sm80.");
  }
  if (p.dtype == DType::kFloat16) return sm90::assign_any<cute::half_t>(p, workspace, stream);
  sm90::assign_any<cute::bfloat16_t>(p, workspace, stream);
}

}  // namespace vdit
