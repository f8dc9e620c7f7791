// What only sm_90a can do: mbarriers, the copy engine (TMA), warpgroup matrix products (wgmma). As in
// device.h, one function an instruction, the GPU's body beside the emulator's. Include it after device.h.
//
// A stage of a pipeline, as a producer and its consumers see it:
//   producer, one thread:   barrier_wait(&empty[s], parity ^ 1);
//                           barrier_arrive_expect(&full[s], kBytes);
//                           tma_load(sK[s], p.k, &full[s], 0, row, head, batch);
//   consumers:              barrier_wait(&full[s], parity);
//                           wgmma_fence_operand(d); wgmma_fence();
//                           for k: wgmma_ss<T, 128>(d, wgmma_advance(q, k * 32), ..., k > 0);
//                           wgmma_commit(); wgmma_wait<0>(); wgmma_fence_operand(d);
//                           barrier_arrive(&empty[s]);
#pragma once

#include "device.h"
#include "tma.h"

#if !defined(VDIT_EMU)
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cute/util/type_traits.hpp>
#endif

namespace vdit {

// ---- mbarriers ------------------------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and all the bytes expected have come; then the next one
// starts. A wait names the parity of the phase that it waits for: 0 for the first. On a fresh barrier
// waiting for parity 1 returns at once, which is how a producer finds its stages empty.

using Barrier = uint64_t;  // in shared memory, 8 bytes

// By one thread; then fence_barrier_init() by the same thread, then a barrier of the block.
VDIT_DEVICE void barrier_init(Barrier* barrier, int arrivals, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::barrier_init(barrier, arrivals, at);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(detail::shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Shows initialised barriers to the copy engine.
VDIT_DEVICE void fence_barrier_init() {
#if defined(VDIT_EMU)
  emu::fence_barrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

VDIT_DEVICE void barrier_arrive(Barrier* barrier, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::barrier_arrive("barrier_arrive", barrier, 1, 0, at);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(detail::shared_address(barrier))
               : "memory");
#endif
}

// Expects `bytes` more in this phase, and arrives.
VDIT_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::barrier_arrive("barrier_arrive_expect", barrier, 1, bytes, at);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(detail::shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Expects `bytes` more in this phase, which somebody's arrival must still hold open.
VDIT_DEVICE void barrier_expect(Barrier* barrier, int bytes, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::barrier_arrive("barrier_expect", barrier, 0, bytes, at);
#else
  asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;\n" ::"r"(detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Is the phase of that parity over? May wait for a while before it says no.
VDIT_DEVICE bool barrier_try(Barrier* barrier, int parity, Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::barrier_wait("barrier_try", barrier, parity, false, at);
#else
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(detail::shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
#endif
}

VDIT_DEVICE void barrier_wait(Barrier* barrier, int parity, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::barrier_wait("barrier_wait", barrier, parity, true, at);
#else
  while (!barrier_try(barrier, parity)) {
  }
#endif
}

// ---- Named barriers: ids 1 to 15 (0 is sync_block's), `threads` a multiple of 32 ------------------------
// Full warps come, some to wait (sync) and some only to be counted (arrive); the `threads`-th ends it.

VDIT_DEVICE void named_sync(int id, int threads, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::named_barrier("named_sync", id, threads, true, at);
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

VDIT_DEVICE void named_arrive(int id, int threads, Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::named_barrier("named_arrive", id, threads, false, at);
#else
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- Warpgroups -----------------------------------------------------------------------------------------

// By every thread that has stored to shared memory with ordinary stores, before the barrier after which the
// copy engine or wgmma reads them.
VDIT_DEVICE void fence_async_proxy() {
#if defined(VDIT_EMU)
  emu::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Registers a thread, by a whole warpgroup. `up` waits until others have given enough back.
// NOTE: ptxas ignores both unless the kernel's registers are bounded: __launch_bounds__ with kMinBlocks.
template <int N>
VDIT_DEVICE void set_max_registers_up(Site at = Site::here()) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256.");
#if defined(VDIT_EMU)
  emu::set_max_registers("set_max_registers_up", N, true, at);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
#endif
}

template <int N>
VDIT_DEVICE void set_max_registers_down(Site at = Site::here()) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256.");
#if defined(VDIT_EMU)
  emu::set_max_registers("set_max_registers_down", N, false, at);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
#endif
}

// True in one lane of a full warp, always the same one, whichever it is.
VDIT_DEVICE bool elect_one(Site at = Site::here()) {
#if defined(VDIT_EMU)
  return emu::elect_one(at);
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#endif
}

// Four 8x8 matrices of 2-byte values to shared memory: ldmatrix backwards, lane 8*i+r names row r of matrix
// i.
VDIT_DEVICE void stmatrix_x4(void* smem_row, uint32_t const (&r)[4], Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::stmatrix("stmatrix_x4", smem_row, r, 4, false, at);
#else
  asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   detail::shared_address(smem_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

VDIT_DEVICE void stmatrix_x4_trans(void* smem_row, uint32_t const (&r)[4], Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::stmatrix("stmatrix_x4_trans", smem_row, r, 4, true, at);
#else
  asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   detail::shared_address(smem_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// ---- The copy engine: by one thread ---------------------------------------------------------------------
// Boxes lie in shared memory row after row, dimension 0 innermost, from a multiple of 128 bytes on; then the
// map's swizzle changes each address by its own bits. NOTE: by the address and not by the row of the box:
// k128 puts what belongs at `a` to a ^ ((a >> 7) & 7) << 4, so a box may start at any line of a larger tile
// (aligned to 1024 bytes) and reads as part of it.

// How long the L2 cache should keep what is read.
enum class CacheHint { kNone, kEvictFirst, kEvictLast };

VDIT_DEVICE void tma_prefetch(TensorMap const& map) {  // fetches the map itself
#if defined(VDIT_EMU)
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
#endif
}

#if !defined(VDIT_EMU)
namespace detail {
VDIT_DEVICE uint64_t cache_policy(CacheHint hint) {
  using cute::TMA::CacheHintSm90;
  return static_cast<uint64_t>(hint == CacheHint::kEvictFirst  ? CacheHintSm90::EVICT_FIRST
                               : hint == CacheHint::kEvictLast ? CacheHintSm90::EVICT_LAST
                                                               : CacheHintSm90::EVICT_NORMAL);
}
}  // namespace detail
#endif

// Brings the line of global memory that holds `p` to the L2 cache.
VDIT_DEVICE void prefetch_l2(void const* p) {
#if defined(VDIT_EMU)
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
#endif
}

// Loads the box at element (c0, c1, ...) of the tensor, c0 innermost. Elements outside come as zeros, and all
// bytes of the box count on the barrier.
VDIT_DEVICE void tma_load(void* smem, TensorMap const& map, Barrier* barrier, int c0, int c1,
                          CacheHint hint = CacheHint::kNone, Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1};
  emu::tma_load(smem, map, barrier, 2, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%4, %5}], [%2], %3;\n" ::"r"(detail::shared_address(smem)),
      "l"(&map), "r"(detail::shared_address(barrier)), "l"(detail::cache_policy(hint)), "r"(c0), "r"(c1)
      : "memory");
#endif
}

VDIT_DEVICE void tma_load(void* smem, TensorMap const& map, Barrier* barrier, int c0, int c1, int c2,
                          CacheHint hint = CacheHint::kNone, Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2};
  emu::tma_load(smem, map, barrier, 3, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%4, %5, %6}], [%2], %3;\n" ::"r"(detail::shared_address(smem)),
      "l"(&map), "r"(detail::shared_address(barrier)), "l"(detail::cache_policy(hint)), "r"(c0), "r"(c1),
      "r"(c2)
      : "memory");
#endif
}

VDIT_DEVICE void tma_load(void* smem, TensorMap const& map, Barrier* barrier, int c0, int c1, int c2, int c3,
                          CacheHint hint = CacheHint::kNone, Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2, c3};
  emu::tma_load(smem, map, barrier, 4, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;\n" ::"r"(detail::shared_address(smem)),
      "l"(&map), "r"(detail::shared_address(barrier)), "l"(detail::cache_policy(hint)), "r"(c0), "r"(c1),
      "r"(c2), "r"(c3)
      : "memory");
#endif
}

VDIT_DEVICE void tma_load(void* smem, TensorMap const& map, Barrier* barrier, int c0, int c1, int c2, int c3,
                          int c4, CacheHint hint = CacheHint::kNone, Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2, c3, c4};
  emu::tma_load(smem, map, barrier, 5, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;\n" ::"r"(detail::shared_address(smem)),
      "l"(&map), "r"(detail::shared_address(barrier)), "l"(detail::cache_policy(hint)), "r"(c0), "r"(c1),
      "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// Plain bytes, a multiple of 16 from and to multiples of 16.
VDIT_DEVICE void bulk_load(void* smem, void const* gmem, int bytes, Barrier* barrier,
                           Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::bulk_load(smem, gmem, bytes, barrier, at);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
          detail::shared_address(smem)),
      "l"(gmem), "r"(bytes), "r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// Stores a box; parts outside of the tensor are dropped. The thread that stores also commits and waits.
VDIT_DEVICE void tma_store(TensorMap const& map, void const* smem, int c0, int c1, Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1};
  emu::tma_store(map, smem, 2, c, at);
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(&map),
               "r"(detail::shared_address(smem)), "r"(c0), "r"(c1)
               : "memory");
#endif
}

VDIT_DEVICE void tma_store(TensorMap const& map, void const* smem, int c0, int c1, int c2,
                           Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2};
  emu::tma_store(map, smem, 3, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n" ::"l"(&map),
      "r"(detail::shared_address(smem)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

VDIT_DEVICE void tma_store(TensorMap const& map, void const* smem, int c0, int c1, int c2, int c3,
                           Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2, c3};
  emu::tma_store(map, smem, 4, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(&map),
      "r"(detail::shared_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

VDIT_DEVICE void tma_store(TensorMap const& map, void const* smem, int c0, int c1, int c2, int c3, int c4,
                           Site at = Site::here()) {
#if defined(VDIT_EMU)
  int const c[] = {c0, c1, c2, c3, c4};
  emu::tma_store(map, smem, 5, c, at);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];\n" ::"l"(&map),
      "r"(detail::shared_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

VDIT_DEVICE void bulk_store_commit() {
#if defined(VDIT_EMU)
  emu::bulk_store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#endif
}

// Until at most N of this thread's groups are unfinished: written, so that it can be read in global memory.
template <int N>
VDIT_DEVICE void bulk_store_wait() {
#if defined(VDIT_EMU)
  emu::bulk_store_wait(N, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

// The same, but only until their shared memory has been read and may be used again. A block must not end
// before that.
template <int N>
VDIT_DEVICE void bulk_store_wait_read() {
#if defined(VDIT_EMU)
  emu::bulk_store_wait(N, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
#endif
}

// ---- wgmma: d [64, N] (+)= a [64, K] b [N, K]^T, by a whole warpgroup -----------------------------------
// K is 32 bytes: 16 values of half_t or bfloat16_t (d is fp32), 32 of int8_t (d is int32). uint8_t stands for
// an unsigned a with a signed b. b comes from shared memory, a from there or from registers.
//
// Registers: warp w of the warpgroup and lane 4 * g + t hold rows 16 * w + g and 8 further on. d[i] is at row
// 16 * w + g + i / 2 % 2 * 8, column i / 4 * 8 + t * 2 + i % 2. a is as in mma_m16n8k16.

enum class Major {
  kK,   // rows of b, contiguous along k
  kMN,  // contiguous along n, as V lies in attention; 2-byte types only
};

// A matrix in shared memory that starts at `smem`, in units of 8 rows (or 8 columns along n) by the width of
// the swizzle. `stride_bytes` is the step from 8 to 8 along n or m (kK), along k (kMN). `leading_bytes`:
//   kK:  the step from 8 to 8 along k, without a swizzle only (otherwise ignored);
//   kMN: the step from one swizzle's width along n to the next.
// Without a swizzle kMN has the two the other way round: stride_bytes along n, leading_bytes along k.
// Tiles whose pattern starts at a multiple of 1024 bytes need no more; wgmma_advance steps inside of one.
VDIT_DEVICE uint64_t wgmma_descriptor(void const* smem, SmemSwizzle swizzle, int leading_bytes,
                                      int stride_bytes, Site at = Site::here()) {
#if defined(VDIT_EMU)
  uint32_t const address = emu::shared_address("wgmma_descriptor", at, smem);
#else
  uint32_t const address = detail::shared_address(smem);
#endif
  uint64_t const mode = swizzle == SmemSwizzle::k128  ? 1
                        : swizzle == SmemSwizzle::k64 ? 2
                        : swizzle == SmemSwizzle::k32 ? 3
                                                      : 0;
  auto const field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes >> 4 & 0x3fff); };
  return field(address) | field(static_cast<uint32_t>(leading_bytes)) << 16 |
         field(static_cast<uint32_t>(stride_bytes)) << 32 | mode << 62;
}

// The same matrix `bytes` further on (a multiple of 16): a step along k is 32 bytes inside a kK row.
// NOTE: only the low word is added to, where the address is: it stays below 2^14, and a carry would cost an
// instruction for each product.
VDIT_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
  uint32_t const low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return (descriptor & 0xffffffff00000000u) | low;
}

#if !defined(VDIT_EMU)
namespace detail {

// CuTe's statement of each instruction, so that no list of 128 registers is written here.
template <class T, int N, Major kMajorB>
struct WgmmaOp;

#define VDIT_WGMMA_FLOAT(T, n, name)                                                     \
  template <Major kMajorB>                                                               \
  struct WgmmaOp<T, n, kMajorB> {                                                        \
    static constexpr auto kK = cute::SM90::GMMA::Major::K;                               \
    static constexpr auto kB =                                                           \
        kMajorB == Major::kK ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN; \
    using SS = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_SS<kK, kB>;                 \
    using RS = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_RS<kK, kB>;                 \
  };
#define VDIT_WGMMA(n)                                           \
  VDIT_WGMMA_FLOAT(cute::half_t, n, F16F16)                     \
  VDIT_WGMMA_FLOAT(cute::bfloat16_t, n, BF16BF16)               \
  template <>                                                   \
  struct WgmmaOp<int8_t, n, Major::kK> {                        \
    using SS = cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_SS_TN; \
    using RS = cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_RS_TN; \
  };                                                            \
  template <>                                                   \
  struct WgmmaOp<uint8_t, n, Major::kK> {                       \
    using SS = cute::SM90::GMMA::MMA_64x##n##x32_S32U8S8_SS_TN; \
    using RS = cute::SM90::GMMA::MMA_64x##n##x32_S32U8S8_RS_TN; \
  };
VDIT_WGMMA(16)
VDIT_WGMMA(32)
VDIT_WGMMA(48)
VDIT_WGMMA(64)
VDIT_WGMMA(80)
VDIT_WGMMA(96)
VDIT_WGMMA(112)
VDIT_WGMMA(128)
VDIT_WGMMA(144)
VDIT_WGMMA(160)
VDIT_WGMMA(176)
VDIT_WGMMA(192)
VDIT_WGMMA(208)
VDIT_WGMMA(224)
VDIT_WGMMA(240)
VDIT_WGMMA(256)
#undef VDIT_WGMMA
#undef VDIT_WGMMA_FLOAT

VDIT_DEVICE float& wgmma_register(float& d) { return d; }
VDIT_DEVICE uint32_t& wgmma_register(int32_t& d) { return reinterpret_cast<uint32_t&>(d); }

template <class Op, class D, int kSize, int... I>
VDIT_DEVICE void wgmma_ss(D (&d)[kSize], uint64_t a, uint64_t b, bool accumulate,
                          cute::integer_sequence<int, I...>) {
  auto const scale = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  Op::SS::fma(a, b, wgmma_register(d[I])..., scale);
}
template <class Op, class D, int kSize, int... I>
VDIT_DEVICE void wgmma_rs(D (&d)[kSize], uint32_t const (&a)[4], uint64_t b, bool accumulate,
                          cute::integer_sequence<int, I...>) {
  auto const scale = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  Op::RS::fma(a[0], a[1], a[2], a[3], b, wgmma_register(d[I])..., scale);
}

}  // namespace detail
#endif

namespace detail {
template <class T>
using WgmmaSum = std::conditional_t<sizeof(T) == 1, int32_t, float>;

template <class T, int N, Major kMajorB>
constexpr bool can_wgmma = is_one_of<T, cute::half_t, cute::bfloat16_t, int8_t, uint8_t> && N % 16 == 0 &&
                           N >= 16 && N <= 256 && (kMajorB == Major::kK || sizeof(T) == 2);

#if defined(VDIT_EMU)
template <class T>
constexpr emu::WgmmaType kWgmmaType = std::is_same<T, cute::half_t>::value       ? emu::WgmmaType::kF16
                                      : std::is_same<T, cute::bfloat16_t>::value ? emu::WgmmaType::kBF16
                                      : std::is_same<T, int8_t>::value           ? emu::WgmmaType::kS8
                                                                                 : emu::WgmmaType::kU8S8;
#endif
}  // namespace detail

// Before the first wgmma, and whenever registers of d or a were touched by other instructions since.
VDIT_DEVICE void wgmma_fence(Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::wgmma_fence(at);
#else
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Asynchronous: neither d nor what a and b lie in may be touched before a wait has made it due. Without
// `accumulate`, what d held does not matter.
template <class T, int N, Major kMajorB = Major::kK>
VDIT_DEVICE void wgmma_ss(detail::WgmmaSum<T> (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                          Site at = Site::here()) {
  static_assert(
      detail::can_wgmma<T, N, kMajorB>,
      "wgmma takes half_t, bfloat16_t, int8_t and uint8_t (kK only), N a multiple of 16 up to 256.");
#if defined(VDIT_EMU)
  emu::wgmma({"wgmma_ss", detail::kWgmmaType<T>, N, kMajorB == Major::kMN, reinterpret_cast<uint32_t*>(d),
              nullptr, a, b, accumulate},
             at);
#else
  detail::wgmma_ss<detail::WgmmaOp<T, N, kMajorB> >(d, a, b, accumulate, cute::make_int_sequence<N / 2>{});
#endif
}

template <class T, int N, Major kMajorB = Major::kK>
VDIT_DEVICE void wgmma_rs(detail::WgmmaSum<T> (&d)[N / 2], uint32_t const (&a)[4], uint64_t b,
                          bool accumulate, Site at = Site::here()) {
  static_assert(
      detail::can_wgmma<T, N, kMajorB>,
      "wgmma takes half_t, bfloat16_t, int8_t and uint8_t (kK only), N a multiple of 16 up to 256.");
#if defined(VDIT_EMU)
  emu::wgmma({"wgmma_rs", detail::kWgmmaType<T>, N, kMajorB == Major::kMN, reinterpret_cast<uint32_t*>(d), a,
              0, b, accumulate},
             at);
#else
  detail::wgmma_rs<detail::WgmmaOp<T, N, kMajorB> >(d, a, b, accumulate, cute::make_int_sequence<N / 2>{});
#endif
}

// Closes the group of what was issued since the last commit.
VDIT_DEVICE void wgmma_commit(Site at = Site::here()) {
#if defined(VDIT_EMU)
  emu::wgmma_commit(at);
#else
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Until at most N groups are unfinished.
template <int N>
VDIT_DEVICE void wgmma_wait(Site at = Site::here()) {
  static_assert(N >= 0 && N <= 7, "wgmma_wait leaves 0 to 7 groups unfinished.");
#if defined(VDIT_EMU)
  emu::wgmma_wait(N, at);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
#endif
}

// Keeps the compiler from moving what touches these registers across: it does not know that a wait writes
// them. Around every batch of wgmma, on d, and on a where that is in registers.
template <int kSize>
VDIT_DEVICE void wgmma_fence_operand([[maybe_unused]] float (&r)[kSize]) {
#if !defined(VDIT_EMU)
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(r[i])::"memory");
#endif
}

template <class Int, int kSize>
VDIT_DEVICE void wgmma_fence_operand([[maybe_unused]] Int (&r)[kSize]) {
  static_assert(detail::is_one_of<Int, int32_t, uint32_t>, "wgmma_fence_operand takes 4-byte registers.");
#if !defined(VDIT_EMU)
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(r[i])::"memory");
#endif
}

}  // namespace vdit
