// Rows to integer codes, a row at a time through a buffer of floats that stays in cache.
#pragma once
#include "common/cpu/element.h"
#include "linear/params.h"

namespace vdit {
namespace {

using Vec = Simd::Vec;
constexpr int kLanes = Simd::kLanes;
constexpr int kMaxHadamard = 128;
typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

inline Vec magnitude(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }

inline float sum_lanes(Vec x) {
  float lane[kLanes], sum = 0;
  Simd::store(lane, x);
  for (float const y : lane) sum += y;
  return sum;
}

// ---- steps over a row of k floats; the buffer is zero from k up to a whole vector ----

template <class T>
inline void read_row(T const* x, int64_t k, float* row) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) Simd::store(row + i, Simd::load(x + i));
  for (; i < k; ++i) row[i] = to_float(x[i]);
  for (; i % kLanes != 0; ++i) row[i] = 0;
}

inline void read_row(void const* x, DType dtype, int64_t at, int64_t k, float* row) {
  if (dtype == DType::kFloat32) return read_row(static_cast<float const*>(x) + at, k, row);
  if (dtype == DType::kFloat16) return read_row(static_cast<Float16 const*>(x) + at, k, row);
  read_row(static_cast<BFloat16 const*>(x) + at, k, row);
}

// row = f(row, other), vector by vector; the last one scalar, since `other` ends there.
template <class Combine>
inline void combine_row(float* row, float const* other, int64_t k, Combine const& f) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) Simd::store(row + i, f(Simd::load(row + i), Simd::load(other + i)));
  if (i == k) return;
  float rest[kLanes] = {};
  for (int64_t j = i; j < k; ++j) rest[j - i] = other[j];
  Simd::store(row + i, f(Simd::load(row + i), Simd::load(rest)));
}

// A first mean, then mean and variance of the distances from it: rows far off zero keep their digits.
inline void normalize_row(float* row, int64_t k, float eps) {
  Vec sum = Simd::set1(0.f);
  for (int64_t i = 0; i < k; i += kLanes) sum = sum + Simd::load(row + i);
  float const first = sum_lanes(sum) / static_cast<float>(k);
  Vec const from = Simd::set1(first);
  Vec distance = Simd::set1(0.f), square = distance;
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec const d = Simd::load(row + i) - from;
    distance = distance + d;
    square = square + d * d;
  }
  float more = sum_lanes(distance), squares = sum_lanes(square);
  for (; i < k; ++i) {
    more += row[i] - first;
    squares += (row[i] - first) * (row[i] - first);
  }
  more /= static_cast<float>(k);
  float const moment = squares / static_cast<float>(k) - more * more;
  float const variance = moment < 0 ? 0 : moment;  // of equal numbers it may round to less; a NaN stays
  Vec const rest = Simd::set1(more), factor = Simd::set1(1.f / __builtin_sqrtf(variance + eps));
  for (i = 0; i + kLanes <= k; i += kLanes)
    Simd::store(row + i, (Simd::load(row + i) - from - rest) * factor);
  for (; i < k; ++i) row[i] = (row[i] - first - more) * factor[0];
}

constexpr float kLog2E = 1.44269504f;

// x / 2 (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun 7.1.26: 1.5e-7 off at most.
inline Vec gelu(Vec x) {
  Vec const z = magnitude(x) * 0.70710678f;
  Vec const t = 1.f / (1.f + 0.3275911f * z);
  Vec p = Simd::set1(1.061405429f);
  p = Simd::fma(p, t, Simd::set1(-1.453152027f));
  p = Simd::fma(p, t, Simd::set1(1.421413741f));
  p = Simd::fma(p, t, Simd::set1(-0.284496736f));
  p = Simd::fma(p, t, Simd::set1(0.254829592f));
  // The part of x that a Gaussian's tail beyond |x| takes.
  Vec const tail = 0.5f * p * t * Simd::exp2<true>(z * z * -kLog2E);
  Bits const negative = (Bits)x >> 31 != 0u;
  Vec const share = (Vec)(((Bits)tail & negative) | ((Bits)(1.f - tail) & ~negative));
  return x * share;
}

// x / (1 + exp(-2 u)), the exponential of a number that is not positive.
inline Vec gelu_tanh(Vec x) {
  Vec const u = 0.79788456f * (x + 0.044715f * x * x * x);
  Vec const e = Simd::exp2<true>(magnitude(u) * (-2 * kLog2E));
  Bits const negative = (Bits)u >> 31 != 0u;
  Vec const top = (Vec)(((Bits)e & negative) | ((Bits)Simd::set1(1.f) & ~negative));
  return x * (top / (1.f + e));
}

// ---- Hadamard ----

template <int kStep, int... kLane>
inline Vec swap_lanes(Vec x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kStep)...);
}

// One butterfly inside a vector: lanes i and i ^ kStep become their sum and their difference.
template <int kStep>
inline Vec butterfly(Vec x) {
  if constexpr (kStep >= kLanes) {
    return x;
  } else {
    Vec sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = (i & kStep) != 0 ? -1.f : 1.f;
    return swap_lanes<kStep>(x, std::make_integer_sequence<int, kLanes>{}) + x * sign;
  }
}

