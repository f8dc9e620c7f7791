// Launchers of kernel_sm80_assign.cuh.
#include "common/launch_util.cuh"
#include "vq/kernel_sm80_assign.cuh"

namespace vdit {
namespace {

template <int kDim, int kCount>
void launch_assign(VqAssignParams const& p, void* stream) {
  using Kernel = VqAssignKernel<kDim, kCount>;
  launch<Kernel>(Grid{ceil_div(p.num_vectors, Kernel::kRows), 1, 1}, Kernel::kSmemBytes, stream, p);
}

template <int kDim>
void launch_count(VqAssignParams const& p, void* stream) {
  if (p.count == 1) return launch_assign<kDim, 1>(p, stream);
  if (p.count == 2) return launch_assign<kDim, 2>(p, stream);
  launch_assign<kDim, 8>(p, stream);
}

}  // namespace

void run_vq_assign_sm80(VqAssignParams const& p, void* stream) {
  if (p.dim <= 2) return launch_count<2>(p, stream);
  if (p.dim <= 4) return launch_count<4>(p, stream);
  if (p.dim <= 8) return launch_count<8>(p, stream);
  launch_count<16>(p, stream);
}

}  // namespace vdit
