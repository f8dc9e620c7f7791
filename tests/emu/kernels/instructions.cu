// Every device function alone against a plain reference, and the mistakes that the emulator must name.
//
//   instructions CASE    prints "ok", or what went wrong
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "case.h"
#include "common/kernel_util.cuh"
#include "common/launch.h"

namespace vdit {

struct Buffers {
  int32_t* ints;
  uint32_t* words;
  float* floats;
  unsigned long long* longs;
  char* bytes;
};

// ---- Right kernels ---------------------------------------------------------------------------------------

CASE_KERNEL(IndexKernel, 64) {
  int const block = block_idx_x() + grid_dim_x() * (block_idx_y() + grid_dim_y() * block_idx_z());
  p.ints[block * 64 + thread_idx()] = block * 1000 + warp_idx() * 100 + lane_idx() + grid_dim_z() * 100000;
}
void test_index() {
  std::vector<int32_t> out(3 * 2 * 4 * 64, -1);
  launch<IndexKernel>({3, 2, 4}, 0, nullptr, {out.data(), {}, {}, {}, {}});
  for (int i = 0; i < static_cast<int>(out.size()); ++i) {
    EXPECT(out[size_t(i)] == i / 64 * 1000 + i % 64 / 32 * 100 + i % 32 + 400000);
  }
  launch<IndexKernel>({3, 0, 4}, 0, nullptr, {});  // an empty grid runs nothing
}

CASE_KERNEL(ShuffleKernel, 64) {
  int const i = thread_idx();
  p.ints[i] = shfl(i * 10, 5);
  p.ints[64 + i] = shfl(i * 10, lane_idx() + 3);  // modulo 32
  p.floats[i] = shfl_xor(static_cast<float>(i), 12);
  p.longs[i] = shfl_up(static_cast<unsigned long long>(i) << 40, 4);
  double const up = shfl_down(i + 0.5, 7);
  p.floats[64 + i] = static_cast<float>(up);
  uint32_t const votes = ballot(i % 3 == 0);
  p.words[i] = votes;
  p.words[64 + i] = warp_any(i == 40) * 4u + warp_all(i >= 32) * 2u + warp_all(true);
}
void test_shuffles() {
  std::vector<int32_t> ints(128);
  std::vector<uint32_t> words(128);
  std::vector<float> floats(128);
  std::vector<unsigned long long> longs(64);
  launch<ShuffleKernel>({1, 1, 1}, 0, nullptr, {ints.data(), words.data(), floats.data(), longs.data(), {}});
  for (int i = 0; i < 64; ++i) {
    int const warp = i / 32 * 32, lane = i % 32;
    auto const at = static_cast<size_t>(i);
    EXPECT(ints[at] == (warp + 5) * 10);
    EXPECT(ints[64 + at] == (warp + (lane + 3) % 32) * 10);
    EXPECT(floats[at] == static_cast<float>(warp + (lane ^ 12)));
    EXPECT(longs[at] == static_cast<unsigned long long>(lane < 4 ? i : i - 4) << 40);
    EXPECT(floats[64 + at] == static_cast<float>(lane + 7 > 31 ? i : i + 7) + 0.5f);
    uint32_t votes = 0;
    for (int j = 0; j < 32; ++j) votes |= static_cast<uint32_t>((warp + j) % 3 == 0) << j;
    EXPECT(words[at] == votes);
    EXPECT(words[64 + at] == (warp == 32 ? 7u : 1u));
  }
}

CASE_KERNEL(BarrierKernel, 96) {
  int* const shared = reinterpret_cast<int*>(smem);
  shared[thread_idx()] = thread_idx();
  sync_block();
  int sum = shared[95 - thread_idx()];
  sync_block();
  shared[thread_idx()] = sum;
  bool const any = sync_block_or(thread_idx() == 50 && block_idx_x() == 1);
  int const count = sync_block_count(thread_idx() % 5 == 0);
  p.ints[block_idx_x() * 96 + thread_idx()] = shared[(thread_idx() + 40) % 96] + any * 1000 + count * 10000;
}
void test_barriers() {
  std::vector<int32_t> out(2 * 96);
  launch<BarrierKernel>({2, 1, 1}, 96 * 4, nullptr, {out.data(), {}, {}, {}, {}});
  for (int i = 0; i < 192; ++i) {
    EXPECT(out[size_t(i)] == 95 - (i % 96 + 40) % 96 + i / 96 * 1000 + 20 * 10000);
  }
}

CASE_KERNEL(AtomicKernel, 64) {
  int* const shared = reinterpret_cast<int*>(smem);
  if (thread_idx() == 0) shared[0] = 0;
  sync_block();
  int const ticket = atomic_add(shared, 1);
  atomic_add(&p.ints[ticket], 1);
  atomic_max(&p.ints[64], ticket - 100);
  atomic_min(&p.ints[65], -ticket);
  atomic_add(&p.words[0], 3u);
  atomic_max(&p.words[1], 0x80000000u + static_cast<uint32_t>(ticket));
  atomic_min(&p.words[2], 0x80000000u + static_cast<uint32_t>(ticket));
  atomic_or(&p.words[3], 1u << lane_idx());
  atomic_add(p.longs, 1ull << 33);
  atomic_add(p.floats, 0.25f);
}
void test_atomics() {
  std::vector<int32_t> ints(66);
  ints[64] = -1000;
  std::vector<uint32_t> words{0, 0, 0xffffffffu, 0};
  unsigned long long longs = 5;
  float floats = 1;
  launch<AtomicKernel>({1, 1, 3}, 4, nullptr, {ints.data(), words.data(), &floats, &longs, {}});
  for (size_t i = 0; i < 64; ++i) EXPECT(ints[i] == 3);
  EXPECT(ints[64] == -37 && ints[65] == -63);
  EXPECT(words[0] == 3 * 64 * 3 && words[1] == 0x80000000u + 63 && words[2] == 0x80000000u);
  EXPECT(words[3] == 0xffffffffu && longs == 5 + (192ull << 33) && floats == 1 + 48);
}

CASE_KERNEL(LdmatrixKernel, 32) {
  for (int i = lane_idx(); i < 256; i += 32) reinterpret_cast<uint16_t*>(smem)[i] = static_cast<uint16_t>(i);
  sync_warp();
  uint32_t r[4], t[4], r2[2], t2[2];
  ldmatrix_x4(r, smem + lane_idx() * 16);
  ldmatrix_x4_trans(t, smem + lane_idx() * 16);
  ldmatrix_x2(r2, smem + lane_idx() * 16 + (lane_idx() < 16 ? 0 : 1 << 20));  // lanes 16-31 are not looked at
  ldmatrix_x2_trans(t2, smem + (lane_idx() & 15) * 16);
  for (int m = 0; m < 4; ++m) {
    p.words[lane_idx() * 4 + m] = r[m];
    p.words[128 + lane_idx() * 4 + m] = t[m];
    p.ints[lane_idx() * 4 + m] = m < 2 ? r2[m] == r[m] && t2[m] == t[m] : 1;
  }
}
void test_ldmatrix() {
  std::vector<int32_t> same(128);
  std::vector<uint32_t> words(256);
  launch<LdmatrixKernel>({1, 1, 1}, 512, nullptr, {same.data(), words.data(), {}, {}, {}});
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t m = 0; m < 4; ++m) {  // the value at row i, column j of matrix m is 64 m + 8 i + j
      uint32_t const low = 64 * m + lane / 4 * 8 + lane % 4 * 2;
      uint32_t const low_t = 64 * m + lane % 4 * 2 * 8 + lane / 4;
      EXPECT(words[lane * 4 + m] == (low | (low + 1) << 16));
      EXPECT(words[128 + lane * 4 + m] == (low_t | (low_t + 8) << 16));
      EXPECT(same[lane * 4 + m] == 1);
    }
  }
}

