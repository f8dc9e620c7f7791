// Launcher of kernel_sm80_quantize.cuh: which element type, and how many threads a row.
#include "common/check.h"
#include "common/launch_util.cuh"
#include "linear/kernel_sm80_quantize.cuh"

namespace vdit {
namespace {

// Throws std::runtime_error with one sentence, for callers that come without torch.
void check_quantize_rows(QuantizeRowsParams const& p) {
  char const* op = "quantize_rows";
  VDIT_CHECK(p.channels >= 1 && p.channels <= 65536 && p.q_max >= 1 && p.q_max <= 127, op,
             "1 to 65,536 channels and codes of at most 1 to 127 were expected, got ", p.channels, " and ",
             p.q_max, ".");
  int32_t const h = p.hadamard;
  bool const known = h == 0 || h == 16 || h == 32 || h == 64 || h == 128;
  VDIT_CHECK(known && (h == 0 || p.channels % h == 0), op,
             "hadamard must be 0 or one of 16, 32, 64 and 128 that divides the ", p.channels,
             " channels, got ", h, ".");
  VDIT_CHECK(p.stride_codes >= p.channels && all_multiples(16, {p.codes}, 1, {p.stride_codes}), op,
             "rows of codes must start at multiples of 16 bytes and hold the ", p.channels,
             " channels, got a pointer or a stride that does not.");
}

bool is_wide_x(QuantizeRowsParams const& p, int64_t bytes) {
  return p.channels % 8 == 0 && all_multiples(16, {p.x}, bytes, {p.stride_x.b, p.stride_x.h});
}

bool is_wide_channel(QuantizeRowsParams const& p) {
  int64_t const bytes = p.modulation_dtype == DType::kFloat32 ? 4 : 2;
  return p.channels % 8 == 0 &&
         all_multiples(16, {p.norm_weight, p.norm_bias, p.channel_scale, p.signs}, 1, {}) &&
         all_multiples(
             16, {p.modulation_scale, p.shift}, bytes,
             {p.stride_modulation_scale.b, p.stride_modulation_scale.h, p.stride_shift.b, p.stride_shift.h});
}

template <class Kernel>
bool launch_if_it_fits(QuantizeRowsLaunch const& a, int64_t rows, void* stream) {
  if (a.p.stride_codes > Kernel::kMaxChannels) return false;
  launch<Kernel>(Grid{ceil_div(rows, Kernel::kRows), 1, 1}, Kernel::kSmemBytes, stream, a);
  return true;
}

}  // namespace

void run_quantize_rows_sm80(QuantizeRowsParams const& p, void* stream) {
  int64_t const rows = p.batch * p.tokens;
  if (rows == 0) return;
  check_quantize_rows(p);
  with_type("quantize_rows", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    QuantizeRowsLaunch const a{p, is_wide_x(p, sizeof(T)), is_wide_channel(p)};
    if (launch_if_it_fits<QuantizeRowsKernel<T, 32, 4>>(a, rows, stream)) return;
    if (launch_if_it_fits<QuantizeRowsKernel<T, 128, 4>>(a, rows, stream)) return;
    if (launch_if_it_fits<QuantizeRowsKernel<T, 256, 4>>(a, rows, stream)) return;
    if (launch_if_it_fits<QuantizeRowsKernel<T, 512, 4>>(a, rows, stream)) return;
    if (launch_if_it_fits<QuantizeRowsKernel<T, 512, 8>>(a, rows, stream)) return;
    launch<QuantizeLongRowsKernel<T>>(Grid{rows, 1, 1}, QuantizeLongRowsKernel<T>::kSmemBytes, stream, a);
  });
}

}  // namespace vdit
