// The vq family on CUDA: which kernel runs, and whether a weight is expanded first.
#include <array>

#include "common/op_cuda.h"
#include "vq/finish.h"
#include "vq/op_impl.h"
#ifdef VDIT_EMU
#include "vq/schema.h"
#endif

namespace vdit {
namespace {  // the emulator has this file twice, with and without sm90

struct CudaVq {
  using Scope = CudaScope;
  static constexpr bool kCuda = true;

  static int device_capability([[maybe_unused]] Tensor const& like) {
#ifdef VDIT_EMU
    return 80;
#else
    return compute_capability(like.get_device_index());
#endif
  }

  // The product with an expanded weight is rounded to x's type before the epilogue: not chosen for a wider result.
  static VqPathChoice path(VqLinearParams const& p, std::string const& asked, Tensor const& like) {
    bool const wider = !p.is_int8 && p.epilogue.out_dtype != p.dtype;
    return vq_path(p.m, p.is_int8, asked == "auto" && wider ? "fused" : asked, device_capability(like),
                   kernel_capability(p, like));
  }

#ifdef VDIT_HAS_SM90
  static Sm90Products asked() {
    static Sm90Products const asked = sm90_products_asked("VDIT_VQ_KERNEL");
    return asked;
  }
#endif

  // Of the kernel that multiplies: 90, or 80 for any other GPU.
  static int kernel_capability([[maybe_unused]] VqLinearParams const& p, [[maybe_unused]] Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (takes_sm90(p, like, asked(), can_run_vq_linear_sm90, is_vq_linear_sm90_faster)) return 90;
#endif
    return 80;
  }

  static void run(Scope& s, VqAssignParams const& p, Tensor const&) { run_vq_assign_sm80(p, s.stream); }
  static void run(Scope& s, VqDequantizeParams const& p, Tensor const&) { run_vq_dequantize_sm80(p, s.stream); }
  static void run(Scope& s, VqLinearParams const& p, Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (kernel_capability(p, like) == 90) return run_vq_linear_sm90(p, s.stream);
#endif
    run_vq_linear_sm80(p, s.stream);
  }
  static void run(Scope& s, LinearParams const& p, [[maybe_unused]] Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (takes_sm90(p, like, asked(), can_run_linear_sm90, is_linear_sm90_faster)) {
      return run_linear_sm90(p, s.stream);
    }
#endif
    run_linear_sm80(p, s.stream);
  }

  // torch's own linear, which on a GPU is cuBLAS: x [m, k], out [m, n]. Autocast leaves it alone, as it does every op
  // that is told where to write.
  static void torch_linear(Tensor const& x, Tensor const& weight, std::optional<Tensor> const& bias,
                           Tensor const& out) {
    std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owned by us: it is let go here
  }

  // The product goes to `out` at once where their types agree, and is finished there.
  static void multiply_expanded(Scope& s, VqLinearParams const& p, std::optional<Tensor> const& bias, Tensor const& x,
                                Tensor const& weight, Tensor const& out) {
    LinearEpilogue const& e = p.epilogue;
    bool const wider = e.out_dtype != p.dtype, finish = wider || e.gate != nullptr || e.residual != nullptr;
    std::vector<int64_t> const rows{p.m, p.k}, shape{p.m, p.n};
    Tensor const product = wider ? torch::stable::new_empty(x, shape) : torch::stable::view(out, shape);
    std::optional<Tensor> narrow;  // else the bias is part of what finishes
    if (bias && !finish) narrow = torch::stable::to(*bias, x.scalar_type());
    torch_linear(torch::stable::view(x, rows), weight, narrow, product);
    if (!finish) return;
    VqLinearParams rest = p;
    rest.epilogue.weight_scale = nullptr;  // it is in the weight
    run_vq_finish_sm80(rest, product.const_data_ptr(), s.stream);
  }
};

}  // namespace
}  // namespace vdit

#ifdef VDIT_EMU
VDIT_LIBRARY_FRAGMENT(VDIT_OP_NAMESPACE, m) { vdit::define_vq_schemas(m); }
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::VqOps<vdit::CudaVq>::bind(m); }
#else
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CUDA, m) { vdit::VqOps<vdit::CudaVq>::bind(m); }
#endif
