// CPU entry points of the linear family.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu/element.h"
#include "common/cpu/parallel.h"
#include "linear/params.h"

namespace vdit {
namespace {

template <class T>
float load(void const* p, int64_t i) {
  return to_float(static_cast<T const*>(p)[i]);
}

float load_float(void const* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return load<float>(p, i);
  return dtype == DType::kFloat16 ? load<Float16>(p, i) : load<BFloat16>(p, i);
}

int32_t weight_code(LinearParams const& p, int64_t n, int64_t k) {
  if (p.format == WeightFormat::kInt8) return static_cast<int8_t const*>(p.weight)[n * p.stride_weight + k];
  int64_t const tile = (n / 32 * ((p.k + 31) / 32) + k / 32) * 512;
  int64_t const nn = n % 32, kk = k % 32;
  int64_t const lane = nn % 8 * 4 + kk % 16 / 4;
  if (p.format == WeightFormat::kTable) {
    int64_t const word = kk / 16 + 2 * (nn / 8), at = tile + lane * 16 + word * 2 + kk % 4 / 2;
    int32_t const code = static_cast<uint8_t const*>(p.weight)[at] >> (kk % 2 * 4) & (p.table_size - 1);
    return p.table[n * p.table_size + code];
  }
  int64_t const at = tile + lane * 16 + kk / 16 * 8 + nn / 8 % 2 * 4 + kk % 4;
  int32_t const shift = nn >= 16 ? 4 : 0;
  int32_t const high = static_cast<uint8_t const*>(p.weight)[at] >> shift & 15;
  if (p.format == WeightFormat::kInt4) return high;
  return 16 * high + (static_cast<uint8_t const*>(p.weight_low)[at] >> shift & 15);
}

void store(LinearParams const& p, int64_t m, int64_t n, int32_t sum) {
  LinearEpilogue const& e = p.epilogue;
  int64_t const b = m / e.rows_per_batch, s = m % e.rows_per_batch, at = m * p.n + n;
  if (e.code_offset != 0)
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(e.code_offset * e.x_sum[m]));
  if (e.raw_sums) {
    static_cast<int32_t*>(e.out)[at] = sum;
    return;
  }
  float y = static_cast<float>(sum);
  if (e.weight_zero != nullptr) y += e.weight_zero[n] * static_cast<float>(e.x_sum[m]);
  y *= (e.x_scale ? e.x_scale[m] : 1.f) * (e.weight_scale ? e.weight_scale[n] : 1.f);
  if (e.bias != nullptr) y += e.bias[n];
  if (e.gate != nullptr) y *= load_float(e.gate, e.gate_dtype, b * e.stride_gate.b + s * e.stride_gate.h + n);
  if (e.residual != nullptr)
    y += load_float(e.residual, e.out_dtype, b * e.stride_residual.b + s * e.stride_residual.h + n);
  if (e.out_dtype == DType::kFloat32) static_cast<float*>(e.out)[at] = y;
  if (e.out_dtype == DType::kFloat16) static_cast<Float16*>(e.out)[at] = from_float<Float16>(y);
  if (e.out_dtype == DType::kBFloat16) static_cast<BFloat16*>(e.out)[at] = from_float<BFloat16>(y);
}

void transform_row(QuantizeRowsParams const& p, int64_t b, int64_t s, std::vector<float>& v) {
  int64_t const k = p.channels;
  for (int64_t i = 0; i < k; ++i) v[i] = load_float(p.x, p.dtype, b * p.stride_x.b + s * p.stride_x.h + i);
  if (p.prologue == RowPrologue::kLayerNorm) {
    double sum = 0, square = 0;
    for (float const x : v) sum += x;
    double const mean = sum / k;
    for (float const x : v) square += (x - mean) * (x - mean);
    float const inv = static_cast<float>(1 / std::sqrt(square / k + p.eps));
    for (int64_t i = 0; i < k; ++i) {
      float y = (v[i] - static_cast<float>(mean)) * inv;
      if (p.norm_weight != nullptr) y *= p.norm_weight[i];
      if (p.norm_bias != nullptr) y += p.norm_bias[i];
      int64_t const scale = b * p.stride_modulation_scale.b + s * p.stride_modulation_scale.h + i;
      if (p.modulation_scale != nullptr) y *= 1.f + load_float(p.modulation_scale, p.modulation_dtype, scale);
      int64_t const shift = b * p.stride_shift.b + s * p.stride_shift.h + i;
      if (p.shift != nullptr) y += load_float(p.shift, p.modulation_dtype, shift);
      v[i] = y;
    }
  }
  for (float& x : v) {
    if (p.prologue == RowPrologue::kGelu) x = 0.5f * x * (1.f + std::erf(x * 0.70710678f));
    if (p.prologue == RowPrologue::kGeluTanh)
      x = 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  }
  if (p.channel_scale != nullptr)
    for (int64_t i = 0; i < k; ++i) v[i] *= p.channel_scale[i];
  if (p.hadamard == 0) return;
  if (p.signs != nullptr)
    for (int64_t i = 0; i < k; ++i) v[i] *= p.signs[i];
  for (int64_t base = 0; base < k; base += p.hadamard)
    for (int64_t step = 1; step < p.hadamard; step *= 2)
      for (int64_t i = 0; i < p.hadamard; ++i) {
        if (i & step) continue;
        float const x = v[base + i], y = v[base + i + step];
        v[base + i] = x + y;
        v[base + i + step] = x - y;
      }
  float const norm = 1.f / std::sqrt(static_cast<float>(p.hadamard));
  for (float& x : v) x *= norm;
}

void quantize_row(QuantizeRowsParams const& p, int64_t row, std::vector<float>& v) {
  transform_row(p, row / p.tokens, row % p.tokens, v);
  int8_t* const codes = p.codes + row * p.stride_codes;
  float amax = 0;
  bool finite = true;
  for (float const x : v) {
    finite = finite && std::isfinite(x);
    amax = std::max(amax, std::fabs(x));
  }
  bool const zero = !finite || amax < 1e-30f;
  float const inverse = zero ? 0.f : static_cast<float>(p.q_max) / amax;
  int32_t sum = 0;
  for (int64_t i = 0; i < p.stride_codes; ++i) {
    codes[i] = zero || i >= p.channels ? 0 : static_cast<int8_t>(std::nearbyint(v[i] * inverse));
    sum += codes[i];
  }
  p.scale[row] = !finite ? std::nanf("") : zero ? 0.f : amax / static_cast<float>(p.q_max);
  p.sum[row] = sum;
}

}  // namespace

