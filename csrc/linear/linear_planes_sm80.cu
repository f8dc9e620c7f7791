#include "linear/launch_sm80.cuh"

namespace vdit {
void launch_linear_planes_sm80(LinearParams const& p, void* stream) {
  launch_linear<true, PlaneWeights>(p, stream);
}
}  // namespace vdit
