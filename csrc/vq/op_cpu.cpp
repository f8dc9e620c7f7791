// The vq family on the CPU.
#include "vq/op_impl.h"

namespace vdit {
namespace {

struct CpuVq {
  static constexpr bool kCuda = false;
  struct Scope {
    explicit Scope(Tensor const&) {}
    ParallelFor parallel = torch_parallel_for();
  };
  // Words are looked up on the way to the registers, unless an int8 product is asked for otherwise.
  static VqPathChoice path(VqLinearParams const& p, std::string const& asked, Tensor const&) {
    VqPathChoice choice;
    choice.path = p.is_int8 && asked == "expand" ? VqPath::kExpand : VqPath::kFused;
    return choice;
  }
  static void run(Scope& s, VqAssignParams const& p, Tensor const&) { run_vq_assign_cpu(p, s.parallel); }
  static void run(Scope& s, VqDequantizeParams const& p, Tensor const&) { run_vq_dequantize_cpu(p, s.parallel); }
  static void run(Scope& s, VqLinearParams const& p, Tensor const&) { run_vq_linear_cpu(p, s.parallel); }
  static void run(Scope& s, LinearParams const& p, Tensor const&) { run_linear_cpu(p, s.parallel); }
  static void multiply_expanded(Scope& s, VqLinearParams const& p, std::optional<Tensor> const&, Tensor const&,
                                Tensor const&, Tensor const&) {
    run_vq_linear_cpu(p, s.parallel);  // path() never asks for it
  }
};

}  // namespace
}  // namespace vdit

VDIT_LIBRARY_IMPL(VDIT_OP_NAMESPACE, CPU, m) { vdit::VqOps<vdit::CpuVq>::bind(m); }
