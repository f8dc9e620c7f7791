// What a product's sums become (vdit/epilogue.h), a row of neighbouring columns at a time. For the units that
// are compiled once an instruction set: one simd_*.h comes before.
#pragma once
#include "common/cpu/element.h"
#include "vdit/epilogue.h"

namespace vdit {
namespace {

// Elements of an array whose dtype is known at run time, kLanes or one at a time.
struct FloatArray {
  void const* base;
  DType dtype;

  Simd::Vec load(int64_t i) const {
    if (dtype == DType::kFloat32) return Simd::load(static_cast<float const*>(base) + i);
    if (dtype == DType::kFloat16) return Simd::load(static_cast<Float16 const*>(base) + i);
    return Simd::load(static_cast<BFloat16 const*>(base) + i);
  }
  float at(int64_t i) const {
    if (dtype == DType::kFloat32) return static_cast<float const*>(base)[i];
    if (dtype == DType::kFloat16) return to_float(static_cast<Float16 const*>(base)[i]);
    return to_float(static_cast<BFloat16 const*>(base)[i]);
  }
};

inline void store_lanes(void* base, DType dtype, int64_t i, Simd::Vec x) {
  if (dtype == DType::kFloat32) return Simd::store(static_cast<float*>(base) + i, x);
  if (dtype == DType::kFloat16) return Simd::store(static_cast<Float16*>(base) + i, x);
  Simd::store(static_cast<BFloat16*>(base) + i, x);
}

inline void store_one(void* base, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<Float16*>(base)[i] = from_float<Float16>(x);
  } else {
    static_cast<BFloat16*>(base)[i] = from_float<BFloat16>(x);
  }
}

// What one row brings to its outputs.
struct EpilogueRow {
  float x_scale, x_sum;
  int64_t gate = 0, residual = 0;  // offsets of its first column

  EpilogueRow(LinearEpilogue const& e, int64_t m)
      : x_scale(e.x_scale ? e.x_scale[m] : 1.f), x_sum(e.x_sum ? static_cast<float>(e.x_sum[m]) : 0.f) {
    if (e.gate == nullptr && e.residual == nullptr) return;
    int64_t const b = m / e.rows_per_batch, s = m - b * e.rows_per_batch;
    gate = b * e.stride_gate.b + s * e.stride_gate.h;
    residual = b * e.stride_residual.b + s * e.stride_residual.h;
  }
};

// a * b + y, rounded once on every instruction set.
inline float fma_once(float a, float b, float y) { return __builtin_fmaf(a, b, y); }
inline Simd::Vec fma_once(Simd::Vec a, Simd::Vec b, Simd::Vec y) {
#if defined(__FMA__)
  return Simd::fma(a, b, y);
#else
  for (int i = 0; i < Simd::kLanes; ++i) y[i] = fma_once(a[i], b[i], y[i]);
  return y;
#endif
}

inline Simd::Vec finish(LinearEpilogue const& e, EpilogueRow const& row, int64_t n, Simd::Vec y) {
  using S = Simd;
  if (e.weight_zero) y = fma_once(S::load(e.weight_zero + n), S::set1(row.x_sum), y);
  S::Vec scale = S::set1(row.x_scale);
  if (e.weight_scale) scale = S::mul(scale, S::load(e.weight_scale + n));
  y = S::mul(y, scale);
  if (e.bias) y = S::add(y, S::load(e.bias + n));
  if (e.gate) y = S::mul(y, FloatArray{e.gate, e.gate_dtype}.load(row.gate + n));
  if (e.residual) y = S::add(y, FloatArray{e.residual, e.out_dtype}.load(row.residual + n));
  return y;
}

inline float finish_one(LinearEpilogue const& e, EpilogueRow const& row, int64_t n, float y) {
  // Rounded as the vectors round it, so that a column's value does not depend on its place.
  if (e.weight_zero) y = fma_once(e.weight_zero[n], row.x_sum, y);
  y = y * (e.weight_scale ? row.x_scale * e.weight_scale[n] : row.x_scale);
  if (e.bias) y = y + e.bias[n];
  if (e.gate) y = y * FloatArray{e.gate, e.gate_dtype}.at(row.gate + n);
  if (e.residual) y = y + FloatArray{e.residual, e.out_dtype}.at(row.residual + n);
  return y;
}

typedef uint32_t SumWords __attribute__((vector_size(sizeof(Simd::Vec))));
typedef int32_t SumInts __attribute__((vector_size(sizeof(Simd::Vec))));
typedef float SumFloats __attribute__((vector_size(sizeof(Simd::Vec))));

// kLanes sums as floats. Integers lose `less` before, modulo 2^32.
inline Simd::Vec load_sums(float const* sums, uint32_t) { return Simd::load(sums); }
inline Simd::Vec load_sums(int32_t const* sums, uint32_t less) {
  SumWords words;
  std::memcpy(&words, sums, sizeof words);
  return (Simd::Vec) __builtin_convertvector((SumInts)(words - less), SumFloats);
}
inline float load_sum(float sum, uint32_t) { return sum; }
inline int32_t load_sum(int32_t sum, uint32_t less) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) - less);
}

// Finishes and stores columns n0 .. n0 + count - 1 of row m; out has n columns. Sum is int32_t, of which
// `less` is taken first, or float.
template <class Sum>
inline void store_outputs(LinearEpilogue const& e, int64_t n, int64_t m, int64_t n0, int count,
                          Sum const* sums, uint32_t less = 0) {
  int64_t const out = m * n + n0;
  if (e.raw_sums) {
    for (int i = 0; i < count; ++i)
      static_cast<int32_t*>(e.out)[out + i] = static_cast<int32_t>(load_sum(sums[i], less));
    return;
  }
  EpilogueRow const row(e, m);
  int i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes)
    store_lanes(e.out, e.out_dtype, out + i, finish(e, row, n0 + i, load_sums(sums + i, less)));
  for (; i < count; ++i)
    store_one(e.out, e.out_dtype, out + i,
              finish_one(e, row, n0 + i, static_cast<float>(load_sum(sums[i], less))));
}

}  // namespace
}  // namespace vdit
