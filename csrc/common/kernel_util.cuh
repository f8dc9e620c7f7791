// What kernels of every family share: vectors of 16 bytes seen as floats, and how a thread block is cut into
// rows and column chunks.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "vdit/types.h"

namespace vdit {

// Elements of T in 16 bytes.
template <class T>
inline constexpr int kVecOf = static_cast<int>(16 / sizeof(T));

// kVec is 1, or kVecOf<T> when `p` is 16-byte aligned.
template <class T, int kVec>
VDIT_DEVICE void load_floats(T const* p, float (&out)[kVec]) {
  static_assert(kVec == 1 || kVec == kVecOf<T>, "kVec is one element or 16 bytes.");
  if constexpr (kVec == 1) {
    out[0] = static_cast<float>(*p);
  } else if constexpr (sizeof(T) == 4) {
    float4 const v = *reinterpret_cast<float4 const*>(p);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
    uint4 const v = *reinterpret_cast<uint4 const*>(p);
    uint32_t const words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
      float2 const pair = unpack2<T>(words[i]);
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int kVec>
VDIT_DEVICE void store_floats(T* p, float const (&v)[kVec]) {
  static_assert(kVec == 1 || kVec == kVecOf<T>, "kVec is one element or 16 bytes.");
  if constexpr (kVec == 1) {
    *p = static_cast<T>(v[0]);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  } else {
    *reinterpret_cast<uint4*>(p) =
        uint4{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])};
  }
}

// Eight neighbouring values as floats, those from `count` on 0. `wide`: count is 8 or at most 0, and p is
// aligned to 16 bytes.
template <class T>
VDIT_DEVICE void load8(T const* p, int count, bool wide, float (&v)[8]) {
  if (wide && count > 0) {
    CUTE_UNROLL
    for (int i = 0; i < 8; i += kVecOf<T>) {
      float part[kVecOf<T>];
      load_floats<T, kVecOf<T>>(p + i, part);
      CUTE_UNROLL
      for (int j = 0; j < kVecOf<T>; ++j) v[i + j] = part[j];
    }
  } else {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = i < count ? static_cast<float>(p[i]) : 0.f;
  }
}

// The same from element `at` of an array whose dtype is known at run time.
VDIT_DEVICE void load8(void const* base, DType dtype, int64_t at, int count, bool wide, float (&v)[8]) {
  if (dtype == DType::kFloat32) return load8(static_cast<float const*>(base) + at, count, wide, v);
  if (dtype == DType::kFloat16) return load8(static_cast<cute::half_t const*>(base) + at, count, wide, v);
  load8(static_cast<cute::bfloat16_t const*>(base) + at, count, wide, v);
}

template <class T>
VDIT_DEVICE void store8(T* p, int count, bool wide, float const (&v)[8]) {
  if (wide && count > 0) {
    CUTE_UNROLL
    for (int i = 0; i < 8; i += kVecOf<T>) {
      float part[kVecOf<T>];
      CUTE_UNROLL
      for (int j = 0; j < kVecOf<T>; ++j) part[j] = v[i + j];
      store_floats<T, kVecOf<T>>(p + i, part);
    }
  } else {
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i < count) p[i] = static_cast<T>(v[i]);
    }
  }
}

VDIT_DEVICE void store8(void* base, DType dtype, int64_t at, int count, bool wide, float const (&v)[8]) {
  if (dtype == DType::kFloat32) return store8(static_cast<float*>(base) + at, count, wide, v);
  if (dtype == DType::kFloat16) return store8(static_cast<cute::half_t*>(base) + at, count, wide, v);
  store8(static_cast<cute::bfloat16_t*>(base) + at, count, wide, v);
}

// A 4 x 4 transpose within each quad of lanes: v[i] becomes what v[lane % 4] was in lane i of the quad.
template <class T>
VDIT_DEVICE void quad_transpose(T (&v)[4]) {
  bool const odd = lane_idx() & 1, upper = lane_idx() & 2;
  CUTE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    T const received = shfl_xor(odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? received : v[i];
    v[i + 1] = odd ? v[i + 1] : received;
  }
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    T const received = shfl_xor(upper ? v[i] : v[i + 2], 2);
    v[i] = upper ? received : v[i];
    v[i + 2] = upper ? v[i + 2] : received;
  }
}

// A block works on `groups` rows at a time, `lanes` threads a row, one chunk of columns a thread. Threads
// past the last whole group are idle.
struct RowLanes {
  int lanes, groups, group, lane;

  VDIT_DEVICE RowLanes(int64_t chunks, int threads) {
    lanes = chunks < threads ? static_cast<int>(chunks) : threads;
    groups = threads / lanes;
    group = thread_idx() / lanes;
    lane = thread_idx() % lanes;
  }
  VDIT_DEVICE bool active() const { return group < groups; }
};

// The mask of the lanes below this one.
VDIT_DEVICE uint32_t lanes_below() { return (1u << lane_idx()) - 1u; }

// Inclusive sum over the warp's lanes.
template <class T>
VDIT_DEVICE T warp_prefix_sum(T v) {
  CUTE_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    T const below = shfl_up(v, step);
    if (lane_idx() >= step) v += below;
  }
  return v;
}

template <class T>
VDIT_DEVICE T clamp_to(T v, T low, T high) {
  return v < low ? low : (v > high ? high : v);
}

}  // namespace vdit
