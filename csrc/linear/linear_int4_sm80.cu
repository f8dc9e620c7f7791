#include "linear/launch_sm80.cuh"

namespace vdit {
void launch_linear_int4_sm80(LinearParams const& p, void* stream) {
  launch_linear<true, Int4Weights>(p, stream);
}
}  // namespace vdit
