// Four-lane vectors through the compilers' vector extension: SSE2 on x86-64, NEON on aarch64.
//
// The three simd_*.h define the same struct Simd, and a translation unit includes exactly one. Conventions:
//   kLanes    floats per Vec
//   kRows     broadcast rows that a register block of the GEMM keeps; divides 8
//   kMaxVecs  vectors side by side in that block; kRows * kMaxVecs accumulators fit the register file
//   kDotBf16  dot(), pack_bf16() and load_pairs() exist and work on pairs of bf16 per lane
#pragma once
#include "common/cpu/element.h"

namespace vdit {
namespace {

struct Simd {
  static constexpr char const* kName = "portable";
  static constexpr int kLanes = 4, kRows = 4, kMaxVecs = 2;
  static constexpr bool kDotBf16 = false;
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t IntVec __attribute__((vector_size(16)));

  static Vec set1(float x) { return Vec{x, x, x, x}; }
  static Vec load(float const* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

  static Vec load(Float16 const* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static Vec load(BFloat16 const* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <class T>
  static void store(T* p, Vec x) {
    for (int i = 0; i < 4; ++i) p[i] = from_float<T>(x[i]);
  }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // contracted where the target has it
  // Of a and b the larger; b when either is NaN.
  static Vec max(Vec a, Vec b) { return select(a > b, a, b); }
  static Vec zero_if_neg_inf(Vec x) { return select(x == set1(-__builtin_inff()), set1(0.f), x); }
  static Vec zero_if_zero(Vec x, Vec y) { return select(x == set1(0.f), set1(0.f), y); }

  // Lanes 1, 0, 3, 2, ...
  static Vec swap_pairs(Vec x) { return Vec{x[1], x[0], x[3], x[2]}; }

  // Where x > best: best = x and index = i.
  static void keep_larger(Vec& best, IntVec& index, Vec x, int32_t i) {
    IntVec const larger = x > best;
    best = select(larger, x, best);
    index = (larger & IntVec{i, i, i, i}) | (~larger & index);
  }
  static IntVec int_zero() { return IntVec{0, 0, 0, 0}; }
  static void store(int32_t* p, IntVec x) { std::memcpy(p, &x, sizeof x); }

  // 2^x for x <= 0 or so; -inf gives 0 and NaN stays. Relative error 1.5e-7 either way.
  template <bool kPrecise>
  static Vec exp2(Vec x) {
    x = max(set1(-127.f), x);
    Vec const magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec const shifted = x + magic;
    Vec const f = x - (shifted - magic);
    Vec p = set1(1.327647129e-3f);
    p = fma(p, f, set1(9.675540961e-3f));
    p = fma(p, f, set1(5.550713092e-2f));
    p = fma(p, f, set1(2.402212024e-1f));
    p = fma(p, f, set1(6.931469440e-1f));
    p = fma(p, f, set1(1.f));
    IntVec n;
    std::memcpy(&n, &shifted, sizeof n);
    n = (n - 0x4b400000 + 127) << 23;  // 0 for x < -126.5, so that the factor is +0
    Vec power;
    std::memcpy(&power, &n, sizeof n);
    return p * power;
  }

  static void transpose(Vec (&r)[4]) {
    Vec const a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
  }

 private:
  static Vec select(IntVec mask, Vec a, Vec b) {
    IntVec x, y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    IntVec const z = (mask & x) | (~mask & y);
    Vec out;
    std::memcpy(&out, &z, sizeof z);
    return out;
  }
};

}  // namespace
}  // namespace vdit
