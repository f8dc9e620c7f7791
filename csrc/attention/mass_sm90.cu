// Launchers of kernel_sm90_mass.cuh.
#include "attention/kernel_sm90_mass.cuh"
#include "attention/launch_util.cuh"

namespace vdit {
namespace {

constexpr int64_t kMaxSmem = 227 * 1024;

// Tokens as TMA sees them: columns, rows, heads, batch. A dimension of one entry is never stepped over; its
// stride may be anything, TMA's may not.
TensorMap map_rows(void const* rows, Strides3 const& stride, BlockMassParams const& p, int64_t length,
                   int box_rows) {
  auto const bytes = [](int64_t size, int64_t elements) { return size > 1 ? elements * 2 : int64_t{16}; };
  return make_tensor_map(rows, 2, {p.head_dim, length, p.heads, p.batch},
                         {bytes(length, stride.s), bytes(p.heads, stride.h), bytes(p.batch, stride.b)},
                         {64, box_rows, 1, 1}, SmemSwizzle::k128);
}

// TMA takes strides below 2^40 bytes.
bool can_walk(Strides3 const& stride, BlockMassParams const& p, int64_t length) {
  auto const fits = [](int64_t size, int64_t elements) {
    return size <= 1 || (elements >= 0 && elements * 2 < (int64_t{1} << 40));
  };
  return fits(p.batch, stride.b) && fits(p.heads, stride.h) && fits(length, stride.s);
}

template <class T, int kHeadDim>
void sum_blocks(BlockMassTopkParams const& p, void* stream) {
  using Kernel = sm90::BlockMassKernel<T, kHeadDim>;
  typename Kernel::Params a{};
  a.topk = p;
  a.q = map_rows(p.row.q, p.row.stride_q, p.row, p.row.seqlen_q, 64);
  a.k = map_rows(p.row.k, p.row.stride_k, p.row, p.row.seqlen_kv, Kernel::kBlockN);
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
    throw std::runtime_error(
        "vdit::block_mass: the sm90 kernel takes fp16 or bf16, head_dim 64, 96 or 128, query blocks of 64, "
        "128 or 256 "
        "rows and key blocks of a multiple of 64, got others; call the sm80 one.");
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
         can_walk(p.stride_q, p, p.seqlen_q) && can_walk(p.stride_k, p, p.seqlen_kv);
}

void run_block_mass_sm90(BlockMassParams const& p, void* stream) {
  BlockMassTopkParams unlisted;
  unlisted.row = p;
  run_mass(unlisted, stream);
}

void run_block_mass_topk_sm90(BlockMassTopkParams const& p, void* stream) { run_mass(p, stream); }

}  // namespace vdit