// cp.async: what is committed and waited for is there, zero-fill reads nothing, the rest is still poison.
CASE_KERNEL(CpAsyncKernel, 32) {
  char* const mine = smem + thread_idx() * 64;
  cp_async_16(mine, p.bytes + thread_idx() * 16, true);
  cp_async_commit();
  cp_async_16(mine + 16, nullptr, false);
  cp_async_commit();
  cp_async_16(mine + 32, p.bytes, true);
  cp_async_commit();
  cp_async_16(mine + 48, p.bytes, true);
  cp_async_wait<1>();
  for (int i = 0; i < 64; ++i) p.bytes[1024 + thread_idx() * 64 + i] = mine[i];
  cp_async_wait<0>();
  for (int i = 0; i < 64; ++i) p.bytes[4096 + thread_idx() * 64 + i] = mine[i];
}
void test_cp_async() {
  std::vector<char> bytes(8192);
  for (int i = 0; i < 512; ++i) bytes[size_t(i)] = static_cast<char>(i % 97);
  alignas(16) static char source[8192];
  std::copy(bytes.begin(), bytes.end(), source);
  launch<CpAsyncKernel>({1, 1, 1}, 2048, nullptr, {{}, {}, {}, {}, source});
  for (int i = 0; i < 2048; ++i) {
    int const piece = i % 64 / 16;
    char const early = piece == 0 ? source[i / 64 * 16 + i % 16] : piece == 1 ? '\0' : '\xff';
    char const late = piece == 2 ? source[i % 16] : early;
    EXPECT(source[1024 + i] == early);
    EXPECT(source[4096 + i] == late);
  }
}

