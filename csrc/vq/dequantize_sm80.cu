// Launchers of kernel_sm80_dequantize.cuh.
#include "common/check.h"
#include "common/launch_util.cuh"
#include "vq/finish.h"
#include "vq/kernel_sm80_dequantize.cuh"

namespace vdit {
namespace {

template <class T, VqFormat kFormat>
void launch_dequantize(VqDequantizeParams const& p, void* stream) {
  using Kernel = VqDequantizeKernel<T, kFormat>;
  bool const wide = all_multiples(16, {p.out}, sizeof(T), {p.stride_out});
  int64_t const tiles = ceil_div(p.n, 32) * ceil_div(p.stride_out, 64);
  launch<Kernel>(Grid{ceil_div(tiles, Kernel::kThreads / 32), 1, 1}, Kernel::kSmemBytes, stream, {p, wide});
}

void check_dequantize(VqDequantizeParams const& p) {
  char const* op = "vq_dequantize";
  VDIT_CHECK(p.k >= 1 && p.stride_out >= p.k, op, "rows of out must hold the ", p.k,
             " channels, one or more, got a stride of ", p.stride_out, ".");
  VDIT_CHECK(all_multiples(16, {p.codes}, 1, {}), op,
             "codes must start at a multiple of 16 bytes, got a pointer that does not; align them.");
}

template <class T>
void dequantize(VqDequantizeParams const& p, void* stream) {
  if (p.format == VqFormat::k256x4) return launch_dequantize<T, VqFormat::k256x4>(p, stream);
  launch_dequantize<T, VqFormat::k64x2>(p, stream);
}

}  // namespace

void run_vq_dequantize_sm80(VqDequantizeParams const& p, void* stream) {
  if (p.n == 0) return;
  check_dequantize(p);
  if (p.is_int8) return dequantize<int8_t>(p, stream);
  with_type("vq_dequantize", p.dtype, [&](auto zero) { dequantize<decltype(zero)>(p, stream); });
}

void run_vq_finish_sm80(VqLinearParams const& p, void const* product, void* stream) {
  VDIT_CHECK(p.m <= 0x7fffffff, "vq_linear", "on CUDA there must be fewer than 2^31 rows, got ", p.m, ".");
  with_type("vq_linear", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Kernel = VqFinishKernel<T>;
    bool const wide = epilogue_is_wide(p.epilogue, p.n) && all_multiples(16, {product}, 1, {});
    int64_t const groups = p.m * ceil_div(p.n, 8);
    launch<Kernel>(Grid{ceil_div(groups, Kernel::kThreads), 1, 1}, 0, stream,
                   {static_cast<T const*>(product), p.m, p.n, epilogue_of_rows(p.epilogue, p.m), wide});
  });
}

}  // namespace vdit
