// What a kernel may ask of the machine: one function an instruction, the GPU's body beside the emulator's.
//
// Kernels are written against this header and CuTe only. nvcc compiles them for the GPU; plain g++ -std=c++20
// with VDIT_EMU defined compiles the same source for the emulator (csrc/emu/README.md).
//
//   template <class T>
//   struct ScaleKernel {
//     struct Params { T const* x; T* y; int64_t n; float scale; };
//     static constexpr int kThreads = 128;   // a multiple of 32; blocks are one-dimensional
//     static constexpr int kMinBlocks = 1;   // blocks an SM, for __launch_bounds__
//     VDIT_DEVICE void operator()(Params const& p, char* smem) const;
//   };
//   launch<ScaleKernel<float>>(Grid{blocks, 1, 1}, smem_bytes, stream, params);   // launch.h
//
// CuTe atoms, used as their cute namesakes are:
//   auto mma = cute::make_tiled_mma(MmaAtom_m16n8k16<T>{}, Layout<Shape<_4, _1, _1>>{});
//   auto load_a = cute::make_tiled_copy_A(LdsmAtom<T>{}, mma);
//   auto fetch = cute::make_tiled_copy(CpAsyncAtom<T>{}, thread_layout, Layout<Shape<_1, _8>>{});
//   cute::copy(fetch.with(row < rows), src, dst);   // or cute::copy_if(fetch, predicates, src, dst)
//   cp_async_commit(); cp_async_wait<0>();          // vdit's: cute's own do nothing in the emulator
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(VDIT_EMU)
#include "../emu/collectives.h"
#define VDIT_DEVICE inline
#define VDIT_HOST_DEVICE inline
#elif defined(__CUDACC__)
#define VDIT_DEVICE __device__ __forceinline__
#define VDIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#error "device.h is for kernels: compile it with nvcc, or with VDIT_EMU defined for the emulator."
#endif

// NOTE: tensor.hpp first: in CUTLASS 4.2 the atom headers do not compile before it.
// clang-format off
#include <cute/tensor.hpp>
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm80.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
// clang-format on

namespace vdit {

// Where a collective is called. Callers leave it out: the emulator's errors name the line, the GPU's is
// empty.
#if defined(VDIT_EMU)
using Site = emu::Site;
#else
struct Site {
  VDIT_HOST_DEVICE static constexpr Site here() { return {}; }
};
#endif

// ---- Who am I -------------------------------------------------------------------------------------------

VDIT_DEVICE int thread_idx() {
#if defined(VDIT_EMU)
  return emu::thread_index();
#else
  return static_cast<int>(threadIdx.x);
#endif
}

VDIT_DEVICE int lane_idx() { return thread_idx() & 31; }
VDIT_DEVICE int warp_idx() { return thread_idx() >> 5; }

VDIT_DEVICE int block_idx_x() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::block_index().x);
#else
  return static_cast<int>(blockIdx.x);
#endif
}

VDIT_DEVICE int block_idx_y() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::block_index().y);
#else
  return static_cast<int>(blockIdx.y);
#endif
}

VDIT_DEVICE int block_idx_z() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::block_index().z);
#else
  return static_cast<int>(blockIdx.z);
#endif
}

VDIT_DEVICE int grid_dim_x() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::grid_dim().x);
#else
  return static_cast<int>(gridDim.x);
#endif
}

VDIT_DEVICE int grid_dim_y() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::grid_dim().y);
#else
  return static_cast<int>(gridDim.y);
#endif
}

VDIT_DEVICE int grid_dim_z() {
#if defined(VDIT_EMU)
  return static_cast<int>(emu::grid_dim().z);
#else
  return static_cast<int>(gridDim.z);
#endif
}

// Gives up. `why` reaches the reader in the emulator; a GPU says only that the kernel trapped.
[[noreturn]] VDIT_DEVICE void trap(char const* why) {
#if defined(VDIT_EMU)
  emu::trap(why);
#else
  (void)why;
  asm volatile("trap;");
  __builtin_unreachable();
#endif
}

// ---- Barriers: every thread of the block, or every lane of the warp, must come --------------------------