CASE_KERNEL(ArithmeticKernel, 32) {
  float const x = static_cast<float>(lane_idx()) - 16.0f;
  p.floats[lane_idx()] = fast_exp2(x);
  p.floats[32 + lane_idx()] = fast_exp2(lane_idx() == 0 ? -INFINITY : fast_log2(4.0f));
  p.floats[64 + lane_idx()] = fast_rcp(x + 0.5f) * fast_rsqrt(4.0f);
  float2 const h = unpack2<cute::half_t>(pack2<cute::half_t>(x + 2049.0f, 65519.0f));
  float2 const b = unpack2<cute::bfloat16_t>(pack2<cute::bfloat16_t>(x / 4, 257.0f));
  p.floats[96 + lane_idx()] = h.x;
  p.floats[128 + lane_idx()] = h.y;
  p.floats[160 + lane_idx()] = b.x;
  p.floats[192 + lane_idx()] = b.y;
}

// 2^x for the p.ints[0] numbers in p.floats.
CASE_KERNEL(FmaExp2Kernel, 32) {
  for (int i = thread_idx(); i < p.ints[0]; i += 32) p.floats[i] = fma_exp2(p.floats[i]);
}
void test_fma_exp2() {
  std::vector<float> x = {0, -INFINITY, -1e30f, -127, -1, -20, 7, NAN};
  std::vector<float> const expected = {1, 0, 0, 0, 0.5f, 0x1p-20f, 128, NAN};
  for (int i = -125 * 64; i < 16 * 64; ++i) x.push_back(static_cast<float>(i) / 64 + 0.003f);
  std::vector<float> y = x;
  int32_t count = static_cast<int32_t>(x.size());
  launch<FmaExp2Kernel>({1, 1, 1}, 0, nullptr, {&count, {}, y.data(), {}, {}});
  for (size_t i = 0; i < 7; ++i) EXPECT(y[i] == expected[i]);
  EXPECT(y[7] != y[7]);
  for (size_t i = 8; i < y.size(); ++i) EXPECT(std::abs(y[i] / std::exp2(double{x[i]}) - 1) < 4e-6);
}

