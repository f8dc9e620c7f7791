// Launchers of kernel_sm80_rows.cuh: which element type, and 16-byte vectors wherever addresses allow.
#include "attention/kernel_sm80_rows.cuh"
#include "common/launch_util.cuh"

namespace vdit {
namespace {

template <class Word>
void permute_words(PermuteRowsParams const& p, void* stream) {
  using Kernel = PermuteRowsKernel<Word>;
  Grid const grid{ceil_div(p.num_index, Kernel::kRows), p.heads, p.batch};
  launch<Kernel>(grid, 0, stream, p);
}

}  // namespace

void run_merge_attention_sm80(MergeAttentionParams const& p, void* stream) {
  if (p.head_dim == 0) return;
  with_type("merge_attention", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVec = kVecOf<T>;
    Grid const grid{ceil_div(p.seqlen, MergeAttentionKernel<T, 1>::kRows), p.heads, p.batch};
    bool const wide =
        all_multiples(16, {p.out1, p.out2, p.out}, sizeof(T),
                      {p.head_dim, p.stride_out1.b, p.stride_out1.h, p.stride_out1.s, p.stride_out2.b,
                       p.stride_out2.h, p.stride_out2.s, p.stride_out.b, p.stride_out.h, p.stride_out.s});
    if (wide) {
      launch<MergeAttentionKernel<T, kVec>>(grid, 0, stream, p);
    } else {
      launch<MergeAttentionKernel<T, 1>>(grid, 0, stream, p);
    }
  });
}

void run_permute_rows_sm80(PermuteRowsParams const& p, void* stream) {
  if (p.row_bytes == 0) return;
  auto fits = [&](int64_t bytes) {
    return all_multiples(bytes, {p.x, p.out}, 1,
                         {p.row_bytes, p.stride_x.b, p.stride_x.h, p.stride_x.s, p.stride_out.b,
                          p.stride_out.h, p.stride_out.s});
  };
  if (fits(16)) return permute_words<uint4>(p, stream);
  if (fits(4)) return permute_words<uint32_t>(p, stream);
  if (fits(2)) return permute_words<uint16_t>(p, stream);
  permute_words<uint8_t>(p, stream);
}

void run_mean_pool_blocks_sm80(MeanPoolBlocksParams const& p, void* stream) {
  if (p.head_dim == 0) return;
  with_type("mean_pool_blocks", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVec = kVecOf<T>;
    Grid const grid{p.num_blocks, p.heads, p.batch};
    bool const wide =
        all_multiples(16, {p.x}, sizeof(T), {p.head_dim, p.stride_x.b, p.stride_x.h, p.stride_x.s});
    if (wide) {
      launch<MeanPoolBlocksKernel<T, kVec>>(grid, RowMean<T, kVec>::kSmemBytes, stream, p);
    } else {
      launch<MeanPoolBlocksKernel<T, 1>>(grid, RowMean<T, 1>::kSmemBytes, stream, p);
    }
  });
}

void run_segment_mean_sm80(SegmentMeanParams const& p, void* stream) {
  if (p.head_dim == 0) return;
  with_type("segment_mean", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVec = kVecOf<T>;
    Grid const grid{p.num_segments, p.heads, p.batch};
    bool const wide =
        all_multiples(16, {p.x, p.out}, sizeof(T), {p.head_dim, p.stride_x.b, p.stride_x.h, p.stride_x.s});
    if (wide) {
      launch<SegmentMeanKernel<T, kVec>>(grid, RowMean<T, kVec>::kSmemBytes, stream, p);
    } else {
      launch<SegmentMeanKernel<T, 1>>(grid, RowMean<T, 1>::kSmemBytes, stream, p);
    }
  });
}

}  // namespace vdit