VDIT_DEVICE void sync_block(Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::sync_block(at);
#else
  __syncthreads();
#endif
}

VDIT_DEVICE bool sync_block_or(bool mine, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::sync_block_count("sync_block_or", mine, at) > 0;
#else
  return __syncthreads_or(mine) != 0;
#endif
}

VDIT_DEVICE int sync_block_count(bool mine, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::sync_block_count("sync_block_count", mine, at);
#else
  return __syncthreads_count(mine);
#endif
}

VDIT_DEVICE void sync_warp(Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::sync_warp(at);
#else
  __syncwarp();
#endif
}

// ---- Warp exchange: full warps, values of 4 or 8 bytes --------------------------------------------------

namespace detail {
// The unsigned integer that carries a T through a shuffle.
template <class T>
using ShuffleWord = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;

template <class To, class From>
VDIT_HOST_DEVICE To bits_as(From const& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs two types of one size.");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
constexpr bool can_shuffle = std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8);
}  // namespace detail

// The value that `lane` (modulo 32) holds.
template <class T>
VDIT_DEVICE T shfl(T v, int lane, Site at = Site::here()) {
  static_assert(detail::can_shuffle<T>, "shfl takes a plain value of 4 or 8 bytes.");
  using Word = detail::ShuffleWord<T>;
#if defined(VDIT_EMU)
  return detail::bits_as<T>(static_cast<Word>(emu::shuffle("shfl", detail::bits_as<Word>(v), lane & 31, at)));
#else
  return detail::bits_as<T>(__shfl_sync(0xffffffffu, detail::bits_as<Word>(v), lane));
#endif
}

template <class T>
VDIT_DEVICE T shfl_xor(T v, int mask, Site at = Site::here()) {
  static_assert(detail::can_shuffle<T>, "shfl_xor takes a plain value of 4 or 8 bytes.");
  using Word = detail::ShuffleWord<T>;
#if defined(VDIT_EMU)
  int const source = lane_idx() ^ mask;
  return detail::bits_as<T>(
      static_cast<Word>(emu::shuffle("shfl_xor", detail::bits_as<Word>(v), source, at)));
#else
  return detail::bits_as<T>(__shfl_xor_sync(0xffffffffu, detail::bits_as<Word>(v), mask));
#endif
}

// From the lane `delta` below; the lowest lanes keep their own.
template <class T>
VDIT_DEVICE T shfl_up(T v, int delta, Site at = Site::here()) {
  static_assert(detail::can_shuffle<T>, "shfl_up takes a plain value of 4 or 8 bytes.");
  using Word = detail::ShuffleWord<T>;
#if defined(VDIT_EMU)
  int const source = lane_idx() - delta;
  return detail::bits_as<T>(static_cast<Word>(emu::shuffle("shfl_up", detail::bits_as<Word>(v), source, at)));
#else
  return detail::bits_as<T>(__shfl_up_sync(0xffffffffu, detail::bits_as<Word>(v), delta));
#endif
}

// From the lane `delta` above; the highest lanes keep their own.
template <class T>
VDIT_DEVICE T shfl_down(T v, int delta, Site at = Site::here()) {
  static_assert(detail::can_shuffle<T>, "shfl_down takes a plain value of 4 or 8 bytes.");
  using Word = detail::ShuffleWord<T>;
#if defined(VDIT_EMU)
  int const source = lane_idx() + delta;
  return detail::bits_as<T>(
      static_cast<Word>(emu::shuffle("shfl_down", detail::bits_as<Word>(v), source, at)));
#else
  return detail::bits_as<T>(__shfl_down_sync(0xffffffffu, detail::bits_as<Word>(v), delta));
#endif
}

VDIT_DEVICE uint32_t ballot(bool mine, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::ballot("ballot", mine, at);
#else
  return __ballot_sync(0xffffffffu, mine);
#endif
}

VDIT_DEVICE bool warp_any(bool mine, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::ballot("warp_any", mine, at) != 0;
#else
  return __any_sync(0xffffffffu, mine) != 0;
#endif
}

VDIT_DEVICE bool warp_all(bool mine, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::ballot("warp_all", mine, at) == 0xffffffffu;
#else
  return __all_sync(0xffffffffu, mine) != 0;
#endif
}

