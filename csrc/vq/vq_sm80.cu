// run_vq_linear_sm80: what is checked for callers that come without torch, and which type's kernel runs.
#include "common/check.h"
#include "vq/launch_sm80.cuh"

namespace vdit {
namespace {

void check_vq_linear(VqLinearParams const& p) {
  char const* op = "vq_linear";
  VDIT_CHECK(p.k >= 1 && p.k <= 65536 && p.k % 16 == 0, op,
             "on CUDA there must be a multiple of 16 input channels, at most 65536, got ", p.k, ".");
  VDIT_CHECK(p.m <= 0x7fffffff && p.n <= 0x7fffffff, op,
             "on CUDA there must be fewer than 2^31 rows and output channels, got ", p.m, " and ", p.n, ".");
  VDIT_CHECK(all_multiples(16, {p.x, p.codes, p.codebook}, p.is_int8 ? 1 : 2, {p.stride_x}), op,
             "on CUDA rows of x, codes and codebook must start at multiples of 16 bytes, "
             "got a pointer or a stride that does not; align them.");
  VDIT_CHECK(p.is_int8 || p.dtype != DType::kFloat32, op,
             "x must be int8, float16 or bfloat16 on CUDA, got float32; convert it.");
}

}  // namespace

void run_vq_linear_sm80(VqLinearParams const& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  check_vq_linear(p);
  if (p.is_int8) return launch_vq_int8_sm80(p, stream);
  if (p.dtype == DType::kBFloat16) return launch_vq_bf16_sm80(p, stream);
  launch_vq_fp16_sm80(p, stream);
}

}  // namespace vdit
