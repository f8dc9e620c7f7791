// Launch structs of the vq family: weights as indices into a codebook of short words.
//
// Shapes: m rows, k input channels, n output channels, v vectors, c codewords of d channels each.
#pragma once
#include <cstdint>

#include "vdit/epilogue.h"
#include "vdit/types.h"

namespace vdit {

// The `count` nearest codewords of each vector, nearest first, ties to the lower index. fp32 throughout:
// distance = max(0, |v|^2 - 2 v . c + |c|^2).
struct VqAssignParams {
  float const* vectors = nullptr;   // [v, d] contiguous
  float const* codebook = nullptr;  // [c, d] contiguous
  int32_t* indices = nullptr;       // [v, count] contiguous
  float* distances = nullptr;       // [v, count] contiguous
  int64_t num_vectors = 0, num_codewords = 0;
  int32_t dim = 0, count = 1;       // dim at most 16, count at most 8
};

// How the indices of a weight [n, k] lie in memory. 32 x 64 tiles (n, k) stored [ceil(n/32), ceil(k/64), bytes]; a
// lane l = 0..31 owns 16 quads of four neighbouring k each, quad j at n = 8 (j % 8 / 2) + l / 4, first
// k = 32 (j / 8) + 16 (j % 2) + 4 (l % 4).
enum class VqFormat : int32_t {
  // 256 words of 4: one byte a quad, lane l owns bytes 16 l to 16 l + 15. 512 bytes a tile.
  k256x4 = 0,
  // 64 words of 2: 12 bits a quad (first index + 64 second index), quad j in bits 12 j to 12 j + 11 of the lane's 24
  // bytes, little-endian. 768 bytes a tile.
  k64x2 = 1,
};

struct VqDequantizeParams {
  void const* codes = nullptr;
  void const* codebook = nullptr;       // [256, 4] or [64, 2] contiguous, of `dtype`, or int8 with `is_int8`
  float const* row_scale = nullptr;     // [n] or null; floats only
  void* out = nullptr;                  // [n, k], rows of stride_out elements, zero from k on
  int64_t stride_out = 0;
  int64_t n = 0, k = 0;
  VqFormat format = VqFormat::k256x4;
  DType dtype = DType::kFloat32;        // of codebook and out
  bool is_int8 = false;
};

// out = epilogue(x W^T) with W[n, k] read from the codebook. With is_int8, x and codebook are int8 and the sums exact
// in int32; otherwise both are fp16 or bf16 (fp32 too on the CPU), sums are fp32 and row_scale is the epilogue's
// weight_scale.
struct VqLinearParams {
  void const* x = nullptr;         // [m, k], rows of stride_x elements; int8: zero from k up to a multiple of 16
  void const* codes = nullptr;
  void const* codebook = nullptr;
  int64_t stride_x = 0;
  int64_t m = 0, n = 0, k = 0;
  VqFormat format = VqFormat::k256x4;
  DType dtype = DType::kBFloat16;  // of x and codebook without is_int8
  bool is_int8 = false;
  LinearEpilogue epilogue;
};

void run_vq_assign_cpu(VqAssignParams const& p, ParallelFor const& parallel);
void run_vq_dequantize_cpu(VqDequantizeParams const& p, ParallelFor const& parallel);
void run_vq_linear_cpu(VqLinearParams const& p, ParallelFor const& parallel);

// `stream` is a cudaStream_t, passed as void* so that this header needs no CUDA.
void run_vq_assign_sm80(VqAssignParams const& p, void* stream);
void run_vq_dequantize_sm80(VqDequantizeParams const& p, void* stream);
void run_vq_linear_sm80(VqLinearParams const& p, void* stream);

// Compute capability 9.0 only (wgmma, TMA). `can_run` says whether shapes, strides and addresses suit.
bool can_run_vq_linear_sm90(VqLinearParams const& p);
bool is_vq_linear_sm90_faster(VqLinearParams const& p);  // as is_linear_sm90_faster
void run_vq_linear_sm90(VqLinearParams const& p, void* stream);

}  // namespace vdit
