// rms_norm_rope: RMSNorm and rotary embedding of whole tokens, stored in another order where one is wanted.
//
// Bound by memory, so a thread block takes one token with all its heads:
//   - x is read once and the result written once, 4 bytes an element together for fp16 and bf16, 8 for fp32;
//     the mean of squares over all heads is taken from the registers that hold the token,
//   - a row of the tables is read once for all heads: with fp32 tables of width D, 8 bytes a channel and
//   token,
//     which is 5 % of the traffic for 40 heads of bf16 (2.5 % with tables of width D/2),
//   - the weight comes from L1 and L2.
// An index that all heads share is followed on the way in. With an index per head, tokens are still read in
// the order of x, and each head's row goes where the inverse of its index says. Gathered instead, a row of D
// = 128 in bf16 (256 bytes read, 256 written) would pull 1 KB of tables, and the norm over all heads would
// need a pass of its own, 2 bytes an element. The inverse costs 8 bytes a row of writing and reading.
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// inverse[index[i]] = i. Grid: x tiles of kThreads entries, y heads, z batch.
struct InvertIndexKernel {
  struct Params {
    int32_t const* index;
    int32_t* inverse;  // [b, h, n] contiguous
    Strides2 stride_index;
    int64_t length;
  };
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const i = static_cast<int64_t>(block_idx_x()) * kThreads + thread_idx();
    if (i >= p.length) return;
    int64_t const j = p.index[block_idx_z() * p.stride_index.b + block_idx_y() * p.stride_index.h + i];
    if (j >= 0 && j < p.length) p.inverse[map_index() * p.length + j] = static_cast<int32_t>(i);
  }
};

struct RmsNormRopeLaunch : RmsNormRopeParams {
  int32_t const* inverse = nullptr;  // [b|1, h, s] of an index per head, which is then not looked at
  Strides2 stride_inverse;
};

// Four neighbouring elements, as they lie in memory. kWide: at an address that is a multiple of their size.
template <class T, bool kWide>
VDIT_DEVICE void load_quad(T const* p, uint32_t* words) {
  if constexpr (!kWide) {
    T const quad[4] = {p[0], p[1], p[2], p[3]};
    memcpy(words, quad, sizeof(quad));
  } else if constexpr (sizeof(T) == 4) {
    uint4 const v = *reinterpret_cast<uint4 const*>(p);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    uint2 const v = *reinterpret_cast<uint2 const*>(p);
    words[0] = v.x, words[1] = v.y;
  }
}

template <class T>
VDIT_DEVICE void quad_to_floats(uint32_t const* words, float* out) {
  if constexpr (sizeof(T) == 4) {
    memcpy(out, words, 16);
  } else {
    float2 const low = unpack2<T>(words[0]), high = unpack2<T>(words[1]);
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  }
}

// Four elements of fp32, or of T, as floats.
template <class T, bool kWide>
VDIT_DEVICE void load_quad_as_floats(void const* base, bool fp32, int64_t offset, float* out) {
  uint32_t words[4];
  if (fp32) {
    load_quad<float, kWide>(static_cast<float const*>(base) + offset, words);
    quad_to_floats<float>(words, out);
  } else {
    load_quad<T, kWide>(static_cast<T const*>(base) + offset, words);
    quad_to_floats<T>(words, out);
  }
}

template <class T, bool kWide>
VDIT_DEVICE void store_quad(T* p, float const* v) {
  if constexpr (!kWide) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<T>(v[i]);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  } else {
    *reinterpret_cast<uint2*>(p) = uint2{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
  }
}

// A thread holds eight channels of a head in two quads: neighbours where pairs are neighbours, else one quad
// from either half of the head. Either way it holds four whole pairs.
template <class T, bool kInterleaved, bool kWide>
struct RmsNormRopeKernel {
  using Params = RmsNormRopeLaunch;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = kWide ? 5 : 4;  // as many as spill no register
  static constexpr int kSmemBytes = kThreads / 32 * static_cast<int>(sizeof(float));
  // Octets a thread keeps between the norm over all heads and the rest: 48 heads of D = 128 in fp16 and bf16,
  // 24 in fp32. What lies past them is read again, from L1 or L2. Eight spilled a register on 9.0.
  static constexpr int kHeld = 12 / static_cast<int>(sizeof(T));
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  // First and second channel of pair i among the eight.
  VDIT_DEVICE static constexpr int first_of(int i) { return kInterleaved ? 2 * i : i; }
  VDIT_DEVICE static constexpr int second_of(int i) { return kInterleaved ? 2 * i + 1 : i + 4; }

