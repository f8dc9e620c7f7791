#include "vq/launch_sm80.cuh"

namespace vdit {
void launch_vq_int8_sm80(VqLinearParams const& p, void* stream) { launch_vq<int8_t>(p, stream); }
}  // namespace vdit
