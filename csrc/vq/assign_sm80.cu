// Launchers of kernel_sm80_assign.cuh.
#include "common/check.h"
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
  if (p.num_vectors == 0) return;
  bool const sizes = p.dim >= 1 && p.dim <= 16 && p.num_codewords <= 0x7fffffff;
  VDIT_CHECK(sizes && p.count >= 1 && p.count <= 8 && p.count <= p.num_codewords, "vq_assign",
             "1 to 16 dimensions and a count of 1 to 8, of as many codewords, were expected, got ", p.dim,
             " dimensions and the nearest ", p.count, " of ", p.num_codewords, ".");
  if (p.dim <= 2) return launch_count<2>(p, stream);
  if (p.dim <= 4) return launch_count<4>(p, stream);
  if (p.dim <= 8) return launch_count<8>(p, stream);
  launch_count<16>(p, stream);
}

}  // namespace vdit
