// What every backend of the family checks before it fills a launch struct.
#pragma once
#include "common/op_epilogue.h"
#include "vq/params.h"

namespace vdit {

inline constexpr int64_t kMaxVqChannels = 65536;  // 128 * 128 * 65,536 is below 2^31
inline constexpr int64_t kMaxCodewords = 65536;

inline bool is_laid_out(Tensor const& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.size(i) > 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

inline void check_contiguous(char const* op, char const* name, Tensor const& t) {
  VDIT_CHECK(t.numel() == 0 || is_laid_out(t), op, name, " must be contiguous; call .contiguous() on it");
}

inline void check_sizes(char const* op, int64_t n, int64_t k) {
  VDIT_CHECK(n >= 0, op, "out_features must be at least 0, got ", n);
  VDIT_CHECK(k >= 1 && k <= kMaxVqChannels, op, "there must be 1 to ", kMaxVqChannels, " input channels, got ", k);
}

// Tiles of a weight [n, k]; their size tells the format.
inline VqFormat check_codes(char const* op, Tensor const& codes, int64_t n, int64_t k) {
  check_dtype(op, "codes", codes, ScalarType::Byte);
  int64_t const rows = (n + 31) / 32, columns = (k + 63) / 64;
  bool const tiles = codes.dim() == 3 && (codes.size(2) == 512 || codes.size(2) == 768);
  VDIT_CHECK(tiles && codes.size(0) == rows && codes.size(1) == columns, op, "codes must be [", rows, ", ", columns,
             ", 512] (256 words of 4) or [", rows, ", ", columns, ", 768] (64 words of 2) for a weight [", n, ", ", k,
             "], got ", shape_of(codes), "; pack_vq makes them");
  check_contiguous(op, "codes", codes);
  return codes.size(2) == 512 ? VqFormat::k256x4 : VqFormat::k64x2;
}

inline void check_codebook(char const* op, Tensor const& codebook, VqFormat format, Tensor const& like) {
  check_same_device(op, "codebook", codebook, like);
  ScalarType const type = codebook.scalar_type();
  VDIT_CHECK(is_float(type) || type == ScalarType::Char, op,
             "codebook must be float32, float16, bfloat16 or int8, got ", dtype_name(type));
  bool const quads = format == VqFormat::k256x4;
  int64_t const words = quads ? 256 : 64, dim = quads ? 4 : 2;
  VDIT_CHECK(codebook.dim() == 2 && codebook.size(0) == words && codebook.size(1) == dim, op, "codebook must be [",
             words, ", ", dim, "] for tiles of ", quads ? 512 : 768, " bytes, got ", shape_of(codebook));
  check_contiguous(op, "codebook", codebook);
}

// The CUDA kernels read both 16 bytes at a time.
inline void check_vq_addresses(char const* op, Tensor const& codes, Tensor const& codebook) {
  for (auto [name, t] : {std::pair{"codes", &codes}, {"codebook", &codebook}})
    VDIT_CHECK(t->numel() == 0 || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0, op, name,
               " must begin at an address divisible by 16 on CUDA; clone it");
}

}  // namespace vdit