// ---- Atomics, on shared or global memory; each returns the old value ------------------------------------

namespace detail {
template <class T>
struct Same {  // keeps the value's type from being deduced: it follows the pointer's
  using type = T;
};
template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same<T, Allowed>::value || ...);
}  // namespace detail

template <class T>
VDIT_DEVICE T atomic_add(T* at, typename detail::Same<T>::type v) {
  static_assert(detail::is_one_of<T, int32_t, uint32_t, unsigned long long, float>,
                "atomic_add takes int32_t, uint32_t, unsigned long long or float.");
#if defined(VDIT_EMU)
  return emu::atomic_update(at, [v](T old) { return static_cast<T>(old + v); });
#else
  return atomicAdd(at, v);
#endif
}

template <class T>
VDIT_DEVICE T atomic_max(T* at, typename detail::Same<T>::type v) {
  static_assert(detail::is_one_of<T, int32_t, uint32_t>, "atomic_max takes int32_t or uint32_t.");
#if defined(VDIT_EMU)
  return emu::atomic_update(at, [v](T old) { return old < v ? v : old; });
#else
  return atomicMax(at, v);
#endif
}

template <class T>
VDIT_DEVICE T atomic_min(T* at, typename detail::Same<T>::type v) {
  static_assert(detail::is_one_of<T, int32_t, uint32_t>, "atomic_min takes int32_t or uint32_t.");
#if defined(VDIT_EMU)
  return emu::atomic_update(at, [v](T old) { return v < old ? v : old; });
#else
  return atomicMin(at, v);
#endif
}

VDIT_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t v) {
#if defined(VDIT_EMU)
  return emu::atomic_update(at, [v](uint32_t old) { return old | v; });
#else
  return atomicOr(at, v);
#endif
}

// ---- cp.async: global to shared memory, 16 bytes a thread, done only after this thread's wait -----------

#if !defined(VDIT_EMU)
namespace detail {
VDIT_DEVICE uint32_t shared_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
}  // namespace detail
#endif

// Without `valid` the destination becomes zero and the source is not read, so it may point anywhere.
VDIT_DEVICE void cp_async_16(void* smem_dst, void const* gmem_src, bool valid, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::cp_async_16(smem_dst, gmem_src, valid, at);
#else
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(detail::shared_address(smem_dst)),
      "l"(gmem_src), "r"(valid ? 16 : 0)
      : "memory");
#endif
}

// Closes the group of the copies this thread has issued since the last commit.
VDIT_DEVICE void cp_async_commit() {
#if defined(VDIT_EMU)
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are unfinished; copies not committed are not waited for.
// Other threads see the bytes only after a barrier that follows.
template <int N>
VDIT_DEVICE void cp_async_wait() {
#if defined(VDIT_EMU)
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

// ---- ldmatrix: 8x8 matrices of 2-byte values; lane 8*i+r names row r of matrix i ------------------------
// NOTE: volatile but without a memory clobber, as in CuTe: the barrier between the stores and these loads
// already orders them, and a clobber would keep global loads from moving across.

VDIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], void const* smem_row, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::ldmatrix("ldmatrix_x4", r, 4, smem_row, false, at);
#else
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(smem_row)));
#endif
}

VDIT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], void const* smem_row, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::ldmatrix("ldmatrix_x4_trans", r, 4, smem_row, true, at);
#else
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(smem_row)));
#endif
}

// The x2 forms read the rows of lanes 0-15; the other lanes' addresses are ignored.
VDIT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], void const* smem_row, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::ldmatrix("ldmatrix_x2", r, 2, smem_row, false, at);
#else
  asm volatile("ldmatrix.sync.aligned.x2.m8n8.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(smem_row)));
#endif
}

VDIT_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], void const* smem_row, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::ldmatrix("ldmatrix_x2_trans", r, 2, smem_row, true, at);
#else
  asm volatile("ldmatrix.sync.aligned.x2.trans.m8n8.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(smem_row)));
#endif
}

// ---- mma.sync: d += a * b -------------------------------------------------------------------------------