  struct Octet {
    uint32_t words[kWords];
  };

  // D/8 lanes a head, rounded up to a power of two: a head never straddles two warps, and its lanes reduce by
  // shuffles.
  struct Lanes {
    int lanes, heads, head, low, high;  // heads a round, this thread's first head, and where its quads begin
    bool active;

    VDIT_DEVICE explicit Lanes(int head_dim) {
      lanes = 1;
      while (lanes * 8 < head_dim) lanes *= 2;
      heads = kThreads / lanes;
      head = thread_idx() / lanes;
      int const lane = thread_idx() % lanes;
      active = lane * 8 < head_dim;
      low = kInterleaved ? 8 * lane : 4 * lane;
      high = kInterleaved ? low + 4 : low + head_dim / 2;
    }
  };

  struct Angles {
    float cos[8], sin[8];  // in the order of an octet
  };

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const b = block_idx_y(), slot = block_idx_x();
    int64_t const token = source_token(p, b, slot);
    if (token < 0) return;
    Lanes const at(p.head_dim);
    int const rounds = static_cast<int>((p.heads + at.heads - 1) / at.heads);
    T const* x = static_cast<T const*>(p.x) + b * p.stride_x.b + token * p.stride_x.s;
    int64_t const turn = token - p.rope_start;
    bool const rotates = turn >= 0 && turn < p.rope_rows;

    Angles angles;
    if (rotates) load_angles(p, at, b, at.head, turn, angles);
    Octet held[kHeld];
    float inv_rms = 1.f;
    bool const across = p.norm && p.across_heads;
    if (across) {
      float sum = 0.f;
      // From the last heads to the first, which are still held when the second look begins with them.
      for (int round = (rounds - 1) / kHeld * kHeld; round >= 0; round -= kHeld) {
        load_octets(p, at, x, round, held);
        CUTE_UNROLL
        for (int r = 0; r < kHeld; ++r) sum += squares(held[r]);
      }
      inv_rms = inverse_rms(block_sum(sum, smem), p.heads * p.head_dim, p.eps);
    }

