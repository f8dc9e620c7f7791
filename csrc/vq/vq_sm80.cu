// run_vq_linear_sm80: what is checked for callers that come without torch, and which type's kernel runs.
#include "vq/launch_sm80.cuh"

namespace vdit {
namespace {

[[noreturn]] void refuse(std::string const& sentence) {
  throw std::runtime_error("vdit::vq_linear: " + sentence);
}

void check_vq_linear(VqLinearParams const& p) {
  if (p.k < 1 || p.k > 65536 || p.k % 16 != 0) {
    refuse("on CUDA there must be a multiple of 16 input channels, at most 65536, got " +
           std::to_string(p.k) + ".");
  }
  if (p.m >= int64_t{1} << 31)
    refuse("on CUDA there must be fewer than 2^31 rows, got " + std::to_string(p.m) + ".");
  if (!all_multiples(16, {p.x, p.codes, p.codebook}, p.is_int8 ? 1 : 2, {p.stride_x})) {
    refuse(
        "on CUDA rows of x, codes and codebook must start at multiples of 16 bytes, "
        "got a pointer or a stride that does not; align them.");
  }
}

}  // namespace

void run_vq_linear_sm80(VqLinearParams const& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  check_vq_linear(p);
  if (p.is_int8) return launch_vq_int8_sm80(p, stream);
  switch (p.dtype) {
    case DType::kBFloat16: return launch_vq_bf16_sm80(p, stream);
    case DType::kFloat16: return launch_vq_fp16_sm80(p, stream);
    case DType::kFloat32: refuse("x must be int8, float16 or bfloat16 on CUDA, got float32; convert it.");
  }
}

}  // namespace vdit
