// What the launchers of every family share.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "cute/numeric/numeric_types.hpp"
#include "vdit/epilogue.h"
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

// Whether eight neighbouring columns of all that an epilogue touches can be moved 16 bytes at a time.
inline bool epilogue_is_wide(LinearEpilogue const& e, int64_t n) {
  auto const bytes = [](DType dtype) -> int64_t { return dtype == DType::kFloat32 ? 4 : 2; };
  if (n % 8 != 0 || !all_multiples(16, {e.out, e.weight_scale, e.weight_zero, e.bias}, 1, {})) return false;
  return all_multiples(16, {e.gate}, bytes(e.gate_dtype), {e.stride_gate.b, e.stride_gate.h}) &&
         all_multiples(16, {e.residual}, bytes(e.out_dtype), {e.stride_residual.b, e.stride_residual.h});
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
