// The little that the op files need of torch, through the LibTorch stable ABI, so that one build serves every
// torch from 2.11 on. Kernels never include this.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "vdit/types.h"

// The op namespace is a build option (the Hugging Face kernels hub needs one of its own per build). The
// indirection lets the macro expand before torch's macros paste it.
#ifndef VDIT_OP_NAMESPACE
#define VDIT_OP_NAMESPACE vdit
#endif
#define VDIT_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define VDIT_LIBRARY_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)  // every family but the first
#define VDIT_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

namespace vdit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(Tensor const& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline char const* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string device_name(Tensor const& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline DType to_dtype(ScalarType type) {
  return type == ScalarType::Float  ? DType::kFloat32
         : type == ScalarType::Half ? DType::kFloat16
                                    : DType::kBFloat16;
}

// Torch's own threads, lent to a torch-free CPU kernel.
inline ParallelFor torch_parallel_for() {
  ParallelFor parallel;
  parallel.num_threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](void*, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* state) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(state, begin, end); });
  };
  return parallel;
}

}  // namespace vdit
