// Every function of device_sm90.h once, in a kernel that is only compiled: nvcc must take the GPU bodies, and
// ptxas must neither spill nor serialise the wgmmas.
#include "common/device.h"
#include "common/device_sm90.h"
#include "common/launch.h"

namespace vdit {

struct EveryParams {
  TensorMap maps[4];  // of rank 2 to 5
  float* out;
  char const* bytes;
  int tiles;
};

template <class T, int N, Major kMajorB>
struct EveryKernel {
  using Params = EveryParams;
  using Sum = detail::WgmmaSum<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kTile = 32768;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    auto* const full = reinterpret_cast<Barrier*>(smem + 4 * kTile);
    auto* const empty = full + 1;
    if (thread_idx() == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 1);
      fence_barrier_init();
      tma_prefetch(p.maps[0]);
      prefetch_l2(p.bytes);
    }
    sync_block();
    if (warp_idx() >= 4) {
      produce(p, smem, full, empty);
    } else {
      consume(p, smem, full, empty);
    }
  }

  VDIT_DEVICE void produce(Params const& p, char* smem, Barrier* full, Barrier* empty) const {
    set_max_registers_down<40>();
    if (warp_idx() == 4 && elect_one()) {
      for (int i = 0; i < p.tiles; ++i) {
        barrier_wait(empty, (i & 1) ^ 1);
        barrier_expect(full, 4 * 8192);
        barrier_arrive_expect(full, 4096);
        tma_load(smem, p.maps[0], full, 0, i);
        tma_load(smem + kTile, p.maps[1], full, 0, i, 1, CacheHint::kEvictFirst);
        tma_load(smem + 2 * kTile, p.maps[2], full, 0, i, 1, 2, CacheHint::kEvictLast);
        tma_load(smem + 3 * kTile, p.maps[3], full, 0, i, 1, 2, 3);
        bulk_load(smem, p.bytes, 4096, full);
      }
    }
    named_arrive(1, 256);
  }

  VDIT_DEVICE void consume(Params const& p, char* smem, Barrier* full, Barrier* empty) const {
    set_max_registers_up<216>();
    Sum d[N / 2], e[N / 2];
    for (int i = 0; i < N / 2; ++i) e[i] = 0;
    uint64_t const a = wgmma_descriptor(smem, SmemSwizzle::k128, 16, 1024);
    uint64_t const b = wgmma_descriptor(smem + kTile, SmemSwizzle::k128, 8192, 1024);
    for (int i = 0; i < p.tiles; ++i) {
      while (!barrier_try(full, i & 1)) {
      }
      wgmma_fence_operand(d);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_ss<T, N, kMajorB>(d, wgmma_advance(a, k * 32),
                                wgmma_advance(b, kMajorB == Major::kK ? k * 32 : k * 2048), k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence_operand(d);
      uint32_t r[4];
      for (int j = 0; j < 4; ++j)
        r[j] = static_cast<uint32_t>(d[2 * j]) * 3u + static_cast<uint32_t>(d[2 * j + 1]);
      wgmma_fence_operand(r);
      wgmma_fence_operand(e);
      wgmma_fence();
      wgmma_rs<T, N, kMajorB>(e, r, b, true);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence_operand(e);
      if (elect_one() && warp_idx() == 0) barrier_arrive(empty);
    }
    for (int i = 0; i < N / 2; ++i) p.out[thread_idx() * (N / 2) + i] = static_cast<float>(e[i]);
    uint32_t const r[4] = {detail::bits_as<uint32_t>(e[0]), detail::bits_as<uint32_t>(e[1]), 2, 3};
    stmatrix_x4(smem + thread_idx() * 16, r);
    stmatrix_x4_trans(smem + 2048 + thread_idx() * 16, r);
    fence_async_proxy();
    named_sync(1, 256);
    if (thread_idx() == 0) {
      tma_store(p.maps[0], smem, 0, 0);
      tma_store(p.maps[1], smem, 0, 0, 0);
      bulk_store_commit();
      tma_store(p.maps[2], smem, 0, 0, 0, 0);
      tma_store(p.maps[3], smem, 0, 0, 0, 0, 0);
      bulk_store_commit();
      bulk_store_wait<1>();
      bulk_store_wait_read<0>();
    }
  }
};

void launch_every(void* stream, void* q, float* out) {
  EveryParams p = {};
  p.maps[0] = make_tensor_map(q, 2, {128, 4096}, {256}, {64, 64}, SmemSwizzle::k128);
  p.out = out;
  constexpr size_t kSmemBytes = 4 * 32768 + 64;
  launch<EveryKernel<cute::bfloat16_t, 64, Major::kK>>({1, 1, 1}, kSmemBytes, stream, p);
  launch<EveryKernel<cute::half_t, 128, Major::kMN>>({1, 1, 1}, kSmemBytes, stream, p);
  launch<EveryKernel<cute::bfloat16_t, 176, Major::kMN>>({1, 1, 1}, kSmemBytes, stream, p);
  launch<EveryKernel<int8_t, 128, Major::kK>>({1, 1, 1}, kSmemBytes, stream, p);
  launch<EveryKernel<uint8_t, 128, Major::kK>>({1, 1, 1}, kSmemBytes, stream, p);
}

}  // namespace vdit
