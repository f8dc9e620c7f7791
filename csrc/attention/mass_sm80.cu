// Launchers of kernel_sm80_mass.cuh.
#include "attention/kernel_sm80_mass.cuh"
#include "common/launch_util.cuh"
#include "attention/tile.h"

namespace vdit {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Throws std::runtime_error with one sentence, for callers that come without torch.
void check_mass(BlockMassParams const& p) {
  check_cuda_head_dim(p.head_dim, "block_mass");
  // A dimension of one entry is never stepped over.
  auto const row_starts = [&](void const* rows, Strides3 const& stride, int64_t length) {
    return all_multiples(16, {rows}, 2,
                         {p.batch > 1 ? stride.b : 0, p.heads > 1 ? stride.h : 0, length > 1 ? stride.s : 0});
  };
  bool const aligned = row_starts(p.q, p.stride_q, p.seqlen_q) && row_starts(p.k, p.stride_k, p.seqlen_kv);
  if (!aligned) {
    throw std::runtime_error(
        "vdit::block_mass: on CUDA the rows of q and k must start at multiples of 16 bytes, got a pointer or "
        "a "
        "stride that is not; align them.");
  }
}

// Shared memory of a thread block with `groups` query blocks; `rows_at` is where their rows of masses begin.
template <class Kernel>
int64_t smem_bytes(BlockMassTopkParams const& p, int64_t groups, int64_t& rows_at) {
  bool const listed = p.total != nullptr;
  int64_t const lists = listed ? round_up(groups * p.row.num_kv_blocks * 2) : 0;
  rows_at = (lists > Kernel::kStagesBytes ? lists : Kernel::kStagesBytes) + Kernel::kPartialBytes;
  return rows_at + (listed ? groups * p.row.num_kv_blocks * 4 : 0);
}

template <class T, int kHeadDim>
void sum_blocks(BlockMassTopkParams const& p, void* stream) {
  using Kernel = BlockMassKernel<T, kHeadDim>;
  constexpr int64_t kSmallSmem = 96 * 1024;  // what every GPU has, and lets two thread blocks share an SM
  int64_t const units = (p.row.q_block_size + 15) / 16;
  BlockMassLaunch a{};
  a.topk = p;
  a.units = static_cast<int32_t>(units < Kernel::kUnits ? units : Kernel::kUnits);
  a.passes = static_cast<int32_t>((units + Kernel::kUnits - 1) / Kernel::kUnits);
  a.groups = Kernel::kUnits / a.units;
  int64_t rows_at = 0;
  // Long rows: fewer query blocks share the keys.
  while (a.groups > 1 && smem_bytes<Kernel>(p, a.groups, rows_at) > kSmallSmem) --a.groups;
  int64_t const bytes = smem_bytes<Kernel>(p, a.groups, rows_at);
  a.rows_at = static_cast<int32_t>(rows_at);
  launch<Kernel>(Grid{ceil_div(p.row.num_q_blocks, a.groups), p.row.heads, p.row.batch},
                 static_cast<size_t>(bytes), stream, a);
}

void run_mass(BlockMassTopkParams const& p, void* stream) {
  check_mass(p.row);
  with_type("block_mass", p.row.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (p.row.head_dim == 64) return sum_blocks<T, 64>(p, stream);
      if (p.row.head_dim == 96) return sum_blocks<T, 96>(p, stream);
      return sum_blocks<T, 128>(p, stream);
    } else {
      throw std::runtime_error("vdit::block_mass: on CUDA the dtype must be fp16 or bf16, got fp32.");
    }
  });
}

}  // namespace

void run_block_mass_sm80(BlockMassParams const& p, void* stream) {
  BlockMassTopkParams unlisted;
  unlisted.row = p;
  run_mass(unlisted, stream);
}

void run_block_mass_topk_sm80(BlockMassTopkParams const& p, void* stream) {
  if (p.row.num_kv_blocks > kMaxMassBlocks) {
    throw std::runtime_error("vdit::block_mass_topk: there must be at most " +
                             std::to_string(kMaxMassBlocks) + " key blocks, got " +
                             std::to_string(p.row.num_kv_blocks) + ".");
  }
  run_mass(p, stream);
}

}  // namespace vdit
