// Rows to int8 codes: layer norm or GELU, channel scales, block Hadamard and the quantization itself in one
// pass over the row. Bound by memory: x is read once and the codes are written once, the row lives in
// registers between.
#pragma once
#include "common/kernel_util.cuh"
#include "vdit/linear.h"

namespace vdit {

struct QuantizeRowsLaunch {
  QuantizeRowsParams p;
  bool wide_x;        // rows of x start at multiples of 16 bytes and k is a multiple of 8
  bool wide_channel;  // the same of all that comes a value a channel
};

// Reductions over a row that kLanes threads share: a warp, or the whole block. Each call needs a part of
// `slots` of its own, so that one barrier a call is enough; the sums are added in one order everywhere.
template <int kLanes>
struct RowReduction {
  static constexpr int kWarps = kLanes / 32;
  static constexpr int kCalls = 5;
  static constexpr int kSmemBytes = kWarps > 1 ? kCalls * kWarps * 4 : 0;
  uint32_t* slots;

  template <class T, class Op>
  VDIT_DEVICE T operator()(T v, Op const& op) {
    CUTE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) v = op(v, shfl_xor(v, mask));
    if constexpr (kWarps > 1) {
      if (lane_idx() == 0) slots[warp_idx()] = detail::bits_as<uint32_t>(v);
      sync_block();
      v = detail::bits_as<T>(slots[0]);
      CUTE_UNROLL
      for (int w = 1; w < kWarps; ++w) v = op(v, detail::bits_as<T>(slots[w]));
      slots += kWarps;
    }
    return v;
  }
  VDIT_DEVICE float sum(float v) {
    return (*this)(v, [](float a, float b) { return a + b; });
  }
  VDIT_DEVICE int32_t sum(int32_t v) {
    return (*this)(v, [](int32_t a, int32_t b) { return a + b; });
  }
  VDIT_DEVICE uint32_t max(uint32_t v) {
    return (*this)(v, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  }
};

// One row: eight channels at a time, from x to what is quantized.
template <class T>
struct QuantizeRow {
  QuantizeRowsLaunch const& a;
  T const* x;
  int64_t at_scale, at_shift;  // of the row in modulation_scale and shift
  float rstd = 1.f;            // layer norm's, of channels that the mean was taken off from

  VDIT_DEVICE QuantizeRow(QuantizeRowsLaunch const& launch, int64_t row) : a(launch) {
    QuantizeRowsParams const& p = a.p;
    int64_t const b = row / p.tokens, s = row - b * p.tokens;
    x = static_cast<T const*>(p.x) + b * p.stride_x.b + s * p.stride_x.h;
    at_scale = b * p.stride_modulation_scale.b + s * p.stride_modulation_scale.h;
    at_shift = b * p.stride_shift.b + s * p.stride_shift.h;
  }

  VDIT_DEVICE int count(int64_t k) const {
    int64_t const left = a.p.channels - k;
    return left < 8 ? static_cast<int>(left < 0 ? 0 : left) : 8;
  }

  VDIT_DEVICE void load(int64_t k, float (&v)[8]) const { load8(x + k, count(k), a.wide_x, v); }

  // The channels' share of the row's sum, and of the sum of squares.
  VDIT_DEVICE float sum(float const (&v)[8]) const {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
  VDIT_DEVICE void take_off(float mean, int64_t k, float (&v)[8]) const {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = i < count(k) ? v[i] - mean : 0.f;
  }
  VDIT_DEVICE static float squares(float const (&v)[8]) {
    float total = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) total += v[i] * v[i];
    return total;
  }

  // All lanes of a warp come here together: blocks of up to 128 channels are spread over 16 lanes.
  VDIT_DEVICE void transform(int64_t k, float (&v)[8]) const {
    QuantizeRowsParams const& p = a.p;
    activate(v);
    float w[8];
    if (p.norm_weight != nullptr) multiply(channel(p.norm_weight, k, w), v);
    if (p.norm_bias != nullptr) add(channel(p.norm_bias, k, w), v);
    if (p.modulation_scale != nullptr) {
      load8(p.modulation_scale, p.modulation_dtype, at_scale + k, count(k), a.wide_channel, w);
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) v[i] *= 1.f + w[i];
    }
    if (p.shift != nullptr) {
      load8(p.shift, p.modulation_dtype, at_shift + k, count(k), a.wide_channel, w);
      add(w, v);
    }
    if (p.channel_scale != nullptr) multiply(channel(p.channel_scale, k, w), v);
    if (p.hadamard > 0) {
      if (p.signs != nullptr) multiply(channel(p.signs, k, w), v);
      rotate(v);
    }
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = i < count(k) ? v[i] : 0.f;
  }

