// Launcher of kernel_sm80_rope.cuh: element type, form of the pairs, and 16-byte vectors wherever addresses
// allow.
#include "attention/kernel_sm80_rope.cuh"
#include "common/launch_util.cuh"

namespace vdit {
namespace {

bool index_differs_by_head(RmsNormRopeParams const& p) { return p.index != nullptr && p.stride_index.h != 0; }

bool index_differs_by_batch(RmsNormRopeParams const& p) { return p.stride_index.b != 0; }

// The inverse of an index per head, [b|1, h, s].
void invert_index(RmsNormRopeLaunch& p, int32_t* inverse, void* stream) {
  p.inverse = inverse;
  p.stride_inverse = {index_differs_by_batch(p) ? p.heads * p.seqlen : 0, p.seqlen};
  Grid const grid{ceil_div(p.seqlen, InvertIndexKernel::kThreads), p.heads,
                  index_differs_by_batch(p) ? p.batch : 1};
  launch<InvertIndexKernel>(grid, 0, stream, {p.index, inverse, p.stride_index, p.seqlen});
}

template <class T>
bool rows_are_wide(RmsNormRopeParams const& p) {
  auto const table_is = [&](void const* table, Strides3 const& s) {
    int64_t const unit = p.rope_dtype == DType::kFloat32 ? 4 : sizeof(T);
    return all_multiples(16, {table}, unit, {s.b, s.h, s.s, p.rope_width});
  };
  return all_multiples(
             16, {p.x, p.out, p.weight}, sizeof(T),
             {p.stride_x.b, p.stride_x.h, p.stride_x.s, p.stride_out.b, p.stride_out.h, p.stride_out.s}) &&
         (p.cos == nullptr || (table_is(p.cos, p.stride_cos) && table_is(p.sin, p.stride_sin)));
}

template <class T, bool kInterleaved>
void run_form(RmsNormRopeLaunch const& p, void* stream) {
  Grid const grid{p.seqlen, p.batch, 1};
  using Wide = RmsNormRopeKernel<T, kInterleaved, true>;
  if (rows_are_wide<T>(p)) return launch<Wide>(grid, Wide::kSmemBytes, stream, p);
  launch<RmsNormRopeKernel<T, kInterleaved, false>>(grid, Wide::kSmemBytes, stream, p);
}

}  // namespace

int64_t rms_norm_rope_workspace_bytes(RmsNormRopeParams const& p) {
  if (!index_differs_by_head(p)) return 0;
  return (index_differs_by_batch(p) ? p.batch : 1) * p.heads * p.seqlen *
         static_cast<int64_t>(sizeof(int32_t));
}

void run_rms_norm_rope_sm80(RmsNormRopeParams const& given, void* workspace, void* stream) {
  RmsNormRopeLaunch p;
  static_cast<RmsNormRopeParams&>(p) = given;
  if (index_differs_by_head(p)) invert_index(p, static_cast<int32_t*>(workspace), stream);
  with_type("rms_norm_rope", p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.interleaved) return run_form<T, true>(p, stream);
    run_form<T, false>(p, stream);
  });
}

}  // namespace vdit
