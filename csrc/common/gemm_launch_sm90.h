// How the products of the linear and the vq family are started on compute capability 9.0.
#pragma once
#include "common/gemm_sm90.cuh"
#include "common/launch_util.cuh"

namespace vdit::sm90 {

// What all kernels take. Shapes are those of a LinearParams or VqLinearParams.
template <class Kernel, class P>
typename Kernel::Params gemm_params(P const& p, int element_bytes, int group) {
  typename Kernel::Params a;
  a.epilogue = epilogue_of_rows(p.epilogue, p.m);
  a.x = make_tensor_map(p.x, element_bytes, {p.k, p.m}, {p.m > 1 ? p.stride_x * element_bytes : int64_t{16}},
                        {kStepBytes / element_bytes, Kernel::kTokens}, SmemSwizzle::k128);
  a.m = p.m, a.n = p.n;
  a.order = {static_cast<int32_t>(ceil_div(p.m, Kernel::kTokens)),
             static_cast<int32_t>(ceil_div(p.n, Kernel::kOutputs)), group};
  a.steps = static_cast<int32_t>(ceil_div(p.k * element_bytes, kStepBytes));
  a.wide = epilogue_is_wide(p.epilogue, p.n);
  return a;
}

template <class Kernel>
void launch_persistent(typename Kernel::Params const& a, void* stream) {
  int64_t const tiles = static_cast<int64_t>(a.order.tiles_m) * a.order.tiles_n, blocks = multiprocessors();
  launch<Kernel>(Grid{blocks < tiles ? blocks : tiles, 1, 1}, Kernel::smem_bytes(), stream, a);
}

}  // namespace vdit::sm90
