// What a product's sums become (vdit/epilogue.h), a row and eight neighbouring columns at a time.
#pragma once
#include "common/kernel_util.cuh"
#include "vdit/epilogue.h"

namespace vdit {

// What the columns n0 .. n0 + count - 1 bring, count at most 8. Read once, used for many rows.
struct EpilogueColumns {
  float scale[8], zero[8], bias[8];

  VDIT_DEVICE EpilogueColumns(LinearEpilogue const& e, int64_t n0, int count, bool wide) {
    load_or_fill(e.weight_scale, n0, count, wide, 1.f, scale);
    load_or_fill(e.weight_zero, n0, count, wide, 0.f, zero);
    load_or_fill(e.bias, n0, count, wide, 0.f, bias);
  }

  VDIT_DEVICE static void load_or_fill(float const* p, int64_t n0, int count, bool wide, float without,
                                       float (&v)[8]) {
    if (p != nullptr && count > 0) return load8(p + n0, count, wide, v);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = without;
  }
};

// An epilogue as kernels take it, for m rows below 2^31: a batch then fits 32 bits, as epilogue_offset wants.
inline LinearEpilogue epilogue_of_rows(LinearEpilogue e, int64_t m) {
  if (e.rows_per_batch > m) e.rows_per_batch = m;
  return e;
}

// The columns' element of row `m` in a gate or a residual. NOTE: divides in 32 bits, because the 64-bit
// division is a call of some hundred instructions, around which registers of sums would be spilled.
VDIT_DEVICE int64_t epilogue_offset(LinearEpilogue const& e, Strides2 const& stride, int64_t m) {
  uint32_t const row = static_cast<uint32_t>(m), rows = static_cast<uint32_t>(e.rows_per_batch);
  uint32_t const b = row / rows;
  return static_cast<int64_t>(b) * stride.b + static_cast<int64_t>(row - b * rows) * stride.h;
}

VDIT_DEVICE void store_raw_sums(int32_t* out, int count, bool wide, int32_t const (&sums)[8]) {
  if (wide && count > 0) {
    *reinterpret_cast<int4*>(out) = int4{sums[0], sums[1], sums[2], sums[3]};
    *reinterpret_cast<int4*>(out + 4) = int4{sums[4], sums[5], sums[6], sums[7]};
  } else {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i < count) out[i] = sums[i];
    }
  }
}

// Eight neighbouring values of a gate or a residual as they lie in memory: two of a two-byte type a word, or
// one.
struct RawColumns {
  uint32_t word[8];
};

VDIT_DEVICE RawColumns load_raw_columns(void const* base, DType dtype, int64_t at, int count, bool wide) {
  RawColumns raw = {};
  bool const words = dtype == DType::kFloat32;
  if (wide && count > 0) {
    char const* const p = static_cast<char const*>(base) + at * (words ? 4 : 2);
    uint4 const first = *reinterpret_cast<uint4 const*>(p);
    raw.word[0] = first.x, raw.word[1] = first.y, raw.word[2] = first.z, raw.word[3] = first.w;
    if (words) {
      uint4 const second = *reinterpret_cast<uint4 const*>(p + 16);
      raw.word[4] = second.x, raw.word[5] = second.y, raw.word[6] = second.z, raw.word[7] = second.w;
    }
    return raw;
  }
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i >= count) continue;
    if (words) {
      raw.word[i] = static_cast<uint32_t const*>(base)[at + i];
    } else {
      raw.word[i / 2] |= static_cast<uint32_t>(static_cast<uint16_t const*>(base)[at + i]) << (i % 2 * 16);
    }
  }
  return raw;
}

VDIT_DEVICE void unpack_columns(RawColumns const& raw, DType dtype, float (&v)[8]) {
  CUTE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    float2 const pair = dtype == DType::kFloat16 ? unpack2<cute::half_t>(raw.word[i / 2])
                                                 : unpack2<cute::bfloat16_t>(raw.word[i / 2]);
    bool const words = dtype == DType::kFloat32;
    v[i] = words ? detail::bits_as<float>(raw.word[i]) : pair.x;
    v[i + 1] = words ? detail::bits_as<float>(raw.word[i + 1]) : pair.y;
  }
}

// What row m brings to the columns n0 .. n0 + count - 1. Apart from finish_outputs, so that the loads of
// several rows are on their way at a time. `wide`: as epilogue_is_wide (launch_util.cuh) said, and then n0 is
// a multiple of 8.
struct EpilogueRow {
  float x_scale = 1.f;
  int32_t x_sum = 0;
  RawColumns gate, residual;

  VDIT_DEVICE EpilogueRow(LinearEpilogue const& e, int64_t m, int64_t n0, int count, bool wide) {
    if (count <= 0 || e.raw_sums) return;
    if (e.x_scale != nullptr) x_scale = e.x_scale[m];
    if (e.x_sum != nullptr) x_sum = e.x_sum[m];
    if (e.gate != nullptr) {
      gate = load_raw_columns(e.gate, e.gate_dtype, epilogue_offset(e, e.stride_gate, m) + n0, count, wide);
    }
    if (e.residual != nullptr) {
      residual = load_raw_columns(e.residual, e.out_dtype, epilogue_offset(e, e.stride_residual, m) + n0,
                                  count, wide);
    }
  }
};

// Finishes and stores row m, columns n0 .. n0 + count - 1 of [m, n]; Sum is int32_t or float. One rounding an
// operation and no other fusing than the zero point's, as on the CPU: every kernel and path gives the same
// bits.
template <class Sum>
VDIT_DEVICE void finish_outputs(LinearEpilogue const& e, EpilogueColumns const& columns,
                                EpilogueRow const& row, int64_t m, int64_t n, int64_t n0, int count,
                                bool wide, Sum const (&sums)[8]) {
  if (count <= 0) return;
  if constexpr (std::is_same<Sum, int32_t>::value) {
    if (e.raw_sums) return store_raw_sums(static_cast<int32_t*>(e.out) + m * n + n0, count, wide, sums);
  }
  float y[8];
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) {
    float const whole = fmaf(columns.zero[i], static_cast<float>(row.x_sum), static_cast<float>(sums[i]));
    y[i] = add_rn(mul_rn(whole, row.x_scale * columns.scale[i]), columns.bias[i]);
  }
  float other[8];
  if (e.gate != nullptr) {
    unpack_columns(row.gate, e.gate_dtype, other);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = mul_rn(y[i], other[i]);
  }
  if (e.residual != nullptr) {
    unpack_columns(row.residual, e.out_dtype, other);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = add_rn(y[i], other[i]);
  }
  store8(e.out, e.out_dtype, m * n + n0, count, wide, y);
}

template <class Sum>
VDIT_DEVICE void store_outputs(LinearEpilogue const& e, EpilogueColumns const& columns, int64_t m, int64_t n,
                               int64_t n0, int count, bool wide, Sum const (&sums)[8]) {
  EpilogueRow const row(e, m, n0, count, wide);
  finish_outputs(e, columns, row, m, n, n0, count, wide, sums);
}

}  // namespace vdit
