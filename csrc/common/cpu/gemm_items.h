// Hands out the pieces of the product of int8_gemm.h.
#pragma once
#include <algorithm>

#include "common/cpu/gemm_item.h"
#include "common/cpu/parallel.h"

namespace vdit {

// Calls run(item) for the pieces of an m x n product. All panels of some rows come before the next rows, so
// that the threads share the rows in cache.
template <class Run>
void for_each_gemm_item(ParallelFor const& parallel, int64_t m, int64_t n, Run const& run) {
  if (m == 0 || n == 0) return;
  int64_t const panels = (n + kGemmColumns - 1) / kGemmColumns, chunks = (m + kGemmRows - 1) / kGemmRows;
  int64_t const rows = ((m + chunks - 1) / chunks + 5) / 6 * 6;
  for_each_item(parallel, panels * ((m + rows - 1) / rows), [&](int64_t i) {
    int64_t const m0 = i / panels * rows;
    run(GemmItem{m0, i % panels * kGemmColumns, static_cast<int32_t>(std::min(rows, m - m0))});
  });
}

}  // namespace vdit
