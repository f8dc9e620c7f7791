// What the instruction-set units of the attention family offer to cpu.cpp. Plain data only: the units are
// compiled with different flags and share nothing inline.
#pragma once
#include <cstddef>
#include <cstdint>

#include "vdit/attention.h"

namespace vdit {

constexpr int kCpuMaxHeadDim = 256;
constexpr int kCpuItemRows = 128;  // rows that one work item holds at most

// Rows [row, row + rows) of head (b, h). `block` is the query block they belong to, where there is one.
struct CpuItem {
  int64_t b = 0, h = 0, block = 0, row = 0;
  int32_t rows = 0;
};

struct AttentionCpuKernels {
  char const* isa;
  size_t scratch_bytes;  // per thread, aligned to 64
  void (*attend)(BlockSparseAttentionParams const& p, CpuItem const& item, void* scratch);
  void (*assign)(KMeansAssignParams const& p, CpuItem const& item, void* scratch);
  void (*merge)(MergeAttentionParams const& p, CpuItem const& item);
  void (*mean_pool)(MeanPoolBlocksParams const& p, CpuItem const& item);  // item.block
  void (*segment_mean)(SegmentMeanParams const& p, CpuItem const& item);  // item.block
  // Tokens [row, row + rows), all heads. `inverse` [b|1, h, s] of an index per head, else null; fp32 weight.
  void (*norm_rope)(RmsNormRopeParams const& p, int32_t const* inverse, CpuItem const& item);
  // row[0 .. num_kv_blocks) of item.block.
  void (*mass)(BlockMassParams const& p, CpuItem const& item, float* row, void* scratch);
};

extern AttentionCpuKernels const kAttentionPortable, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16;

}  // namespace vdit
