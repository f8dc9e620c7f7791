// The linear family on the CPU.
#include "linear/op_impl.h"

namespace vdit {
namespace {

struct CpuLinear {
  static constexpr bool kOnHost = true;
  static constexpr bool kCuda = false;
  struct Scope {
    explicit Scope(Tensor const&) {}
    ParallelFor parallel = torch_parallel_for();
  };
  // Every format is widened panel by panel on the way to the registers.
  static bool expands(Scope&, LinearParams const&, Tensor const&) { return false; }
  static void run(Scope& s, QuantizeRowsParams const& p, Tensor const&) { run_quantize_rows_cpu(p, s.parallel); }
  static void run(Scope& s, LinearParams const& p, Tensor const&) { run_linear_cpu(p, s.parallel); }
  static void run(Scope& s, ExpandWeightParams const& p, Tensor const&) { run_expand_weight_cpu(p, s.parallel); }
};

}  // namespace
}  // namespace vdit

VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::LinearOps<vdit::CpuLinear>::bind(m); }
