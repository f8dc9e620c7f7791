// What a linear layer does with its sums before it stores them; shared by the linear and the vq family.
#pragma once
#include <cstdint>

#include "vdit/types.h"

namespace vdit {

// For row m (batch m / rows_per_batch, token m % rows_per_batch) and column n, with sum(m, n) the exact int32 sum
// of products of activation codes and weight codes, all in fp32 and in this order:
//
//   y = (sum + weight_zero[n] * x_sum[m]) * (x_scale[m] * weight_scale[n]) + bias[n]
//   y = y * gate[b, s, n]             where there is a gate
//   y = y + residual[b, s, n]         where there is a residual
//
// then rounded to out_dtype. With raw_sums out is int32 [m, n], the sums themselves, and nothing else is read.
// A float product (vq_linear on fp16 or bf16) has neither x_scale nor weight_zero; null scales count as 1.
struct LinearEpilogue {
  float const* x_scale = nullptr;       // [m] or null
  int32_t const* x_sum = nullptr;       // [m], sums of the activation codes; may be null without weight_zero
  float const* weight_scale = nullptr;  // [n] or null
  float const* weight_zero = nullptr;   // [n] or null
  float const* bias = nullptr;          // [n] or null
  void const* gate = nullptr;           // [b|1, s|1, n] or null
  void const* residual = nullptr;       // [b, s, n] of out_dtype, or null
  void* out = nullptr;                  // [m, n] contiguous
  Strides2 stride_gate;                 // in elements over batch and token, 0 where it broadcasts
  Strides2 stride_residual;
  int64_t rows_per_batch = 1;
  DType gate_dtype = DType::kFloat32;
  DType out_dtype = DType::kBFloat16;
  bool raw_sums = false;
};

}  // namespace vdit