void test_arithmetic() {
  std::vector<float> out(224);
  launch<ArithmeticKernel>({1, 1, 1}, 0, nullptr, {{}, {}, out.data(), {}, {}});
  for (size_t i = 0; i < 32; ++i) {
    float const x = static_cast<float>(i) - 16;
    EXPECT(out[i] == std::ldexp(1.0f, static_cast<int>(x)));
    EXPECT(out[32 + i] == (i == 0 ? 0.0f : 4.0f));
    EXPECT(out[64 + i] == 0.5f / (x + 0.5f));
    float const big = x + 2049;  // from 2048 on, halves are even
    EXPECT(out[96 + i] == (big <= 2048 ? big : std::nearbyint(big / 2) * 2));
    EXPECT(out[128 + i] == 65504.0f);
    EXPECT(out[160 + i] == x / 4);
    EXPECT(out[192 + i] == 256.0f);  // a tie, to even
  }
}

CASE_KERNEL(BytesKernel, 32) {
  int const i = thread_idx();
  p.words[i] = byte_perm(0x83028100u, 0x87068504u, 0x11111111u * static_cast<uint32_t>(i % 16));
  p.words[32 + i] = byte_perm(0x44332211u, 0x88776655u, 0xabcd0000u | 0x7162u);  // only four nibbles matter
  p.ints[i] = round_to_int(0.5f * static_cast<float>(i - 16));
  int32_t square[4];
  for (int j = 0; j < 4; ++j) square[j] = 4 * i + j;
  quad_transpose(square);
  for (int j = 0; j < 4; ++j) p.ints[32 + 4 * i + j] = square[j];
}
void test_bytes() {
  std::vector<uint32_t> words(64);
  std::vector<int32_t> ints(160);
  launch<BytesKernel>({1, 1, 1}, 0, nullptr, {ints.data(), words.data(), {}, {}, {}});
  for (int i = 0; i < 32; ++i) {
    auto const at = static_cast<size_t>(i);
    // Byte n of the eight is n, odd ones with bit 7 set; nibbles from 8 on ask for eight copies of that bit.
    uint32_t const n = static_cast<uint32_t>(i % 8), byte = n % 2 == 0 ? n : n | 0x80u;
    EXPECT(words[at] == 0x01010101u * (i % 16 < 8 ? byte : n % 2 * 255u));
    EXPECT(words[32 + at] == 0x88227733u);
    int const half = i - 16;  // a half goes to the even neighbour
    EXPECT(ints[at] == (half % 2 == 0 ? half / 2 : (half > 0 ? (half + 1) / 4 * 2 : (half - 1) / 4 * 2)));
    for (int j = 0; j < 4; ++j) EXPECT(ints[size_t(32 + 4 * i + j)] == 4 * (i / 4 * 4 + j) + i % 4);
  }
}

// Each thread reads what a thread of another warp wrote, then overwrites its own: three barriers, and a race
// where one is missing, which not every order turns into a wrong result.
template <bool kMissing>
struct NeighbourKernel {
  using Params = Buffers;
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 1;
  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int* const shared = reinterpret_cast<int*>(smem);
    shared[thread_idx()] = thread_idx();
    sync_block();
    int const first = shared[63 - thread_idx()];
    if constexpr (!kMissing) sync_block();
    shared[thread_idx()] = first * 2;  // races with the line above its barrier
    sync_block();
    p.ints[thread_idx()] = shared[63 - thread_idx()];
  }
};
template <bool kMissing>
void test_neighbours() {
  std::vector<int32_t> out(64);
  launch<NeighbourKernel<kMissing>>({2, 1, 1}, 64 * 4, nullptr, {out.data(), {}, {}, {}, {}});
  for (int i = 0; i < 64; ++i) EXPECT(out[size_t(i)] == i * 2);
}

