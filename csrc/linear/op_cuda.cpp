// The linear family on CUDA: which kernel runs, and whether packed weights are expanded first.
#include "common/op_cuda.h"
#include "linear/op_impl.h"
#include "linear/path.h"
#ifdef VDIT_EMU
#include "linear/schema.h"
#endif

namespace vdit {
namespace {  // the emulator has this file twice, with and without sm90

struct CudaLinear {
  using Scope = CudaScope;
  static constexpr bool kOnHost = CudaScope::kOnHost;
  static constexpr bool kCuda = true;

  // Of the kernel that multiplies: 90, or 80 for any other GPU.
  static int capability([[maybe_unused]] LinearParams const& p, [[maybe_unused]] Tensor const& like) {
#ifdef VDIT_HAS_SM90
    static Sm90Products const asked = sm90_products_asked("VDIT_LINEAR_KERNEL");
    if (takes_sm90(p, like, asked, can_run_linear_sm90, is_linear_sm90_faster)) return 90;
#endif
    return 80;
  }

  static bool expands(Scope&, LinearParams const& p, Tensor const& like) {
    return linear_path(p.m, p.n, p.k, p.format, p.table_size, PathRequest::kAuto, capability(p, like)).expand;
  }

  static void run(Scope& s, QuantizeRowsParams const& p, Tensor const&) { run_quantize_rows_sm80(p, s.stream); }
  static void run(Scope& s, ExpandWeightParams const& p, Tensor const&) { run_expand_weight_sm80(p, s.stream); }
  static void run(Scope& s, LinearParams const& p, Tensor const& like) {
#ifdef VDIT_HAS_SM90
    if (capability(p, like) == 90) return run_linear_sm90(p, s.stream);
#endif
    run_linear_sm80(p, s.stream);
  }
};

}  // namespace
}  // namespace vdit

#ifdef VDIT_EMU
VDIT_LIBRARY_FRAGMENT(VDIT_OP_NAMESPACE, m) { vdit::define_linear_schemas(m); }
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::LinearOps<vdit::CudaLinear>::bind(m); }
#else
VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CUDA, m) { vdit::LinearOps<vdit::CudaLinear>::bind(m); }
#endif
