// CPU entry points of the vq family: work items and thread hand-out. The vector bodies are in cpu_body.h,
// compiled once per instruction set by cpu_<isa>.cpp.
#include <algorithm>
#include <vector>

#include "common/cpu/gemm_items.h"
#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"
#include "vq/cpu_kernels.h"
#include "vq/path.h"

namespace vdit {
namespace {

VqCpuKernels const& kernels() {
#if VDIT_CPU_X86
  switch (cpu_isa_level()) {
    case CpuIsa::kAvx512Bf16: return kVqAvx512Bf16;
    case CpuIsa::kAvx512Vnni: return kVqAvx512Vnni;
    case CpuIsa::kAvx512: return kVqAvx512;
    case CpuIsa::kAvx2: return kVqAvx2;
    case CpuIsa::kPortable: break;
  }
#endif
  cpu_isa_level();  // so that a bad VDIT_CPU_ISA is reported everywhere
  return kVqPortable;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void run_vq_assign_cpu(VqAssignParams const& p, ParallelFor const& parallel) {
  VqCpuKernels const& kernel = kernels();
  int64_t const width = p.dim <= 2 ? 2 : p.dim <= 4 ? 4 : p.dim <= 8 ? 8 : 16;
  std::vector<float> codebook(p.num_codewords * width), half_norms(p.num_codewords);
  for (int64_t c = 0; c < p.num_codewords; ++c) {
    for (int d = 0; d < p.dim; ++d) {
      float const x = p.codebook[c * p.dim + d];
      codebook[c * width + d] = x;
      half_norms[c] += x * x;
    }
    half_norms[c] *= 0.5f;
  }
  for_each_slice(parallel, p.num_vectors, 1024, [&](int64_t begin, int64_t end) {
    kernel.assign(p, codebook.data(), half_norms.data(), begin, end);
  });
}

void run_vq_dequantize_cpu(VqDequantizeParams const& p, ParallelFor const& parallel) {
  VqCpuKernels const& kernel = kernels();
  for_each_item(parallel, ceil_div(p.n, kVqTileOut),
                [&](int64_t i) { kernel.dequantize(p, i * kVqTileOut); });
}

namespace {

void multiply_few_rows(VqCpuKernels const& kernel, VqLinearParams const& p, ParallelFor const& parallel) {
  int64_t const pitch = vq_row_pitch(p.k);
  std::vector<float> x(ceil_div(p.m, kVqRowMultiple) * kVqRowMultiple * pitch);
  alignas(64) float words[1024];
  kernel.make_words(p, false, words);
  for (int64_t row = 0; row < p.m; ++row) kernel.widen_row(p, row, x.data() + row * pitch);
  for_each_item(parallel, ceil_div(p.n, kVqTileOut),
                [&](int64_t i) { kernel.multiply_rows(p, x.data(), words, i * kVqTileOut); });
}

// Output channels of an item: many, so that packing x costs little, but enough items for every thread.
int64_t columns_per_item(int64_t row_blocks, int64_t n, int threads) {
  int64_t const tiles = ceil_div(n, kVqTileOut),
                items = std::max<int64_t>(1, ceil_div(4 * threads, row_blocks));
  return std::clamp<int64_t>(ceil_div(tiles, items) * kVqTileOut, 64, kVqSumColumns);
}

void multiply_many_rows(VqCpuKernels const& kernel, VqLinearParams const& p, ParallelFor const& parallel) {
  alignas(64) float words[1024];
  kernel.make_words(p, true, words);
  int64_t const row_blocks = ceil_div(p.m, kernel.block_rows), rows = ceil_div(p.m, row_blocks);
  int64_t const columns = columns_per_item(row_blocks, p.n, parallel.num_threads);
  int64_t const column_blocks = ceil_div(p.n, columns), padded = ceil_div(p.n, kVqTileOut) * kVqTileOut;
  for_each_item(parallel, row_blocks * column_blocks, [&](int64_t i) {
    VqItem item;
    item.row = i / column_blocks * rows;
    item.column = i % column_blocks * columns;
    item.rows = static_cast<int32_t>(std::min(rows, p.m - item.row));
    item.columns = static_cast<int32_t>(std::min(columns, padded - item.column));
    if (item.rows > 0) kernel.multiply(p, words, item, thread_scratch(kernel.scratch_bytes));
  });
}

void multiply_int8(VqCpuKernels const& kernel, VqLinearParams const& p, ParallelFor const& parallel) {
  int const count = p.format == VqFormat::k256x4 ? 256 : 64, dim = p.format == VqFormat::k256x4 ? 4 : 2;
  uint32_t words[256];
  for (int i = 0; i < count; ++i) {
    words[i] = 0;
    for (int d = 0; d < dim; ++d)
      words[i] |= static_cast<uint32_t>(static_cast<int8_t const*>(p.codebook)[i * dim + d] + 128) << 8 * d;
  }
  std::vector<int32_t> x_sums(p.m);
  for_each_slice(parallel, p.m, 64,
                 [&](int64_t begin, int64_t end) { kernel.sum_rows(p, begin, end, x_sums.data()); });
  for_each_gemm_item(parallel, p.m, p.n, [&](GemmItem const& item) {
    kernel.multiply_int8(p, words, item, x_sums.data(), thread_scratch(kernel.int8_scratch_bytes));
  });
}

}  // namespace

void run_vq_linear_cpu(VqLinearParams const& p, ParallelFor const& parallel) {
  if (p.m == 0 || p.n == 0) return;
  if (p.is_int8) return multiply_int8(kernels(), p, parallel);
  VqCpuKernels const& kernel = kernels();
  if (vq_cpu_path(p.m) == VqPath::kRows) return multiply_few_rows(kernel, p, parallel);
  multiply_many_rows(kernel, p, parallel);
}

}  // namespace vdit