  VDIT_DEVICE void activate(float (&v)[8]) const {
    switch (a.p.prologue) {
      case RowPrologue::kNone: return;
      case RowPrologue::kLayerNorm:
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) v[i] *= rstd;
        return;
      case RowPrologue::kGelu:
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = 0.5f * v[i] * (1.f + erff(v[i] * 0.70710678f));
        return;
      case RowPrologue::kGeluTanh:
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) {
          v[i] = 0.5f * v[i] * (1.f + tanhf(0.79788456f * (v[i] + 0.044715f * v[i] * v[i] * v[i])));
        }
        return;
    }
  }

  VDIT_DEVICE float const (&channel(float const* values, int64_t k, float (&w)[8]) const)[8] {
    load8(values + k, count(k), a.wide_channel, w);
    return w;
  }
  VDIT_DEVICE static void multiply(float const (&w)[8], float (&v)[8]) {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] *= w[i];
  }
  VDIT_DEVICE static void add(float const (&w)[8], float (&v)[8]) {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] += w[i];
  }

  // Sylvester's Hadamard matrix by its butterflies: those of distance 1, 2 and 4 within the lane, the others
  // between lanes. A block's channels past k do not exist: k is a multiple of the block.
  VDIT_DEVICE void rotate(float (&v)[8]) const {
    CUTE_UNROLL
    for (int distance = 1; distance < 8; distance *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) {
        if ((i & distance) == 0) {
          float const low = v[i], high = v[i + distance];
          v[i] = low + high, v[i + distance] = low - high;
        }
      }
    }
    for (int lanes = 1; lanes < a.p.hadamard / 8; lanes *= 2) {
      bool const upper = lane_idx() & lanes;
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) {
        float const other = shfl_xor(v[i], lanes);
        v[i] = upper ? other - v[i] : v[i] + other;
      }
    }
    float const scale = 1.f / sqrtf(static_cast<float>(a.p.hadamard));
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] *= scale;
  }

  // The bits of |v|, which order as the values do, with infinities and NaNs on top.
  VDIT_DEVICE static uint32_t magnitude(float const (&v)[8]) {
    uint32_t top = 0;
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      uint32_t const bits = detail::bits_as<uint32_t>(v[i]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    return top;
  }
};

// What a row's codes are made with.
struct RowScale {
  float scale = 0.f, inverse = 0.f;
  bool zero = true;  // all codes are 0

  VDIT_DEVICE RowScale(uint32_t magnitude, int32_t q_max) {
    float const amax = detail::bits_as<float>(magnitude), levels = static_cast<float>(q_max);
    if (magnitude >= 0x7f800000u) {
      scale = NAN;
    } else if (amax >= 1e-30f) {
      scale = amax / levels, inverse = levels / amax, zero = false;
    }
  }

  // Stores eight codes, or as many as the row has room for; returns their sum.
  VDIT_DEVICE int32_t store(float const (&v)[8], int8_t* row, int64_t k, int64_t room) const {
    uint32_t words[2] = {0u, 0u};
    int32_t sum = 0;
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      int32_t const code = zero ? 0 : round_to_int(v[i] * inverse);
      sum += code;
      words[i / 4] |= (static_cast<uint32_t>(code) & 255u) << (8 * (i % 4));
    }
    if (k < room) *reinterpret_cast<uint2*>(row + k) = uint2{words[0], words[1]};
    return sum;
  }
};

