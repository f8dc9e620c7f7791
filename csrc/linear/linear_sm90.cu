// The linear for sm90: what it takes, and the choice of the tile.
#include "linear/launch_sm90.h"
#include "linear/tile_sm90.h"

namespace vdit {

bool can_run_linear_sm90(LinearParams const& p) {
  bool const int8 = p.format == WeightFormat::kInt8, planes = p.format == WeightFormat::kNibblePlanes;
  bool const table = p.format == WeightFormat::kTable;
  // The copy engine's alignment, and rows that do not overlap (of one that is expanded the stride is 0),
  // which its maps are not specified for; tiles are counted, and tokens told to it, in 32 bits.
  if ((p.m > 1 && p.stride_x < p.k) || (int8 && p.n > 1 && p.stride_weight < p.k)) return false;
  return p.m > 0 && p.n > 0 && p.k > 0 && p.k % 16 == 0 && p.k <= 65536 && p.m < (int64_t{1} << 30) &&
         p.n < (int64_t{1} << 30) && (p.m + 63) / 64 * ((p.n + 127) / 128) < (int64_t{1} << 30) &&
         all_multiples(16, {p.x, p.weight, planes ? p.weight_low : nullptr}, 1,
                       {p.m > 1 ? p.stride_x : 0, int8 && p.n > 1 ? p.stride_weight : 0}) &&
         (!int8 || epilogue_is_wide(p.epilogue, p.n)) &&
         (!table || ((p.table_size == 8 || p.table_size == 16) && address(p.table) % 8 == 0));
}

bool is_linear_sm90_faster(LinearParams const& p) {
  return choose_linear_kernel_sm90(p, multiprocessors()).kernel == 90;
}

void run_linear_sm90(LinearParams const& p, void* stream) {
  if (p.m == 0 || p.n == 0) return;
  if (!can_run_linear_sm90(p)) {
    throw std::runtime_error(
        "vdit::linear: 16 to 65,536 channels, a multiple of 16, and rows at multiples of 16 bytes were "
        "expected by the sm90 kernel, got others; call run_linear_sm80.");
  }
  auto const tile = pick_linear_tile_sm90(p, multiprocessors());
  switch (p.format) {
    case WeightFormat::kInt8: return sm90::linear_int8(p, tile, stream);
    case WeightFormat::kInt4: return sm90::linear_int4(p, tile, stream);
    case WeightFormat::kNibblePlanes: return sm90::linear_planes(p, tile, stream);
    case WeightFormat::kTable: return sm90::linear_table(p, tile, stream);
  }
}

}  // namespace vdit
