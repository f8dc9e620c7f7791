// run_linear_sm80 and run_expand_weight_sm80: what is checked for callers that come without torch, and which
// format's kernel runs.
#include "linear/kernel_sm80_expand.cuh"
#include "linear/launch_sm80.cuh"

namespace vdit {
namespace {

[[noreturn]] void refuse(char const* op, std::string const& sentence) {
  throw std::runtime_error(std::string("vdit::") + op + ": " + sentence);
}

void check_table(char const* op, WeightFormat format, int32_t table_size, int8_t const* table) {
  if (format != WeightFormat::kTable) return;
  if ((table_size != 8 && table_size != 16) || !all_multiples(8, {table}, 1, {})) {
    refuse(op, "a table must have 8 or 16 entries a row at a multiple of 8 bytes, got " +
                   std::to_string(table_size) + " entries or a pointer that is not.");
  }
}

void check_linear(LinearParams const& p) {
  char const* op = "linear";
  if (p.k < 1 || p.k > 65536 || p.k % 16 != 0) {
    refuse(op, "on CUDA there must be a multiple of 16 input channels, at most 65536, got " +
                   std::to_string(p.k) + ".");
  }
  bool const int8 = p.format == WeightFormat::kInt8;
  if (!all_multiples(16, {p.x, p.weight, p.weight_low}, 1, {p.stride_x, int8 ? p.stride_weight : 0})) {
    refuse(op,
           "on CUDA rows of x and the weight must start at multiples of 16 bytes, "
           "got a pointer or a stride that does not; align them.");
  }
  if (p.m > 0x7fffffff || p.epilogue.rows_per_batch > 0x7fffffff) {
    refuse(op, "on CUDA there must be fewer than 2^31 rows, got " + std::to_string(p.m) + ".");
  }
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
  check_table("expand", p.format, p.table_size, p.table);
  switch (p.format) {
    case WeightFormat::kInt8: refuse("expand", "int8 weights are expanded already.");
    case WeightFormat::kInt4: return launch_expand<WeightFormat::kInt4, 0>(p, stream);
    case WeightFormat::kNibblePlanes: return launch_expand<WeightFormat::kNibblePlanes, 0>(p, stream);
    case WeightFormat::kTable:
      if (p.table_size == 8) return launch_expand<WeightFormat::kTable, 8>(p, stream);
      return launch_expand<WeightFormat::kTable, 16>(p, stream);
  }
}

}  // namespace vdit