// kLanes threads a row, kChunks x 8 channels a thread, all in registers. Grid: x rows, kRows a block.
template <class T, int kLanes_, int kChunks>
struct QuantizeRowsKernel {
  using Params = QuantizeRowsLaunch;
  static constexpr int kLanes = kLanes_;
  static constexpr int kThreads = kLanes < 128 ? 128 : kLanes;
  static constexpr int kRows = kThreads / kLanes;
  static constexpr int kMinBlocks = kThreads <= 128 ? 8 : (kChunks > 4 ? 512 : 1024) / kThreads;
  static constexpr int kMaxChannels = kLanes * kChunks * 8;
  static constexpr int kSmemBytes = RowReduction<kLanes>::kSmemBytes;
  static_assert(kLanes == 32 || kRows == 1, "Rows wider than a warp meet at the block's barriers.");

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    QuantizeRowsParams const& p = a.p;
    int64_t const row = static_cast<int64_t>(block_idx_x()) * kRows + thread_idx() / kLanes;
    if (row >= p.batch * p.tokens) return;
    QuantizeRow<T> line(a, row);
    RowReduction<kLanes> reduce{reinterpret_cast<uint32_t*>(smem)};
    float v[kChunks][8];
    for_each(p, v, [&](int64_t k, float (&part)[8]) { line.load(k, part); });
    if (p.prologue == RowPrologue::kLayerNorm) {
      float const channels = static_cast<float>(p.channels);
      // Twice: a mean as summed is off by its rounding, which shows where the row is far off zero.
      CUTE_UNROLL
      for (int turn = 0; turn < 2; ++turn) {
        float total = 0.f;
        for_each(p, v, [&](int64_t, float (&part)[8]) { total += line.sum(part); });
        float const mean = reduce.sum(total) / channels;
        for_each(p, v, [&](int64_t k, float (&part)[8]) { line.take_off(mean, k, part); });
      }
      float squares = 0.f;
      for_each(p, v, [&](int64_t, float (&part)[8]) { squares += line.squares(part); });
      line.rstd = 1.f / sqrtf(reduce.sum(squares) / channels + p.eps);
    }
    uint32_t magnitude = 0;
    for_each(p, v, [&](int64_t k, float (&part)[8]) {
      line.transform(k, part);
      uint32_t const mine = QuantizeRow<T>::magnitude(part);
      magnitude = mine > magnitude ? mine : magnitude;
    });
    RowScale const scale(reduce.max(magnitude), p.q_max);
    int32_t sum = 0;
    for_each(p, v, [&](int64_t k, float (&part)[8]) {
      sum += scale.store(part, p.codes + row * p.stride_codes, k, p.stride_codes);
    });
    sum = reduce.sum(sum);
    if (thread_idx() % kLanes == 0) p.scale[row] = scale.scale, p.sum[row] = sum;
  }

  // The chunks that the row has, the same number in every lane.
  template <class F>
  VDIT_DEVICE static void for_each(QuantizeRowsParams const& p, float (&v)[kChunks][8], F const& f) {
    CUTE_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      int const first = c * kLanes * 8;
      if (first < p.stride_codes) f(first + thread_idx() % kLanes * 8, v[c]);
    }
  }
};

// Rows longer than registers: read once a step. Grid: x rows.
template <class T>
struct QuantizeLongRowsKernel {
  using Params = QuantizeRowsLaunch;
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = 2;
  static constexpr int kSmemBytes = RowReduction<kThreads>::kSmemBytes;

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    QuantizeRowsParams const& p = a.p;
    int64_t const row = block_idx_x();
    QuantizeRow<T> line(a, row);
    RowReduction<kThreads> reduce{reinterpret_cast<uint32_t*>(smem)};
    float mean = 0.f, rest = 0.f;  // of the channels, and of their distances from that
    if (p.prologue == RowPrologue::kLayerNorm) {
      float const channels = static_cast<float>(p.channels);
      float total = 0.f, distances = 0.f, squares = 0.f;
      for_each(line, 0.f, 0.f, [&](int64_t, float (&v)[8]) { total += line.sum(v); });
      mean = reduce.sum(total) / channels;
      for_each(line, mean, 0.f, [&](int64_t, float (&v)[8]) { distances += line.sum(v); });
      rest = reduce.sum(distances) / channels;
      for_each(line, mean, rest, [&](int64_t, float (&v)[8]) { squares += line.squares(v); });
      line.rstd = 1.f / sqrtf(reduce.sum(squares) / channels + p.eps);
    }
    uint32_t magnitude = 0;
    for_each(line, mean, rest, [&](int64_t k, float (&v)[8]) {
      line.transform(k, v);
      uint32_t const mine = QuantizeRow<T>::magnitude(v);
      magnitude = mine > magnitude ? mine : magnitude;
    });
    RowScale const scale(reduce.max(magnitude), p.q_max);
    int32_t sum = 0;
    for_each(line, mean, rest, [&](int64_t k, float (&v)[8]) {
      line.transform(k, v);
      sum += scale.store(v, p.codes + row * p.stride_codes, k, p.stride_codes);
    });
    sum = reduce.sum(sum);
    if (thread_idx() == 0) p.scale[row] = scale.scale, p.sum[row] = sum;
  }

  template <class F>
  VDIT_DEVICE static void for_each(QuantizeRow<T> const& line, float mean, float rest, F const& f) {
    for (int64_t first = 0; first < line.a.p.stride_codes; first += kThreads * 8) {
      int64_t const k = first + thread_idx() * 8;
      float v[8];
      line.load(k, v);
      line.take_off(mean, k, v);
      line.take_off(rest, k, v);
      f(k, v);
    }
  }
};

}  // namespace vdit
