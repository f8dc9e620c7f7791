// Launchers of kernel_sm90_mass.cuh.
#include "attention/kernel_sm90_mass.cuh"
#include "attention/launch_sm90.h"
#include "common/launch_util.cuh"

namespace vdit {
namespace {

constexpr int64_t kMaxSmem = 227 * 1024;

char const* op_of(BlockMassTopkParams const& p) {
  return p.total == nullptr ? "vdit::block_mass" : "vdit::block_mass_topk";
}

template <class T, int kHeadDim>
void sum_blocks(BlockMassTopkParams const& p, void* stream) {
  using Kernel = sm90::BlockMassKernel<T, kHeadDim>;
  typename Kernel::Params a{};
  a.topk = p;
  BlockMassParams const& row = p.row;
  a.q = sm90::map_rows(row.q, row.stride_q, {row.batch, row.heads, row.seqlen_q, row.head_dim}, 64);
  a.k = sm90::map_rows(row.k, row.stride_k, {row.batch, row.heads, row.seqlen_kv, row.head_dim},
                       Kernel::kBlockN);
  a.groups = Kernel::kBlockM / p.row.q_block_size;
  launch<Kernel>(Grid{ceil_div(p.row.seqlen_q, Kernel::kBlockM), p.row.heads, p.row.batch},
                 static_cast<size_t>(Kernel::smem_bytes(p.row.num_kv_blocks)), stream, a);
}

template <class T>
void sum_blocks_any(BlockMassTopkParams const& p, void* stream) {
  if (p.row.head_dim == 64) return sum_blocks<T, 64>(p, stream);
  if (p.row.head_dim == 96) return sum_blocks<T, 96>(p, stream);
  sum_blocks<T, 128>(p, stream);
}

void run_mass(BlockMassTopkParams const& p, void* stream) {
  if (!can_run_block_mass_sm90(p.row)) {
    throw std::runtime_error(std::string(op_of(p)) +
                             ": the sm90 kernel takes fp16 or bf16, head_dim 64, 96 or 128, query blocks of "
                             "64, 128 or 256 rows and key "
                             "blocks of a multiple of 64, got head_dim " +
                             std::to_string(p.row.head_dim) + " and blocks of " +
                             std::to_string(p.row.q_block_size) + " and " +
                             std::to_string(p.row.kv_block_size) + "; call the sm80 one.");
  }
  if (p.row.dtype == DType::kFloat16) return sum_blocks_any<cute::half_t>(p, stream);
  sum_blocks_any<cute::bfloat16_t>(p, stream);
}

}  // namespace

bool can_run_block_mass_sm90(BlockMassParams const& p) {
  bool const head_dim = p.head_dim == 64 || p.head_dim == 96 || p.head_dim == 128;
  bool const blocks =
      (p.q_block_size == 64 || p.q_block_size == 128 || p.q_block_size == 256) && p.kv_block_size % 64 == 0;
  int64_t const bytes = p.head_dim == 64
                            ? sm90::BlockMassKernel<cute::half_t, 64>::smem_bytes(p.num_kv_blocks)
                            : sm90::BlockMassKernel<cute::half_t, 128>::smem_bytes(p.num_kv_blocks);
  bool const fits = bytes <= kMaxSmem;
  return head_dim && blocks && fits && p.dtype != DType::kFloat32 && p.seqlen_q > 0 && p.seqlen_kv > 0 &&
         sm90::can_walk(p.stride_q, p.batch, p.heads, p.seqlen_q) &&
         sm90::can_walk(p.stride_k, p.batch, p.heads, p.seqlen_kv);
}

void run_block_mass_sm90(BlockMassParams const& p, void* stream) {
  BlockMassTopkParams unlisted;
  unlisted.row = p;
  run_mass(unlisted, stream);
}

void run_block_mass_topk_sm90(BlockMassTopkParams const& p, void* stream) { run_mass(p, stream); }

}  // namespace vdit
