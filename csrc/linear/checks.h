// What every backend of the family checks before it fills a launch struct.
#pragma once
#include <cmath>

#include "common/op_epilogue.h"
#include "linear/params.h"

namespace vdit {

inline constexpr int64_t kMaxLinearChannels = 65536;  // 128 * 255 * 65,536 is below 2^31

inline void check_channels(char const* op, int64_t k, bool cuda) {
  VDIT_CHECK(k >= 1 && k <= kMaxLinearChannels, op, "x must have 1 to ", kMaxLinearChannels,
             " channels, so that int32 sums are exact, got ", k);
  VDIT_CHECK(!cuda || k % 16 == 0, op, "the channels of x must be a multiple of 16 on CUDA, got ", k,
             "; pad x and the weight with zeros");
}

// What the CUDA kernels load `bytes` at a time. The CPU takes every address, as that of a file that is mapped.
inline void check_address(char const* op, char const* name, Tensor const& t, int bytes, bool cuda) {
  VDIT_CHECK(!cuda || t.numel() == 0 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0, op, name,
             " must begin at an address divisible by ", bytes, " on CUDA; clone it");
}

// Tiles of 32 x 32 codes, 512 bytes each.
inline void check_weight_tiles(char const* op, char const* name, Tensor const& t, int64_t n, int64_t k,
                               Tensor const& like, bool cuda) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, ScalarType::Byte);
  int64_t const rows = (n + 31) / 32, columns = (k + 31) / 32;
  VDIT_CHECK(t.dim() == 3 && t.size(0) == rows && t.size(1) == columns && t.size(2) == 512, op, name, " must be [",
             rows, ", ", columns, ", 512] for ", n, " by ", k, " codes, got ", shape_of(t));
  VDIT_CHECK(t.numel() == 0 || (t.stride(2) == 1 && (columns == 1 || t.stride(1) == 512) &&
                                (rows == 1 || t.stride(0) == columns * 512)),
             op, name, " must be contiguous; call .contiguous() on it");
  check_address(op, name, t, 16, cuda);
}

// [n, 16] for codes of four bits, [n, 8] for three.
inline int32_t check_code_table(char const* op, Tensor const& t, int64_t n, Tensor const& like, bool cuda) {
  check_same_device(op, "table", t, like);
  check_dtype(op, "table", t, ScalarType::Char);
  VDIT_CHECK(t.dim() == 2 && t.size(0) == n && (t.size(1) == 8 || t.size(1) == 16), op, "table must be [", n,
             ", 16] (four bits) or [", n, ", 8] (three), got ", shape_of(t));
  VDIT_CHECK(t.numel() == 0 || (t.stride(1) == 1 && (n == 1 || t.stride(0) == t.size(1))), op,
             "table must be contiguous; call .contiguous() on it");
  check_address(op, "table", t, 8, cuda);
  return static_cast<int32_t>(t.size(1));
}

inline RowPrologue check_prologue(char const* op, std::string const& name) {
  if (name == "none") return RowPrologue::kNone;
  if (name == "layer_norm") return RowPrologue::kLayerNorm;
  if (name == "gelu") return RowPrologue::kGelu;
  VDIT_CHECK(name == "gelu_tanh", op, "prologue must be none, layer_norm, gelu or gelu_tanh, got ", name);
  return RowPrologue::kGeluTanh;
}

inline void check_path(char const* op, std::string const& path) {
  VDIT_CHECK(path == "auto" || path == "fused" || path == "expand", op, "path must be auto, fused or expand, got ",
             path);
}

// The kernels leave NaN as the scale of a row that has no codes.
inline void check_rows_were_finite(char const* op, Tensor const& given) {
  Tensor const scale = to_cpu(given);
  float const* const value = scale.const_data_ptr<float>();
  for (int64_t i = 0; i < scale.numel(); ++i)
    VDIT_CHECK(!std::isnan(value[i]), op, "x must be finite before it is quantized, got a NaN or an infinity in row ",
               i, "; look at the layer before");
}

// The products trust x_sum, which quantize_rows returns: a stale one gives wrong outputs and nothing else. Checking it
// reads x once more, and on a GPU waits for it, so it is done on request.
inline void check_x_sum(char const* op, Tensor const& x, int64_t k, Tensor const& x_sum) {
  Tensor const codes = to_cpu(torch::stable::contiguous(x)), given = to_cpu(x_sum);
  int8_t const* row = codes.const_data_ptr<int8_t>();
  int32_t const* const sums = given.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < given.numel(); ++i, row += k) {
    int32_t sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += row[c];
    VDIT_CHECK(sums[i] == sum, op, "x_sum must be the sums of x's codes, got ", sums[i], " for row ", i,
               ", which sums to ", sum, "; quantize_rows returns it");
  }
}

}  // namespace vdit
