// A piece of the product of int8_gemm.h.
#pragma once
#include <cstdint>

namespace vdit {

constexpr int kGemmColumns = 64;  // of a panel of weights
// Rows that one filling of a panel serves: a multiple of the 6 rows of a register block.
constexpr int kGemmRows = 768;

// Rows m0 .. m0 + rows - 1 by the panel of columns that begins at n0.
struct GemmItem {
  int64_t m0, n0;
  int32_t rows;
};

}  // namespace vdit