// a [16, 16] row-major, b [16, 8] column-major, d [16, 8] in fp32; T is cute::half_t or cute::bfloat16_t.
template <class T>
VDIT_DEVICE void mma_m16n8k16(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2],
                              Site at = Site::here()) {
  static_assert(detail::is_one_of<T, cute::half_t, cute::bfloat16_t>,
                "mma_m16n8k16 takes cute::half_t or cute::bfloat16_t.");
#if defined(VDIT_EMU)
  if constexpr (std::is_same<T, cute::half_t>::value) {
    emu::mma_m16n8k16_f16(d, a, b, at);
  } else {
    emu::mma_m16n8k16_bf16(d, a, b, at);
  }
#else
  if constexpr (std::is_same<T, cute::half_t>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// a [16, 32] row-major, b [32, 8] column-major, d [16, 8] in int32, wrapping as the hardware does.
VDIT_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2],
                                 Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::mma_m16n8k32_s8(d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Arithmetic -----------------------------------------------------------------------------------------
// The approximate forms differ from the emulator's in the last bits, and the GPU's flush subnormals to zero.

VDIT_DEVICE float fast_exp2(float x) {  // 2^x; -inf gives 0
#if defined(VDIT_EMU)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 2^x on the FMA lanes, for sharing the work with fast_exp2, whose unit does 16 a cycle: x is cut into a
// whole number and a rest of at most a half, whose power a polynomial gives (the best of degree 4 that is
// exact at 0: relative error 3e-6). x <= -127 gives 0, NaN gives NaN; x < 128 is asked for.
VDIT_DEVICE float fma_exp2(float x) {
#if defined(VDIT_EMU)
  float const at_least = x < -127.f ? -127.f : x;
#else
  float at_least;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(at_least) : "f"(x), "f"(-127.f));
#endif
  constexpr float kMagic = 12583039.f;  // 1.5 * 2^23 + 127: the sum's low bits are the rounded x + 127
  float const shifted = at_least + kMagic;
  float const rest = at_least - (shifted - kMagic);
  float p = 0.009582838f;
  p = fmaf(p, rest, 0.055906463f);
  p = fmaf(p, rest, 0.24024099f);
  p = fmaf(p, rest, 0.6931242f);
  p = fmaf(p, rest, 1.f);
  return p * detail::bits_as<float>(detail::bits_as<uint32_t>(shifted) << 23);
}

VDIT_DEVICE float fast_log2(float x) {
#if defined(VDIT_EMU)
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

VDIT_DEVICE float fast_rcp(float x) {
#if defined(VDIT_EMU)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

VDIT_DEVICE float fast_rsqrt(float x) {
#if defined(VDIT_EMU)
  return 1.0f / std::sqrt(x);
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The smaller, or NaN where one is: fminf drops a NaN.
VDIT_DEVICE float min_or_nan(float a, float b) {
#if defined(VDIT_EMU)
  return a != a || a < b ? a : b;
#else
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

// The same value, unknown to the compiler: what is computed from it inside a loop stays there instead of
// being kept in registers across the loop.
VDIT_DEVICE int not_hoisted(int v) {
#if !defined(VDIT_EMU)
  asm volatile("" : "+r"(v));
#endif
  return v;
}

VDIT_DEVICE int popcount(uint32_t v) {
#if defined(VDIT_EMU)
  return __builtin_popcount(v);
#else
  return __popc(v);
#endif
}

// PRMT: byte i of the result is byte (nibble i of `selector`) of the eight bytes lo, hi. Bit 3 of a nibble
// asks for that byte's sign in all eight bits instead.
VDIT_DEVICE uint32_t byte_perm(uint32_t lo, uint32_t hi, uint32_t selector) {
#if defined(VDIT_EMU)
  uint64_t const bytes = static_cast<uint64_t>(hi) << 32 | lo;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t const nibble = selector >> (4 * i) & 15u;
    uint32_t const byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 255u;
    result |= (nibble < 8u ? byte : (byte >> 7) * 255u) << (8 * i);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(lo), "r"(hi), "r"(selector));
  return result;
#endif
}

// A product and a sum that the compiler does not fuse: for results that are the same bits wherever they are
// computed.
VDIT_DEVICE float mul_rn(float a, float b) {
#if defined(VDIT_EMU)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

VDIT_DEVICE float add_rn(float a, float b) {
#if defined(VDIT_EMU)
  return a + b;
#else
  return __fadd_rn(a, b);
#endif
}

// The nearest integer, a half to even. |x| below 2^31 is asked for.
VDIT_DEVICE int32_t round_to_int(float x) {
#if defined(VDIT_EMU)
  return static_cast<int32_t>(std::nearbyint(x));
#else
  return __float2int_rn(x);
#endif
}

// Two floats as T (half_t or bfloat16_t, rounded to nearest even), `lo` in the low half.
template <class T>
VDIT_DEVICE uint32_t pack2(float lo, float hi) {
  static_assert(detail::is_one_of<T, cute::half_t, cute::bfloat16_t>,
                "pack2 takes cute::half_t or cute::bfloat16_t.");
#if defined(VDIT_EMU)
  return static_cast<uint32_t>(T(lo).raw()) | static_cast<uint32_t>(T(hi).raw()) << 16;
#else
  uint32_t r;
  if constexpr (std::is_same<T, cute::half_t>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  }
  return r;
#endif
}

// {low half, high half} as floats.
template <class T>
VDIT_DEVICE float2 unpack2(uint32_t v) {
  static_assert(detail::is_one_of<T, cute::half_t, cute::bfloat16_t>,
                "unpack2 takes cute::half_t or cute::bfloat16_t.");
  return float2{static_cast<float>(T::bitcast(static_cast<uint16_t>(v & 0xffffu))),
                static_cast<float>(T::bitcast(static_cast<uint16_t>(v >> 16)))};
}

// ---- CuTe atoms over the functions above ----------------------------------------------------------------
// The layouts are CuTe's own (its traits are inherited or repeated), the instruction is ours, so that the
// emulator runs the very atoms that the GPU does.

// CuTe calls these from __host__ __device__ functions; the host pass of nvcc needs a body that it never runs.
#if defined(VDIT_EMU) || defined(__CUDA_ARCH__)
#define VDIT_ON_DEVICE(statement) statement
#else
#define VDIT_ON_DEVICE(statement)
#endif

template <class T>
struct MmaOp_m16n8k16 {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];

  VDIT_HOST_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3,                  //
                                   uint32_t const& a0, uint32_t const& a1, uint32_t const& a2,  //
                                   uint32_t const& a3, uint32_t const& b0, uint32_t const& b1,  //
                                   float const& c0, float const& c1, float const& c2, float const& c3) {
    float d[4] = {c0, c1, c2, c3};
    uint32_t const a[4] = {a0, a1, a2, a3};
    uint32_t const b[2] = {b0, b1};
    VDIT_ON_DEVICE(mma_m16n8k16<T>(d, a, b));
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  }
};

struct MmaOp_m16n8k32_s8 {
  using DRegisters = uint32_t[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = uint32_t[4];

  VDIT_HOST_DEVICE static void fma(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3,      //
                                   uint32_t const& a0, uint32_t const& a1, uint32_t const& a2,  //
                                   uint32_t const& a3, uint32_t const& b0, uint32_t const& b1,  //
                                   uint32_t const& c0, uint32_t const& c1, uint32_t const& c2,  //
                                   uint32_t const& c3) {
    int32_t d[4] = {static_cast<int32_t>(c0), static_cast<int32_t>(c1), static_cast<int32_t>(c2),
                    static_cast<int32_t>(c3)};
    uint32_t const a[4] = {a0, a1, a2, a3};
    uint32_t const b[2] = {b0, b1};
    VDIT_ON_DEVICE(mma_m16n8k32_s8(d, a, b));
    d0 = static_cast<uint32_t>(d[0]), d1 = static_cast<uint32_t>(d[1]);
    d2 = static_cast<uint32_t>(d[2]), d3 = static_cast<uint32_t>(d[3]);
  }
};

struct LdsmOp {
  using SRegisters = cute::uint128_t[1];
  using DRegisters = uint32_t[4];

  VDIT_HOST_DEVICE static void copy(cute::uint128_t const& smem_row, uint32_t& r0, uint32_t& r1, uint32_t& r2,
                                    uint32_t& r3) {
    uint32_t r[4] = {};
    VDIT_ON_DEVICE(ldmatrix_x4(r, &smem_row));
    r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
  }
};

struct LdsmTransOp {
  using SRegisters = cute::uint128_t[1];
  using DRegisters = uint32_t[4];

  VDIT_HOST_DEVICE static void copy(cute::uint128_t const& smem_row, uint32_t& r0, uint32_t& r1, uint32_t& r2,
                                    uint32_t& r3) {
    uint32_t r[4] = {};
    VDIT_ON_DEVICE(ldmatrix_x4_trans(r, &smem_row));
    r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
  }
};

struct CpAsyncOp {
  using SRegisters = cute::uint128_t[1];
  using DRegisters = cute::uint128_t[1];

  VDIT_HOST_DEVICE static void copy(cute::uint128_t const& gmem_src, cute::uint128_t& smem_dst, bool valid) {
    VDIT_ON_DEVICE(cp_async_16(&smem_dst, &gmem_src, valid));
    (void)gmem_src, (void)smem_dst, (void)valid;
  }
};

template <class T>
using MmaAtom_m16n8k16 = cute::MMA_Atom<MmaOp_m16n8k16<T>>;
using MmaAtom_m16n8k32_s8 = cute::MMA_Atom<MmaOp_m16n8k32_s8>;
template <class T>
using LdsmAtom = cute::Copy_Atom<LdsmOp, T>;
template <class T>
using LdsmTransAtom = cute::Copy_Atom<LdsmTransOp, T>;
template <class T>
using CpAsyncAtom = cute::Copy_Atom<CpAsyncOp, T>;  // 16 bytes; .with(false) fills zeros

}  // namespace vdit

namespace cute {

template <>
struct MMA_Traits<vdit::MmaOp_m16n8k16<half_t>> : MMA_Traits<SM80_16x8x16_F32F16F16F32_TN> {};
template <>
struct MMA_Traits<vdit::MmaOp_m16n8k16<bfloat16_t>> : MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN> {};
template <>
struct MMA_Traits<vdit::MmaOp_m16n8k32_s8> : MMA_Traits<SM80_16x8x32_S32S8S8S32_TN> {};

template <>
struct Copy_Traits<vdit::LdsmOp> : Copy_Traits<SM75_U32x4_LDSM_N> {};
template <>
struct Copy_Traits<vdit::LdsmTransOp> : Copy_Traits<SM75_U16x8_LDSM_T> {};

template <>
struct Copy_Traits<vdit::CpAsyncOp> {
  using ThrID = Layout<_1>;
  using SrcLayout = Layout<Shape<_1, _128>>;  // (thread, value) -> bit
  using DstLayout = SrcLayout;
  using RefLayout = SrcLayout;

  bool valid = true;

  CUTE_HOST_DEVICE constexpr Copy_Traits with(bool is_valid) const { return {is_valid}; }

  template <class TS, class SLayout, class TD, class DLayout>
  CUTE_HOST_DEVICE friend constexpr void copy_unpack(Copy_Traits const& traits,
                                                     Tensor<TS, SLayout> const& src,
                                                     Tensor<TD, DLayout>& dst) {
    static_assert(is_gmem<TS>::value, "CpAsyncAtom copies from global memory: use make_gmem_ptr.");
    static_assert(is_smem<TD>::value, "CpAsyncAtom copies to shared memory: use make_smem_ptr.");
    Tensor s = recast<uint128_t>(src);
    Tensor d = recast<uint128_t>(dst);
    CUTE_STATIC_ASSERT_V(size(s) == Int<1>{}, "CpAsyncAtom needs 16 contiguous bytes of source a thread.");
    CUTE_STATIC_ASSERT_V(size(d) == Int<1>{},
                         "CpAsyncAtom needs 16 contiguous bytes of destination a thread.");
    vdit::CpAsyncOp::copy(s[0], d[0], traits.valid);
  }
};

}  // namespace cute
