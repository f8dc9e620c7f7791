// What the CUDA op files of every family lend to their ops: device guard and stream, workspaces, and whether
// kernels for compute capability 9.0 run.
//
// With VDIT_EMU the same op files register the emulated kernels for CPU tensors in a namespace of their own,
// so that one test suite runs over both.
#pragma once
#include <cstdlib>
#include <cstring>

#include "common/torch_stable.h"
#ifndef VDIT_EMU
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace vdit {

#ifdef VDIT_EMU
struct CudaScope {
  static constexpr bool kOnHost = true;
  explicit CudaScope(Tensor const&) {}
  void* stream = nullptr;
};
#else
struct CudaScope {
  static constexpr bool kOnHost = false;
  explicit CudaScope(Tensor const& t) : guard(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

// Freed after the launch; the caching allocator keeps the memory alive for work queued on this stream.
inline Tensor cuda_workspace(Tensor const& like, int64_t bytes) {
  std::vector<int64_t> const shape{bytes};
  return torch::stable::new_empty(like, shape, ScalarType::Byte);
}

// NOTE: on a GPU the kernels of compute capability 9.0 run only on request, by a family's variable set to
// "sm90", until they have run on one.
inline bool is_sm90_asked(char const* variable) {
  char const* value = std::getenv(variable);
  return value != nullptr && std::strcmp(value, "sm90") == 0;
}

// Products have kernels for 9.0 whose tiles are too large for few rows: "sm90" takes them where they are the
// faster ones, "sm90_always" for every product that they can run, which is for checks and for timing that
// choice.
enum class Sm90Products { kNone, kFaster, kAll };

// The emulator's ops for 9.0 are there to run those kernels: all of them, but for "sm90".
inline Sm90Products sm90_products_asked(char const* variable) {
  char const* value = std::getenv(variable);
  if (value != nullptr && std::strcmp(value, "sm90") == 0) return Sm90Products::kFaster;
#ifdef VDIT_EMU
  return Sm90Products::kAll;
#else
  return value != nullptr && std::strcmp(value, "sm90_always") == 0 ? Sm90Products::kAll
                                                                    : Sm90Products::kNone;
#endif
}

// `asked` is what is_sm90_asked said, which a family keeps.
inline bool use_sm90([[maybe_unused]] Tensor const& t, [[maybe_unused]] bool asked) {
#ifdef VDIT_EMU
  return true;
#else
  return asked && compute_capability(t.get_device_index()) == 90;
#endif
}

// Whether a product goes to the kernel for 9.0.
template <class P>
bool takes_sm90(P const& p, Tensor const& like, Sm90Products asked, bool (*can_run)(P const&),
                bool (*is_faster)(P const&)) {
  if (!use_sm90(like, asked != Sm90Products::kNone) || !can_run(p)) return false;
  return asked == Sm90Products::kAll || is_faster(p);
}

}  // namespace vdit
