// Bodies of the linear family's CPU kernels, compiled once an instruction set: the unit that includes this
// file has included one simd_*.h before. Everything is internal to the unit, and nothing of the standard
// library that leaves an inline symbol is used (see element.h for why).
#pragma once
#include <utility>

#include "linear/cpu_kernels.h"
#include "linear/cpu_panels.h"
#include "linear/cpu_quantize.h"

namespace vdit {
namespace {

inline void multiply(LinearParams const& p, GemmItem const& item, int32_t const* x_sums, void* scratch) {
  GemmRows const x{p.x, p.stride_x, p.k};
  auto const* const codes = static_cast<uint8_t const*>(p.weight);
  auto const* const low = static_cast<uint8_t const*>(p.weight_low);
  Tiles const tiles{p.n, p.k};
  auto const run = [&](auto const& panel) { int8_gemm(x, p.n, panel, p.epilogue, item, x_sums, scratch); };
  switch (p.format) {
    case WeightFormat::kInt8:
      return run(Int8Panel{static_cast<int8_t const*>(p.weight), p.stride_weight, p.n, p.k});
    case WeightFormat::kInt4: return run(Int4Panel{codes, tiles});
    case WeightFormat::kNibblePlanes: return run(NibblePlanesPanel{codes, low, tiles});
    case WeightFormat::kTable: return run(TablePanel{codes, p.table, p.table_size, tiles});
  }
}

inline void sum_linear_rows(LinearParams const& p, int64_t begin, int64_t end, int32_t* sums) {
  sum_rows(GemmRows{p.x, p.stride_x, p.k}, begin, end, sums);
}

// A panel of one tile's depth, stored row by row. `offset` is what the panel's bytes are above the result.
template <class Panel>
inline void expand_rows(ExpandWeightParams const& p, int64_t n0, Panel const& source, uint8_t offset) {
  alignas(64) uint8_t panel[2 * kTileCodes * kGemmColumns];
  int64_t const rows = p.n - n0 < kGemmColumns ? p.n - n0 : kGemmColumns;
  for (int64_t k0 = 0; k0 < p.stride_out; k0 += 2 * kTileCodes) {
    int64_t const depth = p.k - k0 < 2 * kTileCodes ? p.k - k0 : 2 * kTileCodes;
    if (depth > 0) source.fill(panel, n0, k0, static_cast<int>((depth + 3) / 4 * 4));
    int64_t const width = p.stride_out - k0 < 2 * kTileCodes ? p.stride_out - k0 : 2 * kTileCodes;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < width; ++k)
        p.out[(n0 + row) * p.stride_out + k0 + k] =
            k < depth ? static_cast<int8_t>(panel[k / 4 * kPanelPitch + 4 * row + k % 4] - offset) : 0;
  }
}

inline void expand(ExpandWeightParams const& p, int64_t n0) {
  auto const* const codes = static_cast<uint8_t const*>(p.weight);
  auto const* const low = static_cast<uint8_t const*>(p.weight_low);
  Tiles const tiles{p.n, p.k};
  if (p.format == WeightFormat::kInt4) return expand_rows(p, n0, Int4Panel{codes, tiles}, 0);
  if (p.format == WeightFormat::kNibblePlanes)
    return expand_rows(p, n0, NibblePlanesPanel{codes, low, tiles}, 128);
  expand_rows(p, n0, TablePanel{codes, p.table, p.table_size, tiles}, 128);
}

}  // namespace

#define VDIT_LINEAR_CPU_KERNELS \
  {Simd::kName, sizeof(GemmScratch), quantize_rows, sum_linear_rows, multiply, expand}

}  // namespace vdit
