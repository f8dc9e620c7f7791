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

// The columns' element of row `m` in a gate or a residual. NOTE: divides in 32 bits, which launchers make sure of: the
// 64-bit division is a call of some hundred instructions, around which registers of sums would be spilled.
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

// Finishes and stores row m, columns n0 .. n0 + count - 1 of [m, n]; Sum is int32_t or float. `wide`: as
// epilogue_is_wide (launch_util.cuh) said, and then n0 is a multiple of 8.
template <class Sum>
VDIT_DEVICE void store_outputs(LinearEpilogue const& e, EpilogueColumns const& columns, int64_t m, int64_t n,
                               int64_t n0, int count, bool wide, Sum const (&sums)[8]) {
  float const x_scale = e.x_scale == nullptr ? 1.f : e.x_scale[m];
  int32_t const x_sum = e.x_sum == nullptr ? 0 : e.x_sum[m];
  if constexpr (std::is_same<Sum, int32_t>::value) {
    if (e.raw_sums) return store_raw_sums(static_cast<int32_t*>(e.out) + m * n + n0, count, wide, sums);
  }
  float y[8];
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) {
    float const whole = static_cast<float>(sums[i]) + columns.zero[i] * static_cast<float>(x_sum);
    y[i] = whole * (x_scale * columns.scale[i]) + columns.bias[i];
  }
  float other[8];
  if (e.gate != nullptr) {
    load8(e.gate, e.gate_dtype, epilogue_offset(e, e.stride_gate, m) + n0, count, wide, other);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) y[i] *= other[i];
  }
  if (e.residual != nullptr) {
    load8(e.residual, e.out_dtype, epilogue_offset(e, e.stride_residual, m) + n0, count, wide, other);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) y[i] += other[i];
  }
  store8(e.out, e.out_dtype, m * n + n0, count, wide, y);
}

}  // namespace vdit
