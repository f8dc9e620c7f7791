// run_linear_sm80 and run_expand_weight_sm80: what is checked for callers that come without torch, and which
// format's kernel runs.
#include "common/check.h"
#include "linear/kernel_sm80_expand.cuh"
#include "linear/launch_sm80.cuh"

namespace vdit {
namespace {

void check_table(char const* op, WeightFormat format, int32_t table_size, int8_t const* table) {
  if (format != WeightFormat::kTable) return;
  VDIT_CHECK((table_size == 8 || table_size == 16) && all_multiples(8, {table}, 1, {}), op,
             "a table must have 8 or 16 entries a row at a multiple of 8 bytes, got ", table_size,
             " entries or a pointer that is not.");
}

void check_linear(LinearParams const& p) {
  char const* op = "linear";
  VDIT_CHECK(p.k >= 1 && p.k <= 65536 && p.k % 16 == 0, op,
             "on CUDA there must be a multiple of 16 input channels, at most 65536, got ", p.k, ".");
  bool const int8 = p.format == WeightFormat::kInt8;
  VDIT_CHECK(all_multiples(16, {p.x, p.weight, p.weight_low}, 1, {p.stride_x, int8 ? p.stride_weight : 0}),
             op,
             "on CUDA rows of x and the weight must start at multiples of 16 bytes, "
             "got a pointer or a stride that does not; align them.");
  VDIT_CHECK(p.m <= 0x7fffffff && p.n <= 0x7fffffff, op,
             "on CUDA there must be fewer than 2^31 rows and output channels, got ", p.m, " and ", p.n, ".");
  check_table(op, p.format, p.table_size, p.table);
}

void check_expand(ExpandWeightParams const& p) {
  char const* op = "expand";
  VDIT_CHECK(p.format != WeightFormat::kInt8, op, "int8 weights are expanded already.");
  VDIT_CHECK(p.k >= 1 && p.stride_out >= p.k, op, "rows of out must hold the ", p.k,
             " channels, one or more, got a stride of ", p.stride_out, ".");
  VDIT_CHECK(all_multiples(16, {p.weight, p.weight_low}, 1, {}), op,
             "tiles of codes must start at multiples of 16 bytes, got a pointer that does not; align them.");
  check_table(op, p.format, p.table_size, p.table);
}

template <WeightFormat kFormat, int kTableSize>
void launch_expand(ExpandWeightParams const& p, void* stream) {
  using Kernel = ExpandWeightKernel<kFormat, kTableSize>;
  bool const wide = all_multiples(16, {p.out}, 1, {p.stride_out});
  int64_t const tiles = ceil_div(p.n, 32) * ceil_div(p.stride_out, 32);
  launch<Kernel>(Grid{ceil_div(tiles, Kernel::kThreads / 32), 1, 1}, 0, stream, {p, wide});
}

}  // namespace

void run_linear_sm80(LinearParams const& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  check_linear(p);
  switch (p.format) {
    case WeightFormat::kInt8: return launch_linear_int8_sm80(p, stream);
    case WeightFormat::kInt4: return launch_linear_int4_sm80(p, stream);
    case WeightFormat::kNibblePlanes: return launch_linear_planes_sm80(p, stream);
    case WeightFormat::kTable: return launch_linear_table_sm80(p, stream);
  }
}

void run_expand_weight_sm80(ExpandWeightParams const& p, void* stream) {
  if (p.n == 0 || p.stride_out == 0) return;
  check_expand(p);
  switch (p.format) {
    case WeightFormat::kInt8: return;  // refused
    case WeightFormat::kInt4: return launch_expand<WeightFormat::kInt4, 0>(p, stream);
    case WeightFormat::kNibblePlanes: return launch_expand<WeightFormat::kNibblePlanes, 0>(p, stream);
    case WeightFormat::kTable:
      if (p.table_size == 8) return launch_expand<WeightFormat::kTable, 8>(p, stream);
      return launch_expand<WeightFormat::kTable, 16>(p, stream);
  }
}

}  // namespace vdit
