// What every instruction set brings to the linear family; cpu_body.h compiles to one of these each.
#pragma once
#include <cstddef>

#include "common/cpu/gemm_item.h"
#include "linear/params.h"

namespace vdit {

struct LinearCpuKernels {
  char const* name;
  size_t scratch_bytes;  // of multiply
  void (*quantize)(QuantizeRowsParams const& p, int64_t begin, int64_t end, float* row);
  void (*sum_rows)(LinearParams const& p, int64_t begin, int64_t end, int32_t* sums);
  // x_sums are the sums of x's rows, null where the format takes none.
  void (*multiply)(LinearParams const& p, GemmItem const& item, int32_t const* x_sums, void* scratch);
  void (*expand)(ExpandWeightParams const& p, int64_t n0);  // 64 rows from n0 on
};

extern LinearCpuKernels const kLinearPortable, kLinearAvx2, kLinearAvx512, kLinearAvx512Vnni;

}  // namespace vdit
