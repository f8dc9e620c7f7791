#include "vq/launch_sm80.cuh"

namespace vdit {
void launch_vq_fp16_sm80(VqLinearParams const& p, void* stream) { launch_vq<cute::half_t>(p, stream); }
}  // namespace vdit
