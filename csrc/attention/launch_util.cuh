// What the family's launchers share.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "cute/numeric/numeric_types.hpp"
#include "vdit/types.h"

namespace vdit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline uintptr_t address(void const* p) { return reinterpret_cast<uintptr_t>(p); }

// Is every one of these a multiple of `bytes`? Strides and sizes are given in units of `unit` bytes.
inline bool all_multiples(int64_t bytes, std::initializer_list<void const*> pointers, int64_t unit,
                          std::initializer_list<int64_t> lengths) {
  for (void const* p : pointers) {
    if (address(p) % static_cast<uintptr_t>(bytes) != 0) return false;
  }
  for (int64_t n : lengths) {
    if (n * unit % bytes != 0) return false;
  }
  return true;
}

// Calls f(T{}) with the C++ type of a DType.
template <class F>
void with_type(char const* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(cute::half_t{});
    case DType::kBFloat16: return f(cute::bfloat16_t{});
  }
  throw std::runtime_error(std::string("vdit::") + op + ": the dtype must be fp32, fp16 or bf16, got code " +
                           std::to_string(static_cast<int>(dtype)) + ".");
}

}  // namespace vdit
