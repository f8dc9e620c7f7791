// What the instruction-set units of the vq family offer to cpu.cpp. Plain data only: the units are compiled
// with different flags and share nothing inline.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/cpu/gemm_item.h"
#include "vdit/vq.h"

namespace vdit {

constexpr int kVqTileOut = 32, kVqTileIn = 64;
constexpr int kVqMaxDim = 16, kVqMaxCount = 8;
constexpr int kVqSumColumns = 512;      // output channels of an item of the fused loop
constexpr int kVqBlockChannels = 1024;  // input channels that it packs at a time

constexpr int kVqRowMultiple = 4;  // rows of x that multiply_rows passes at a time

// Floats from row to row of the x of multiply_rows: never a multiple of a memory page, whose rows would share
// cache sets.
constexpr int64_t vq_row_pitch(int64_t k) { return (k + kVqTileIn - 1) / kVqTileIn * kVqTileIn + 16; }

// Rows [row, row + rows) by output channels [column, column + columns).
struct VqItem {
  int64_t row = 0, column = 0;
  int32_t rows = 0, columns = 0;
};

struct VqCpuKernels {
  char const* isa;
  int block_rows;        // rows of an item of `multiply` at most
  size_t scratch_bytes;  // of multiply, per thread, aligned to 64
  size_t int8_scratch_bytes;
  // Vectors [begin, end). `codebook` has 2, 4, 8 or 16 floats a word, the least that hold p.dim, zeros past
  // it; half_norms[c] = |codebook[c]|^2 / 2.
  void (*assign)(VqAssignParams const& p, float const* codebook, float const* half_norms, int64_t begin,
                 int64_t end);
  // 32 output channels from `column` on.
  void (*dequantize)(VqDequantizeParams const& p, int64_t column);
  // The product for all rows and 32 output channels from `column` on. `x` is fp32, as widen_row writes it, a
  // multiple of kVqRowMultiple rows of vq_row_pitch(k); `words` is the codebook in fp32.
  void (*multiply_rows)(VqLinearParams const& p, float const* x, float const* words, int64_t column);
  // The product of an item; `words` as make_words writes them with `pairs`.
  void (*multiply)(VqLinearParams const& p, float const* words, VqItem const& item, void* scratch);
  // Sums of rows [begin, end) of an int8 x, and the product of an item with them. `words` is the codebook as
  // 256 words of four bytes, or 64 of two, with 128 added to each byte.
  void (*sum_rows)(VqLinearParams const& p, int64_t begin, int64_t end, int32_t* sums);
  void (*multiply_int8)(VqLinearParams const& p, uint32_t const* words, GemmItem const& item,
                        int32_t const* x_sums, void* scratch);
  // The codebook, at most 1024 words of 32 bits: fp32, or with `pairs` two bf16 a word where the unit
  // multiplies those.
  void (*make_words)(VqLinearParams const& p, bool pairs, float* words);
  // Row `row` of x in fp32, zeros from k to vq_row_pitch(k).
  void (*widen_row)(VqLinearParams const& p, int64_t row, float* out);
};

extern VqCpuKernels const kVqPortable, kVqAvx2, kVqAvx512, kVqAvx512Vnni, kVqAvx512Bf16;

}  // namespace vdit
