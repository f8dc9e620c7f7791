#include "linear/launch_sm80.cuh"

namespace vdit {
void launch_linear_int8_sm80(LinearParams const& p, void* stream) {
  launch_linear<false, Int8Weights>(p, stream);
}
}  // namespace vdit