// All 65,536 bit patterns of both 16-bit types through the tensor core, times one: NaN stays NaN, the rest is
// exact, subnormals included.
template <class T>
struct ConvertKernel {
  using Params = Buffers;
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;
  VDIT_DEVICE void operator()(Params const& p, char*) const {
    uint32_t const first =
        static_cast<uint32_t>(block_idx_x()) * 128 + static_cast<uint32_t>(lane_idx() / 4) * 16;
    uint32_t const one = pack2<T>(1.0f, 1.0f) & 0xffffu;
    for (uint32_t k = 0; k < 16; ++k) {  // row g of a holds one value, at column k; b is all ones in row k
      uint32_t const at = static_cast<uint32_t>(lane_idx() % 4) * 2;
      auto const pick = [&](uint32_t base, uint32_t v) {
        return (base == k ? v : 0u) | (base + 1 == k ? v << 16 : 0u);
      };
      uint32_t const a[4] = {pick(at, first + k), 0, pick(at + 8, first + k), 0};
      uint32_t const b[2] = {pick(at, one), pick(at + 8, one)};
      float d[4] = {0, 0, 0, 0};
      mma_m16n8k16<T>(d, a, b);
      if (lane_idx() % 4 == 0) p.floats[first + k] = d[0];
    }
  }
};
template <class T>
void test_conversion() {
  std::vector<float> out(65536);
  launch<ConvertKernel<T>>({512, 1, 1}, 0, nullptr, {{}, {}, out.data(), {}, {}});
  for (uint32_t i = 0; i < 65536; ++i) {
    float const expected = static_cast<float>(T::bitcast(static_cast<uint16_t>(i)));
    EXPECT(std::isnan(expected) ? std::isnan(out[i]) : out[i] == expected);
  }
}

// Blocks one after another, no two at once: what the orders change is only which comes first.
CASE_KERNEL(BlockOrderKernel, 32) {
  if (thread_idx() == 0) p.ints[atomic_add(p.words, 1u)] = block_idx_x() + 5 * block_idx_y();
}
void test_block_order() {
  auto const run = [] {
    std::vector<int32_t> order(35, -1);
    uint32_t count = 0;
    launch<BlockOrderKernel>({5, 7, 1}, 0, nullptr, {order.data(), &count, {}, {}, {}});
    return order;
  };
  std::vector<int32_t> forward(35);
  for (int i = 0; i < 35; ++i) forward[size_t(i)] = i;
#if defined(VDIT_EMU)
  emu::set_order(emu::Order::kForward);
  EXPECT(run() == forward);
  emu::set_order(emu::Order::kReverse);
  EXPECT(run() == std::vector<int32_t>(forward.rbegin(), forward.rend()));
  for (uint64_t seed = 0; seed < 40; ++seed) {
    emu::set_order(emu::Order::kRandom, seed);
    auto order = run();
    EXPECT(order == run() && order != forward);
    std::sort(order.begin(), order.end());
    EXPECT(order == forward);
  }
#endif
}

// ---- Planted mistakes: each must end in an error ----------------------------------------------------------

CASE_KERNEL(DivergentBarrierKernel, 128) {
  if (thread_idx() < 64) sync_block();
}
CASE_KERNEL(TwoBarriersKernel, 128) {
  if (thread_idx() < 64) {
    sync_block();
  } else {
    (void)sync_block_or(true);
  }
}
CASE_KERNEL(MixedCollectivesKernel, 64) {
  if (lane_idx() < 16) {
    p.ints[0] = shfl(1, 0);
  } else {
    p.words[0] = ballot(true);
  }
}
CASE_KERNEL(TwoLinesKernel, 64) {
  int x = 0;
  if (warp_idx() == 1 && lane_idx() >= 30) {
    x = shfl(1, 0);
  } else {
    x = shfl(2, 0);
  }
  p.ints[0] = x;
}
CASE_KERNEL(EarlyExitKernel, 64) {
  if (thread_idx() == 7) return;
  p.ints[0] = shfl_xor(thread_idx(), 1);
}
CASE_KERNEL(CrossedWaitKernel, 64) {  // each warp waits for what the other never does
  if (warp_idx() == 0) {
    if (lane_idx() != 3) sync_warp();
    sync_block();
  } else {
    sync_block();
  }
}
CASE_KERNEL(LdmatrixOutsideKernel, 32) {
  uint32_t r[4];
  ldmatrix_x4(r, smem + lane_idx() * 16 + (lane_idx() == 9 ? 512 : 0));
  p.words[0] = r[0];
}
CASE_KERNEL(LdmatrixMisalignedKernel, 32) {
  uint32_t r[2];
  ldmatrix_x2(r, smem + lane_idx() * 16 + (lane_idx() == 15 ? 2 : 0));
  p.words[0] = r[0];
}
CASE_KERNEL(CpAsyncGlobalKernel, 32) { cp_async_16(p.bytes, p.bytes, true); }
CASE_KERNEL(CpAsyncMisalignedKernel, 32) { cp_async_16(smem, p.bytes + 8, true); }
CASE_KERNEL(OverrunKernel, 32) { reinterpret_cast<float*>(smem)[thread_idx() + (thread_idx() == 31)] = 1.0f; }
CASE_KERNEL(TrapKernel, 32) {
  if (block_idx_y() == 1 && thread_idx() == 6) trap("the plan has 3 blocks, got 4");
}
CASE_KERNEL(ThrowKernel, 32) {
  sync_block();
#if defined(VDIT_EMU)  // the GPU has no exceptions; here it is some helper on the host that throws
  if (thread_idx() == 20) throw std::out_of_range("thrown in a kernel");
#endif
  sync_block();
}