    for (int round = 0; round < rounds; round += kHeld) {
      if (round > 0 || !across) load_octets(p, at, x, round, held);
      CUTE_UNROLL
      for (int r = 0; r < kHeld; ++r) {
        if (round + r >= rounds) break;
        if (p.norm && !across) inv_rms = inverse_rms(head_sum(squares(held[r]), at.lanes), p.head_dim, p.eps);
        int64_t const h = at.head + static_cast<int64_t>(round + r) * at.heads;
        if (!at.active || h >= p.heads) continue;
        float v[8];
        to_floats(held[r], v);
        if (p.norm) scale(p, at, h, inv_rms, v);
        if (rotates) {
          if (p.stride_cos.h + p.stride_sin.h != 0 && round + r > 0) load_angles(p, at, b, h, turn, angles);
          rotate(angles, v);
        }
        store(p, at, b, h, slot, v);
      }
    }
  }

  // The token that this block reads; -1 where the index leaves the tensor.
  VDIT_DEVICE static int64_t source_token(Params const& p, int64_t b, int64_t slot) {
    if (p.index == nullptr || p.inverse != nullptr) return slot;
    int64_t const token = p.index[b * p.stride_index.b + slot];
    return token >= 0 && token < p.seqlen ? token : -1;
  }

  VDIT_DEVICE static void load_octets(Params const& p, Lanes const& at, T const* x, int round,
                                      Octet (&held)[kHeld]) {
    CUTE_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      CUTE_UNROLL
      for (int w = 0; w < kWords; ++w) held[r].words[w] = 0;
      int64_t const h = at.head + static_cast<int64_t>(round + r) * at.heads;
      if (!at.active || h >= p.heads) continue;
      T const* row = x + h * p.stride_x.h;
      if constexpr (kWide && kInterleaved && sizeof(T) == 2) {
        uint4 const v = *reinterpret_cast<uint4 const*>(row + at.low);
        held[r].words[0] = v.x, held[r].words[1] = v.y, held[r].words[2] = v.z, held[r].words[3] = v.w;
      } else {
        load_quad<T, kWide>(row + at.low, held[r].words);
        load_quad<T, kWide>(row + at.high, held[r].words + kWords / 2);
      }
    }
  }

  VDIT_DEVICE static void load_angles(Params const& p, Lanes const& at, int64_t b, int64_t h, int64_t turn,
                                      Angles& angles) {
    if (!at.active || h >= p.heads) return;
    load_angle(p, at, p.cos, b * p.stride_cos.b + h * p.stride_cos.h + turn * p.stride_cos.s, angles.cos);
    load_angle(p, at, p.sin, b * p.stride_sin.b + h * p.stride_sin.h + turn * p.stride_sin.s, angles.sin);
  }

  VDIT_DEVICE static void load_angle(Params const& p, Lanes const& at, void const* table, int64_t row,
                                     float (&out)[8]) {
    bool const fp32 = p.rope_dtype == DType::kFloat32;
    if (p.rope_width == p.head_dim) {
      load_quad_as_floats<T, kWide>(table, fp32, row + at.low, out);
      load_quad_as_floats<T, kWide>(table, fp32, row + at.high, out + 4);
      return;
    }
    float pair[4];  // four pairs in a row, in either form
    load_quad_as_floats<T, kWide>(table, fp32, row + (kInterleaved ? at.low / 2 : at.low), pair);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) out[first_of(i)] = out[second_of(i)] = pair[i];
  }

  VDIT_DEVICE static void to_floats(Octet const& octet, float (&v)[8]) {
    quad_to_floats<T>(octet.words, v);
    quad_to_floats<T>(octet.words + kWords / 2, v + 4);
  }

  VDIT_DEVICE static float squares(Octet const& octet) {
    float v[8], sum = 0.f;
    to_floats(octet, v);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    return sum;
  }

  // Sums are the same in every lane and do not depend on timing.
  VDIT_DEVICE static float head_sum(float v, int lanes) {
    for (int step = 1; step < lanes; step *= 2) v += shfl_xor(v, step);
    return v;
  }

  VDIT_DEVICE static float block_sum(float v, char* smem) {
    float* partial = reinterpret_cast<float*>(smem);
    v = head_sum(v, 32);
    if (lane_idx() == 0) partial[warp_idx()] = v;
    sync_block();
    float sum = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[w];
    return sum;
  }

  VDIT_DEVICE static float inverse_rms(float sum, int64_t count, float eps) {
    return 1.f / sqrtf(sum / static_cast<float>(count) + eps);
  }

  VDIT_DEVICE static void scale(Params const& p, Lanes const& at, int64_t h, float inv_rms, float (&v)[8]) {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] *= inv_rms;
    if (p.weight == nullptr) return;
    bool const fp32 = p.weight_dtype == DType::kFloat32;
    float weight[8];
    load_quad_as_floats<T, kWide>(p.weight, fp32, h * p.stride_weight_h + at.low, weight);
    load_quad_as_floats<T, kWide>(p.weight, fp32, h * p.stride_weight_h + at.high, weight + 4);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] *= weight[i];
  }

  VDIT_DEVICE static void rotate(Angles const& angles, float (&v)[8]) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      int const j = first_of(i), k = second_of(i);
      float const a = v[j], c = v[k];
      v[j] = a * angles.cos[j] - c * angles.sin[j];
      v[k] = c * angles.cos[k] + a * angles.sin[k];
    }
  }

  VDIT_DEVICE static void store(Params const& p, Lanes const& at, int64_t b, int64_t h, int64_t slot,
                                float const (&v)[8]) {
    int64_t row = slot;
    if (p.inverse != nullptr) row = p.inverse[b * p.stride_inverse.b + h * p.stride_inverse.h + slot];
    if (row < 0 || row >= p.seqlen) return;  // an entry that no index has named holds anything
    T* out = static_cast<T*>(p.out) + b * p.stride_out.b + h * p.stride_out.h + row * p.stride_out.s;
    if constexpr (kWide && kInterleaved && sizeof(T) == 2) {
      store_floats<T, 8>(out + at.low, v);
    } else {
      store_quad<T, kWide>(out + at.low, v);
      store_quad<T, kWide>(out + at.high, v + 4);
    }
  }
};

}  // namespace vdit
