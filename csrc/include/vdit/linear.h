// Launch structs of the linear family: what every backend (cpu, sm80, sm90) is called with.
//
// Shapes: m rows (b batch times s tokens), k input channels, n output channels. Index arithmetic is 64-bit.
#pragma once
#include <cstdint>

#include "vdit/epilogue.h"
#include "vdit/types.h"

namespace vdit {

enum class RowPrologue : int32_t { kNone = 0, kLayerNorm = 1, kGelu = 2, kGeluTanh = 3 };

// Rows to integer codes, each row with a scale of its own. In this order, in fp32:
//   1. prologue: layer norm without or with weight and bias over k, then * (1 + modulation_scale) + shift; or GELU
//   2. * channel_scale
//   3. block-diagonal Hadamard: every `hadamard` channels times signs, then times H / sqrt(hadamard)
//   4. amax = max |row|, scale = amax / q_max, codes = round-half-to-even(row * (q_max / amax)), sum = sum of codes
// A row with amax below 1e-30 gets codes, scale and sum 0. A row with a NaN or an infinity gets codes and sum 0 and
// the scale NaN, so that its outputs are NaN.
struct QuantizeRowsParams {
  void const* x = nullptr;                  // [b, s, k]
  float const* norm_weight = nullptr;       // [k] or null
  float const* norm_bias = nullptr;         // [k] or null
  void const* modulation_scale = nullptr;   // [b|1, s|1, k] or null, of modulation_dtype
  void const* shift = nullptr;              // likewise
  float const* channel_scale = nullptr;     // [k] or null
  float const* signs = nullptr;             // [k] of +1 and -1, or null for all +1
  int8_t* codes = nullptr;                  // [b, s, k]; columns k .. stride_codes are set to 0
  float* scale = nullptr;                   // [b, s] contiguous
  int32_t* sum = nullptr;                   // [b, s] contiguous
  Strides2 stride_x;                        // in elements, over batch and token
  Strides2 stride_modulation_scale, stride_shift;  // 0 where they broadcast
  int64_t stride_codes = 0;                 // from row to row, a multiple of 16, at least k
  int64_t batch = 0, tokens = 0, channels = 0;
  int32_t hadamard = 0;                     // 0, or a power of two from 16 to 128 that divides k
  int32_t q_max = 127;                      // 2^(bits-1) - 1
  float eps = 1e-6f;
  RowPrologue prologue = RowPrologue::kNone;
  DType dtype = DType::kFloat32;            // of x
  DType modulation_dtype = DType::kFloat32;
};

// How weight codes lie in memory. Tiles are stored [n/32, k/32 or k/64, bytes], both counts rounded up; what lies past
// n and k is 0 and never changes a result.
enum class WeightFormat : int32_t {
  // int8 [n, k], rows of stride_weight bytes.
  kInt8 = 0,
  // Codes 0 to 15. 32 x 32 tiles (n, k) of 512 bytes: lane l = 0..31 owns bytes 16 l to 16 l + 15; byte j holds
  // k = 16 (j / 8) + 4 (l % 4) + j % 4 and, in its low nibble, n = 8 (j / 4 % 2) + l / 4, in its high nibble n + 16.
  kInt4 = 1,
  // Two planes in the layout of kInt4: code = 16 high + low - 128, -128 to 127.
  kNibblePlanes = 2,
  // Codes 0 to 15 (bit 3 is the sign) or 0 to 7 that index a row of `table`. 32 x 32 tiles of 512 bytes: lane l owns
  // bytes 16 l to 16 l + 15 as eight little-endian 16-bit words; word h = k_half + 2 n_sub holds four codes, code t in
  // bits 4 t to 4 t + 3: k = 16 k_half + 4 (l % 4) + t, n = 8 n_sub + l / 4.
  kTable = 3,
};

// out = epilogue(x weight^T), the sums exact in int32 (k is at most 65,536).
struct LinearParams {
  int8_t const* x = nullptr;            // [m, k], rows of stride_x bytes, zero from k up to the next multiple of 16
  void const* weight = nullptr;         // as `format` says; the high plane of kNibblePlanes
  void const* weight_low = nullptr;     // kNibblePlanes only
  int8_t const* table = nullptr;        // kTable only: [n, table_size]
  int64_t stride_x = 0;
  int64_t stride_weight = 0;            // kInt8 only
  int64_t m = 0, n = 0, k = 0;
  int32_t table_size = 0;               // 8 (three bits) or 16 (four)
  WeightFormat format = WeightFormat::kInt8;
  LinearEpilogue epilogue;
};

// Weight codes as int8 [n, k] with rows of stride_out bytes, zero from k on: what kInt8 takes. kInt4 and
// kNibblePlanes give the codes as they are, kTable the table's entries.
struct ExpandWeightParams {
  void const* weight = nullptr;
  void const* weight_low = nullptr;
  int8_t const* table = nullptr;
  int8_t* out = nullptr;
  int64_t stride_out = 0;
  int64_t n = 0, k = 0;
  int32_t table_size = 0;
  WeightFormat format = WeightFormat::kInt4;
};

void run_quantize_rows_cpu(QuantizeRowsParams const& p, ParallelFor const& parallel);
void run_linear_cpu(LinearParams const& p, ParallelFor const& parallel);
void run_expand_weight_cpu(ExpandWeightParams const& p, ParallelFor const& parallel);

// `stream` is a cudaStream_t, passed as void* so that this header needs no CUDA.
void run_quantize_rows_sm80(QuantizeRowsParams const& p, void* stream);
void run_linear_sm80(LinearParams const& p, void* stream);
void run_expand_weight_sm80(ExpandWeightParams const& p, void* stream);

// Compute capability 9.0 only (wgmma, TMA). `can_run` says whether shapes, strides and addresses suit, `is_faster`
// whether rows are enough for its tiles on the current device: with few of them run_linear_sm80 is the better one.
bool can_run_linear_sm90(LinearParams const& p);
bool is_linear_sm90_faster(LinearParams const& p);
void run_linear_sm90(LinearParams const& p, void* stream);

}  // namespace vdit
