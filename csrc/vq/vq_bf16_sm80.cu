#include "vq/launch_sm80.cuh"

namespace vdit {
void launch_vq_bf16_sm80(VqLinearParams const& p, void* stream) { launch_vq<cute::bfloat16_t>(p, stream); }
}  // namespace vdit