template <class Kernel>
std::function<void()> broken(Grid grid = {1, 1, 1}, size_t smem_bytes = 512) {
  return [=] {
    // On the stack, which is never mapped near the heap that shared memory comes from.
    alignas(16) char memory[1024] = {};
    launch<Kernel>(grid, smem_bytes, nullptr,
                   {reinterpret_cast<int32_t*>(memory), reinterpret_cast<uint32_t*>(memory),
                    reinterpret_cast<float*>(memory), reinterpret_cast<unsigned long long*>(memory), memory});
  };
}

// An error must not spoil what is run after it.
void test_after_error() {
  try {
    broken<ThrowKernel>()();
  } catch (std::out_of_range const&) {
    test_barriers();
    test_shuffles();
    return;
  }
  throw std::runtime_error("what the kernel threw did not come out of launch.");
}

}  // namespace vdit

int main(int, char** arguments) {
  using namespace vdit;
  return run_case(
      {
          {"index", test_index},
          {"shuffles", test_shuffles},
          {"barriers", test_barriers},
          {"atomics", test_atomics},
          {"ldmatrix", test_ldmatrix},
          {"cp_async", test_cp_async},
          {"arithmetic", test_arithmetic},
          {"bytes", test_bytes},
          {"fma_exp2", test_fma_exp2},
          {"f16_values", test_conversion<cute::half_t>},
          {"bf16_values", test_conversion<cute::bfloat16_t>},
          {"block_order", test_block_order},
          {"neighbours", test_neighbours<false>},
          {"neighbours_race", test_neighbours<true>},
          {"after_error", test_after_error},
          {"divergent_barrier", broken<DivergentBarrierKernel>()},
          {"two_barriers", broken<TwoBarriersKernel>()},
          {"mixed_collectives", broken<MixedCollectivesKernel>()},
          {"two_lines", broken<TwoLinesKernel>()},
          {"early_exit", broken<EarlyExitKernel>()},
          {"crossed_wait", broken<CrossedWaitKernel>()},
          {"ldmatrix_outside", broken<LdmatrixOutsideKernel>()},
          {"ldmatrix_misaligned", broken<LdmatrixMisalignedKernel>()},
          {"cp_async_global", broken<CpAsyncGlobalKernel>()},
          {"cp_async_misaligned", broken<CpAsyncMisalignedKernel>()},
          {"overrun", broken<OverrunKernel>({1, 1, 1}, 128)},
          {"trap", broken<TrapKernel>({1, 2, 1})},
          {"throw", broken<ThrowKernel>()},
          {"too_much_shared", broken<TrapKernel>({1, 1, 1}, 300000)},
          {"too_wide_grid", broken<TrapKernel>({1, 65536, 1})},
      },
      arguments[1]);
}
