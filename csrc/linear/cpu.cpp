// CPU entry points of the linear family: work items and thread hand-out. The vector bodies are in cpu_body.h,
// compiled once per instruction set by cpu_<isa>.cpp.
#include <vector>

#include "common/cpu/gemm_items.h"
#include "common/cpu/isa.h"
#include "common/cpu/scratch.h"
#include "linear/cpu_kernels.h"

namespace vdit {
namespace {

LinearCpuKernels const& kernels() {
#if VDIT_CPU_X86
  switch (cpu_isa_level()) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512Vnni: return kLinearAvx512Vnni;
    case CpuIsa::kAvx512: return kLinearAvx512;
    case CpuIsa::kAvx2: return kLinearAvx2;
    case CpuIsa::kPortable: break;
  }
#endif
  cpu_isa_level();  // so that a bad VDIT_CPU_ISA is reported everywhere
  return kLinearPortable;
}

}  // namespace

void run_quantize_rows_cpu(QuantizeRowsParams const& p, ParallelFor const& parallel) {
  LinearCpuKernels const& kernel = kernels();
  size_t const bytes = 2 * sizeof(float) * static_cast<size_t>(p.channels + 16);
  for_each_slice(parallel, p.batch * p.tokens, 16, [&](int64_t begin, int64_t end) {
    kernel.quantize(p, begin, end, static_cast<float*>(thread_scratch(bytes)));
  });
}

void run_linear_cpu(LinearParams const& p, ParallelFor const& parallel) {
  LinearCpuKernels const& kernel = kernels();
  std::vector<int32_t> made;
  int32_t const* x_sums = p.epilogue.x_sum;
  if (x_sums == nullptr && p.format != WeightFormat::kInt4) {  // panels with an offset
    made.resize(p.m);
    x_sums = made.data();
    for_each_slice(parallel, p.m, 64,
                   [&](int64_t begin, int64_t end) { kernel.sum_rows(p, begin, end, made.data()); });
  }
  for_each_gemm_item(parallel, p.m, p.n, [&](GemmItem const& item) {
    kernel.multiply(p, item, x_sums, thread_scratch(kernel.scratch_bytes));
  });
}

void run_expand_weight_cpu(ExpandWeightParams const& p, ParallelFor const& parallel) {
  LinearCpuKernels const& kernel = kernels();
  for_each_item(parallel, (p.n + kGemmColumns - 1) / kGemmColumns,
                [&](int64_t i) { kernel.expand(p, i * kGemmColumns); });
}

}  // namespace vdit
