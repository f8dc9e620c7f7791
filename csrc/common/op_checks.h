// Checks of tensors that the op files of every family share.
#pragma once
#include <cstdlib>
#include <cstring>

#include "common/torch_stable.h"

namespace vdit {

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_same_device(char const* op, char const* name, Tensor const& t, Tensor const& q) {
  VDIT_CHECK(t.device() == q.device(), op, name, " must be on ", device_name(q), " like the first argument, got ",
             device_name(t), "; move it there");
}

inline void check_dtype(char const* op, char const* name, Tensor const& t, ScalarType expected) {
  VDIT_CHECK(t.scalar_type() == expected, op, name, " must be ", dtype_name(expected), ", got ",
             dtype_name(t.scalar_type()));
}

// A dimension of one entry is never stepped over: its stride may be anything, and is dropped.
inline int64_t stride_of(Tensor const& t, int64_t dim) { return t.size(dim) <= 1 ? 0 : t.stride(dim); }

// Reading contents back from a GPU waits for it, so there plans and results are checked only on request.
inline bool contents_checked_on_request() {
  static bool const on = [] {
    char const* value = std::getenv("VDIT_CHECK_PLANS");
    return value != nullptr && std::strcmp(value, "0") != 0;
  }();
  return on;
}

inline Tensor to_cpu(Tensor const& t) {
  if (t.is_cpu()) return t;
  return torch::stable::to(t, std::nullopt, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                           std::nullopt, false, false, std::nullopt);
}

}  // namespace vdit