// kVecs vectors times Sylvester's matrix.
template <int kVecs>
inline void hadamard_block(float* x, Vec norm) {
  Vec v[kVecs];
  VDIT_UNROLL
  for (int i = 0; i < kVecs; ++i)
    v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(Simd::load(x + i * kLanes)))));
  VDIT_UNROLL
  for (int step = 1; step < kVecs; step *= 2) {
    VDIT_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      if (i & step) continue;
      Vec const a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
  }
  VDIT_UNROLL
  for (int i = 0; i < kVecs; ++i) Simd::store(x + i * kLanes, v[i] * norm);
}

template <int kBlock>
inline void hadamard_row(float* row, int64_t k) {
  constexpr int kVecs = kBlock / kLanes;
  Vec const norm = Simd::set1(1.f / __builtin_sqrtf(static_cast<float>(kBlock)));
  for (int64_t i = 0; i < k; i += kBlock) hadamard_block<kVecs>(row + i, norm);
}

inline void hadamard_row(float* row, int64_t k, int block) {
  if (block == 16) return hadamard_row<16>(row, k);
  if (block == 32) return hadamard_row<32>(row, k);
  if (block == 64) return hadamard_row<64>(row, k);
  hadamard_row<128>(row, k);
}

// ---- codes ----

// The largest magnitude as bits: they order as magnitudes do, infinities and NaN above every number.
inline uint32_t largest_magnitude(float const* row, int64_t k) {
  uint32_t lane[kLanes] = {};
  for (int64_t i = 0; i < k; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      uint32_t const bits = float_bits(row[i + j]) & 0x7fffffffu;
      lane[j] = bits > lane[j] ? bits : lane[j];
    }
  uint32_t most = 0;
  for (uint32_t const bits : lane) most = bits > most ? bits : most;
  return most;
}

// Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
inline int32_t write_codes(float const* row, int64_t k, float inverse, int8_t* codes) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    int8_t const code = static_cast<int8_t>(float_bits(row[i] * inverse + 12582912.f));
    codes[i] = code;
    sum += code;
  }
  return sum;
}

// row times or plus what a token's modulation says.
inline void modulate_row(QuantizeRowsParams const& p, int64_t b, int64_t s, float* row, float* other) {
  int64_t const k = p.channels;
  if (p.modulation_scale != nullptr) {
    Strides2 const stride = p.stride_modulation_scale;
    read_row(p.modulation_scale, p.modulation_dtype, b * stride.b + s * stride.h, k, other);
    combine_row(row, other, k, [](Vec x, Vec y) { return x * (1.f + y); });
  }
  if (p.shift != nullptr) {
    read_row(p.shift, p.modulation_dtype, b * p.stride_shift.b + s * p.stride_shift.h, k, other);
    combine_row(row, other, k, [](Vec x, Vec y) { return x + y; });
  }
}

inline void transform_row(QuantizeRowsParams const& p, int64_t b, int64_t s, float* row, float* other) {
  int64_t const k = p.channels;
  auto const times = [](Vec x, Vec y) { return x * y; };
  read_row(p.x, p.dtype, b * p.stride_x.b + s * p.stride_x.h, k, row);
  if (p.prologue == RowPrologue::kLayerNorm) {
    normalize_row(row, k, p.eps);
    if (p.norm_weight != nullptr) combine_row(row, p.norm_weight, k, times);
    if (p.norm_bias != nullptr) combine_row(row, p.norm_bias, k, [](Vec x, Vec y) { return x + y; });
    modulate_row(p, b, s, row, other);
  } else if (p.prologue == RowPrologue::kGelu) {
    for (int64_t i = 0; i < k; i += kLanes) Simd::store(row + i, gelu(Simd::load(row + i)));
  } else if (p.prologue == RowPrologue::kGeluTanh) {
    for (int64_t i = 0; i < k; i += kLanes) Simd::store(row + i, gelu_tanh(Simd::load(row + i)));
  }
  if (p.channel_scale != nullptr) combine_row(row, p.channel_scale, k, times);
  if (p.hadamard == 0) return;
  if (p.signs != nullptr) combine_row(row, p.signs, k, times);
  hadamard_row(row, k, p.hadamard);
}

// Rows [begin, end) of all; `space` holds two rows of k floats rounded up to whole vectors.
inline void quantize_rows(QuantizeRowsParams const& p, int64_t begin, int64_t end, float* space) {
  int64_t const k = p.channels, pitch = (k + kLanes - 1) / kLanes * kLanes;
  for (int64_t m = begin; m < end; ++m) {
    transform_row(p, m / p.tokens, m % p.tokens, space, space + pitch);
    int8_t* const codes = p.codes + m * p.stride_codes;
    uint32_t const most = largest_magnitude(space, pitch);
    float const amax = float_from_bits(most), q_max = static_cast<float>(p.q_max);
    bool const finite = most < 0x7f800000u, live = finite && amax >= 1e-30f;
    std::memset(codes + k, 0, static_cast<size_t>(p.stride_codes - k));
    if (!live) std::memset(codes, 0, static_cast<size_t>(k));
    p.sum[m] = live ? write_codes(space, k, q_max / amax, codes) : 0;
    p.scale[m] = live ? amax / q_max : finite ? 0.f : __builtin_nanf("");
  }
}

}  // namespace
}  // namespace vdit