void run_quantize_rows_cpu(QuantizeRowsParams const& p, ParallelFor const& parallel) {
  for_each_slice(parallel, p.batch * p.tokens, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> v(p.channels);
    for (int64_t row = begin; row < end; ++row) quantize_row(p, row, v);
  });
}

void run_linear_cpu(LinearParams const& p, ParallelFor const& parallel) {
  for_each_item(parallel, p.n, [&](int64_t n) {
    std::vector<int32_t> w(p.k);
    for (int64_t k = 0; k < p.k; ++k) w[k] = weight_code(p, n, k);
    for (int64_t m = 0; m < p.m; ++m) {
      int32_t sum = 0;
      for (int64_t k = 0; k < p.k; ++k) sum += w[k] * p.x[m * p.stride_x + k];
      store(p, m, n, sum);
    }
  });
}

void run_expand_weight_cpu(ExpandWeightParams const& e, ParallelFor const& parallel) {
  LinearParams p;
  p.weight = e.weight;
  p.weight_low = e.weight_low;
  p.table = e.table;
  p.table_size = e.table_size;
  p.format = e.format;
  p.n = e.n;
  p.k = e.k;
  int32_t const offset = e.format == WeightFormat::kNibblePlanes ? 128 : 0;
  for_each_item(parallel, e.n, [&](int64_t n) {
    int8_t* const row = e.out + n * e.stride_out;
    for (int64_t k = 0; k < e.k; ++k) row[k] = static_cast<int8_t>(weight_code(p, n, k) - offset);
    std::fill(row + e.k, row + e.stride_out, static_cast<int8_t>(0));
  });
}

}  // namespace vdit
