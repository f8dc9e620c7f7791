// Hopper's instructions, each against a plain loop, and the mistakes that the emulator must name.
//
//   hopper CASE    prints "ok", or what went wrong
#include <string>
#include <vector>

#include "case.h"
#include "common/device.h"
#include "common/device_sm90.h"
#include "common/launch.h"

namespace vdit {

struct Buffers {
  TensorMap map, other;
  int32_t* ints;
  uint32_t* words;
  float* floats;
  char* bytes;
  int corner[5];
  int slot;  // where in shared memory, in lines of 128 bytes
  int size;
};

constexpr int kBarrierAt = 65536;  // in shared memory, past everything else
constexpr size_t kSmemBytes = kBarrierAt + 1024;

// `count` barriers that `arrivals` threads complete.
VDIT_DEVICE Barrier* make_barriers(char* smem, int count, int arrivals) {
  auto* const barriers = reinterpret_cast<Barrier*>(smem + kBarrierAt);
  if (thread_idx() == 0) {
    for (int i = 0; i < count; ++i) barrier_init(&barriers[i], arrivals);
    fence_barrier_init();
  }
  sync_block();
  return barriers;
}

template <class T>
std::vector<T> numbers(size_t count, unsigned seed) {  // small integers, whose sums are exact; uint8_t: any
  std::vector<T> all(count);
  for (auto& x : all) {
    seed = seed * 1664525u + 1013904223u;
    if constexpr (std::is_same<T, uint8_t>::value) {
      x = static_cast<uint8_t>(seed >> 24);
    } else {
      x = static_cast<T>(static_cast<float>(static_cast<int>(seed >> 24) % 9 - 4));
    }
  }
  return all;
}

// ---- Barriers --------------------------------------------------------------------------------------------

// Warp 0 writes, warps 1 and 2 read, over two barriers of which each side only counts on one.
CASE_KERNEL(NamedKernel, 128) {
  int* const shared = reinterpret_cast<int*>(smem);
  if (warp_idx() == 3) return;
  for (int round = 0; round < 5; ++round) {
    if (warp_idx() == 0) {
      if (round > 0) named_sync(2, 96);
      shared[lane_idx()] = round * 100 + lane_idx();
      named_arrive(1, 96);
    } else {
      named_sync(1, 96);
      p.ints[round * 64 + thread_idx() - 32] = shared[31 - lane_idx()];
      if (round < 4) named_arrive(2, 96);
    }
  }
}
void test_named() {
  std::vector<int32_t> out(5 * 64);
  Buffers p = {};
  p.ints = out.data();
  launch<NamedKernel>({2, 1, 1}, kSmemBytes, nullptr, p);
  for (int i = 0; i < 5 * 64; ++i) EXPECT(out[size_t(i)] == i / 64 * 100 + 31 - i % 32);
}

// An mbarrier as a block barrier for 96 of 128 threads, asked by all, in several phases.
CASE_KERNEL(ArriveKernel, 128) {
  int* const shared = reinterpret_cast<int*>(smem);
  Barrier* const barrier = make_barriers(smem, 2, 96);
  if (warp_idx() < 3 && !barrier_try(barrier, 1)) trap("the phase before the first is not over");
  for (int round = 0; round < 4; ++round) {
    if (warp_idx() < 3) {
      shared[thread_idx()] = round * 1000 + thread_idx();
      barrier_arrive(&barrier[0]);
    }
    if (warp_idx() == 3) {
      while (!barrier_try(&barrier[0], round & 1)) {
      }
    } else {
      barrier_wait(&barrier[0], round & 1);
    }
    p.ints[round * 128 + thread_idx()] = shared[95 - thread_idx() % 96];
    sync_block();
  }
}
void test_arrive() {
  std::vector<int32_t> out(4 * 128);
  Buffers p = {};
  p.ints = out.data();
  launch<ArriveKernel>({2, 1, 1}, kSmemBytes, nullptr, p);
  for (int i = 0; i < 512; ++i) EXPECT(out[size_t(i)] == i / 128 * 1000 + 95 - i % 128 % 96);
}

// One lane of each warp, the same one twice.
CASE_KERNEL(ElectKernel, 64) {
  if (elect_one()) atomic_add(&p.ints[warp_idx()], 1 + lane_idx() * 1000);
  if (elect_one()) atomic_add(&p.ints[warp_idx()], 1 - lane_idx() * 1000);
}
void test_elect() {
  std::vector<int32_t> out(2);
  Buffers p = {};
  p.ints = out.data();
  launch<ElectKernel>({1, 1, 1}, 0, nullptr, p);
  EXPECT(out[0] == 2 && out[1] == 2);
}

CASE_KERNEL(StmatrixKernel, 32) {
  uint32_t r[4], back[4];
  for (uint32_t m = 0; m < 4; ++m)
    r[m] = m * 64 + static_cast<uint32_t>(lane_idx()) * 2 +
           (m * 64 + static_cast<uint32_t>(lane_idx()) * 2 + 1) * 65536;
  stmatrix_x4(smem + lane_idx() * 16, r);  // value 64 m + 8 i + j at row i, column j of matrix m
  stmatrix_x4_trans(smem + 512 + lane_idx() * 16, r);
  sync_warp();
  ldmatrix_x4_trans(back, smem + 512 + lane_idx() * 16);
  for (int i = lane_idx(); i < 256; i += 32) p.ints[i] = reinterpret_cast<uint16_t const*>(smem)[i];
  for (int m = 0; m < 4; ++m) p.ints[256 + lane_idx() * 4 + m] = back[m] == r[m];
}
void test_stmatrix() {
  std::vector<int32_t> out(384);
  Buffers p = {};
  p.ints = out.data();
  launch<StmatrixKernel>({1, 1, 1}, 1024, nullptr, p);
  for (int i = 0; i < 256; ++i) EXPECT(out[size_t(i)] == i);
  for (size_t i = 256; i < 384; ++i) EXPECT(out[i] == 1);
}

// The producer gives registers away that the consumers wait for.
CASE_KERNEL(RegisterKernel, 384) {
  if (warp_idx() < 4) {
    if (p.slot == 0) set_max_registers_down<24>();
  } else {
    set_max_registers_up<240>();
  }
}
void test_registers() { launch<RegisterKernel>({1, 1, 1}, 0, nullptr, {}); }

// ---- The copy engine -------------------------------------------------------------------------------------

template <class T>
VDIT_DEVICE void load_box(T* to, Buffers const& p, int rank, Barrier* barrier) {
  int const* c = p.corner;
  if (rank == 2) tma_load(to, p.map, barrier, c[0], c[1]);
  if (rank == 3) tma_load(to, p.map, barrier, c[0], c[1], c[2], CacheHint::kEvictFirst);
  if (rank == 4) tma_load(to, p.map, barrier, c[0], c[1], c[2], c[3], CacheHint::kEvictLast);
  if (rank == 5) tma_load(to, p.map, barrier, c[0], c[1], c[2], c[3], c[4]);
}

// Shared memory before the wait and after it, to global memory; p.size is the rank and the box's bytes.
CASE_KERNEL(LoadKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  int const rank = p.size / 65536, bytes = p.size % 65536;
  if (thread_idx() == 0) {
    tma_prefetch(p.map);
    load_box(smem + p.slot * 128, p, rank, barrier);
    barrier_arrive_expect(barrier, bytes);
  }
  sync_warp();
  for (int i = thread_idx(); i < 32768; i += 32) p.bytes[i] = smem[i];
  sync_warp();
  barrier_wait(barrier, 0);
  for (int i = thread_idx(); i < 32768; i += 32) p.bytes[32768 + i] = smem[i];
}

struct BoxCase {
  int element_bytes;
  std::vector<int64_t> sizes, strides;  // elements
  std::vector<int> box, corner;
  SmemSwizzle swizzle;
  int slot;
};

TensorMap map_of(BoxCase const& c, void* base) {
  std::vector<int64_t> bytes;
  for (auto stride : c.strides) bytes.push_back(stride * c.element_bytes);
  int const* x = c.box.data();
  int64_t const *n = c.sizes.data(), *t = bytes.data();
  switch (c.sizes.size()) {
    case 2: return make_tensor_map(base, c.element_bytes, {n[0], n[1]}, {t[0]}, {x[0], x[1]}, c.swizzle);
    case 3:
      return make_tensor_map(base, c.element_bytes, {n[0], n[1], n[2]}, {t[0], t[1]}, {x[0], x[1], x[2]},
                             c.swizzle);
    case 4:
      return make_tensor_map(base, c.element_bytes, {n[0], n[1], n[2], n[3]}, {t[0], t[1], t[2]},
                             {x[0], x[1], x[2], x[3]}, c.swizzle);
    default:
      return make_tensor_map(base, c.element_bytes, {n[0], n[1], n[2], n[3], n[4]}, {t[0], t[1], t[2], t[3]},
                             {x[0], x[1], x[2], x[3], x[4]}, c.swizzle);
  }
}

// For every element of the box: each(byte of shared memory, element of the tensor or -1), by the book.
template <class Each>
void for_elements(BoxCase const& c, Each const& each) {
  int64_t count = 1;
  for (int side : c.box) count *= side;
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, element = 0;
    bool inside = true;
    for (size_t d = 0; d < c.box.size(); ++d) {
      int64_t const at = rest % c.box[d] + c.corner[d];
      rest /= c.box[d];
      inside = inside && at >= 0 && at < c.sizes[d];
      element += at * (d == 0 ? 1 : c.strides[d - 1]);
    }
    int64_t byte = c.slot * 128 + i * c.element_bytes;
    if (c.swizzle == SmemSwizzle::k128) byte ^= (byte / 128 % 8) * 16;
    if (c.swizzle == SmemSwizzle::k64) byte ^= (byte / 128 % 4) * 16;
    if (c.swizzle == SmemSwizzle::k32) byte ^= (byte / 128 % 2) * 16;
    each(static_cast<size_t>(byte), inside ? element : -1);
  }
}

std::vector<BoxCase> box_cases() {
  return {
      {2, {72, 40}, {80}, {64, 8}, {0, 0}, SmemSwizzle::k128, 0},
      {2, {72, 40}, {80}, {64, 24}, {0, 8}, SmemSwizzle::k128, 13},   // an odd slot: the swizzle goes on
      {2, {72, 40}, {80}, {64, 16}, {16, 30}, SmemSwizzle::k128, 3},  // past both edges
      {2, {72, 40}, {80}, {64, 16}, {-8, -5}, SmemSwizzle::k128, 5},  // before both
      {2, {72, 40}, {80}, {64, 16}, {80, 3}, SmemSwizzle::k128, 1},   // outside altogether
      {2, {72, 40}, {80}, {32, 16}, {41, 3}, SmemSwizzle::k64, 7},
      {2, {72, 40}, {80}, {16, 32}, {7, 11}, SmemSwizzle::k32, 9},
      {2, {72, 40}, {80}, {72, 5}, {1, 36}, SmemSwizzle::kNone, 2},
      {1, {200, 40}, {208}, {128, 9}, {77, 2}, SmemSwizzle::k128, 11},
      {1, {200, 40}, {208}, {256, 9}, {-3, 2}, SmemSwizzle::kNone, 0},
      {2, {64, 50, 3}, {64, 3200}, {64, 10, 2}, {0, 45, 2}, SmemSwizzle::k128, 6},
      {2,
       {96, 20, 3, 2},
       {288, 96, 5760},
       {64, 16, 1, 1},
       {64, 8, 2, 1},
       SmemSwizzle::k128,
       21},  // [b,s,h,d]
      {2, {96, 20, 3, 2}, {288, 96, 5760}, {32, 5, 3, 2}, {64, 18, -1, 1}, SmemSwizzle::k64, 4},
      {2, {16, 5, 4, 3, 2}, {16, 80, 320, 960}, {16, 3, 2, 2, 2}, {0, 1, 3, 1, 0}, SmemSwizzle::k32, 1},
  };
}

int rank_and_bytes(BoxCase const& c) {
  int bytes = c.element_bytes;
  for (int side : c.box) bytes *= side;
  return static_cast<int>(c.box.size()) * 65536 + bytes;
}

Buffers box_buffers(BoxCase const& c, std::vector<char>& tensor, char* bytes) {
  Buffers p = {};
  p.map = map_of(c, tensor.data());
  p.bytes = bytes;
  for (size_t i = 0; i < c.corner.size(); ++i) p.corner[i] = c.corner[i];
  p.slot = c.slot;
  p.size = rank_and_bytes(c);
  return p;
}

void test_tma_load() {
  std::vector<char> tensor(65536), out(65536);
  for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<char>(i * 7 + i / 256 + 1);
  for (auto const& c : box_cases()) {
    launch<LoadKernel>({1, 1, 1}, kSmemBytes, nullptr, box_buffers(c, tensor, out.data()));
    for (size_t i = 0; i < 32768; ++i) EXPECT(out[i] == '\xff');  // poison until waited for
    std::vector<char> expected(32768, '\xff');
    for_elements(c, [&](size_t byte, int64_t element) {
      for (int i = 0; i < c.element_bytes; ++i) {
        expected[byte + size_t(i)] = element < 0 ? '\0' : tensor[size_t(element * c.element_bytes + i)];
      }
    });
    EXPECT(std::equal(expected.begin(), expected.end(), out.begin() + 32768));
  }
}

// Two boxes of 8 rows, the second from row p.slot on, to where its rows lie after the first one's.
CASE_KERNEL(OverlapKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) {
    tma_load(smem, p.map, barrier, 0, 0);
    tma_load(smem + p.slot * 128, p.map, barrier, 0, p.size);
    barrier_arrive_expect(barrier, 2 * 8 * 128);
  }
  barrier_wait(barrier, 0);
  for (int i = thread_idx(); i < 16 * 128; i += 32) p.bytes[i] = smem[i];
}
Buffers overlap_buffers(std::vector<char>& tensor, char* out, int slot, int row) {
  Buffers p = {};
  p.map = map_of({2, {64, 40}, {64}, {64, 8}, {0, 0}, SmemSwizzle::k128, 0}, tensor.data());
  p.bytes = out;
  p.slot = slot;
  p.size = row;
  return p;
}
void test_overlap() {
  std::vector<char> tensor(64 * 40 * 2), out(16 * 128);
  for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<char>(i * 7 + i / 128);
  launch<OverlapKernel>({1, 1, 1}, kSmemBytes, nullptr, overlap_buffers(tensor, out.data(), 5, 5));
  for (size_t i = 0; i < 13 * 128; ++i) {
    EXPECT(out[i / 128 * 128 + ((i / 16 % 8) ^ (i / 128 % 8)) * 16 + i % 16] == tensor[i]);
  }
}
void broken_overlap() {  // other rows to the same place
  std::vector<char> tensor(64 * 40 * 2), out(16 * 128);
  launch<OverlapKernel>({1, 1, 1}, kSmemBytes, nullptr, overlap_buffers(tensor, out.data(), 5, 6));
}

CASE_KERNEL(StoreKernel, 64) {
  for (int i = thread_idx(); i < 32768; i += 64) smem[i] = static_cast<char>(i * 5 + i / 128);
  fence_async_proxy();
  sync_block();
  int const* c = p.corner;
  if (thread_idx() == 0) {
    int const rank = p.size / 65536;
    char const* const from = smem + p.slot * 128;
    if (rank == 2) tma_store(p.map, from, c[0], c[1]);
    if (rank == 3) tma_store(p.map, from, c[0], c[1], c[2]);
    if (rank == 4) tma_store(p.map, from, c[0], c[1], c[2], c[3]);
    if (rank == 5) tma_store(p.map, from, c[0], c[1], c[2], c[3], c[4]);
    bulk_store_commit();
    bulk_store_wait_read<0>();
    smem[0] = 99;  // may be written again
    if (p.size % 2 == 0) bulk_store_wait<0>();
  }
}
void test_tma_store() {
  for (auto const& c : box_cases()) {
    std::vector<char> tensor(65536, 'x'), expected = tensor;
    launch<StoreKernel>({1, 1, 1}, kSmemBytes, nullptr, box_buffers(c, tensor, nullptr));
    for_elements(c, [&](size_t byte, int64_t element) {
      for (size_t i = byte; element >= 0 && i < byte + size_t(c.element_bytes); ++i) {
        expected[size_t(element * c.element_bytes) + i - byte] = static_cast<char>(i * 5 + i / 128);
      }
    });
    EXPECT(tensor == expected);
  }
}

CASE_KERNEL(BulkKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 2);
  if (thread_idx() == 0) {
    barrier_expect(barrier, 160);
    barrier_arrive(barrier);
    bulk_load(smem + 16, p.bytes, 48, barrier);
    bulk_load(smem + 128, p.bytes + 48, 112, barrier);
    barrier_arrive(barrier);
  }
  barrier_wait(barrier, 0);
  for (int i = thread_idx(); i < 256; i += 32) p.ints[i] = smem[i];
}
void test_bulk_load() {
  alignas(16) static char bytes[160];
  for (int i = 0; i < 160; ++i) bytes[i] = static_cast<char>(i - 80);
  std::vector<int32_t> out(256);
  Buffers p = {};
  p.bytes = bytes;
  p.ints = out.data();
  launch<BulkKernel>({1, 1, 1}, kSmemBytes, nullptr, p);
  for (int i = 0; i < 256; ++i) {
    int const at = i >= 16 && i < 64 ? i - 16 : i >= 128 && i < 240 ? i - 80 : -1;
    EXPECT(out[size_t(i)] == (at < 0 ? -1 : bytes[at]));
  }
}

void test_map_errors() {
  alignas(16) static char memory[1024];
  auto const says = [](std::string const& what, auto const& make) {
    try {
      make();
    } catch (std::runtime_error const& error) {
      if (error.what() == "vdit::make_tensor_map: " + what) return;
      throw std::runtime_error("got: " + std::string(error.what()));
    }
    throw std::runtime_error("nothing said: " + what);
  };
  auto const k = SmemSwizzle::k128;
  says("elements must have 1 or 2 bytes, got 4",
       [&] { make_tensor_map(memory, 4, {64, 8}, {128}, {64, 8}, k); });
  says("the rank must be 2 to 5, got 1", [&] { make_tensor_map(memory, 2, {64}, {}, {64}, k); });
  says("rank 2 needs one stride fewer and a box of that rank, got 2 strides and a box of 2",
       [&] { make_tensor_map(memory, 2, {64, 8}, {2, 128}, {64, 8}, k); });
  says("size 1 must be 1 to 2^32, got 0", [&] { make_tensor_map(memory, 2, {64, 0}, {128}, {64, 8}, k); });
  says("side 1 of the box must be 1 to 256, got 257",
       [&] { make_tensor_map(memory, 2, {64, 8}, {128}, {64, 257}, k); });
  says("the stride of dimension 1 must be a multiple of 16 below 2^40 bytes, got 130",
       [&] { make_tensor_map(memory, 2, {64, 8}, {130}, {64, 8}, k); });
  says("a row of the box must be a multiple of 16 bytes, got 12",
       [&] { make_tensor_map(memory, 2, {64, 8}, {128}, {6, 8}, SmemSwizzle::kNone); });
  says("a row of the box must have 64 bytes, the width of its swizzle, got 128",
       [&] { make_tensor_map(memory, 2, {64, 8}, {128}, {64, 8}, SmemSwizzle::k64); });
  try {
    make_tensor_map(memory + 8, 2, {64, 8}, {128}, {64, 8}, k);
  } catch (std::runtime_error const& error) {
    EXPECT(std::string(error.what()).find("the base must be a multiple of 16 bytes, got 0x") !=
           std::string::npos);
    return;
  }
  EXPECT(false);
}

// ---- wgmma -----------------------------------------------------------------------------------------------

// CuTe's own canonical layouts say where an element lies, so that the descriptors' meaning is checked against
// something that the emulator does not know of.
template <class T, SmemSwizzle kSwizzle>
VDIT_HOST_DEVICE constexpr auto atom_k() {
  using namespace cute::SM90::GMMA;
  if constexpr (kSwizzle == SmemSwizzle::k128) {
    return Layout_K_SW128_Atom<T>{};
  } else if constexpr (kSwizzle == SmemSwizzle::k64) {
    return Layout_K_SW64_Atom<T>{};
  } else if constexpr (kSwizzle == SmemSwizzle::k32) {
    return Layout_K_SW32_Atom<T>{};
  } else {
    return Layout_K_INTER_Atom<T>{};
  }
}
template <class T, SmemSwizzle kSwizzle>
VDIT_HOST_DEVICE constexpr auto atom_mn() {
  using namespace cute::SM90::GMMA;
  if constexpr (kSwizzle == SmemSwizzle::k128) {
    return Layout_MN_SW128_Atom<T>{};
  } else if constexpr (kSwizzle == SmemSwizzle::k64) {
    return Layout_MN_SW64_Atom<T>{};
  } else if constexpr (kSwizzle == SmemSwizzle::k32) {
    return Layout_MN_SW32_Atom<T>{};
  } else {
    return Layout_MN_INTER_Atom<T>{};
  }
}

template <class T>
struct ProductParams {
  T const *a, *b;          // [groups * 64, k], [n, k]
  detail::WgmmaSum<T>* d;  // [groups * 64, n]: d as it comes in, plus a b^T
};

// Two warpgroups with 64 rows each, two steps along k.
template <class T, int N, Major kMajorB, SmemSwizzle kSwizzle, bool kRegistersA>
struct ProductKernel {
  using Params = ProductParams<T>;
  using Sum = detail::WgmmaSum<T>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kStep = 32 / sizeof(T), kK = 2 * kStep;
  static constexpr int kWidth = kSwizzle == SmemSwizzle::kNone ? 16 : static_cast<int>(kSwizzle);  // bytes

  // Where the second step along k starts.
  static constexpr int step_bytes(int rows) {
    if (kWidth >= 64) return 32;                   // inside of a row
    return rows / 8 * 8 * kWidth * (32 / kWidth);  // CuTe lays the next columns behind all the rows
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    using namespace cute;
    int const group = thread_idx() / 128, t = thread_idx() % 128;
    // A tile as wide as the swizzle, or wider where that is narrow: rows of kAtomK values.
    constexpr int kAtomK = kWidth / sizeof(T) > kK ? kWidth / sizeof(T) : kK;
    auto const layout_a = tile_to_shape(atom_k<T, kSwizzle>(), Shape<_64, Int<kAtomK>>{});
    char* const at_a = smem + group * 16384;
    Tensor sA = make_tensor(make_smem_ptr(reinterpret_cast<T*>(at_a)), layout_a);
    for (int i = t; i < 64 * kK; i += 128) sA(i / kK, i % kK) = p.a[(group * 64 + i / kK) * kK + i % kK];
    auto const layout_b = [] {
      if constexpr (kMajorB == Major::kK) {
        return tile_to_shape(atom_k<T, kSwizzle>(), Shape<Int<N>, Int<kAtomK>>{});
      } else {
        return tile_to_shape(atom_mn<T, kSwizzle>(), Shape<Int<N>, Int<kK>>{});
      }
    }();
    char* const at_b = smem + 32768;
    Tensor sB = make_tensor(make_smem_ptr(reinterpret_cast<T*>(at_b)), layout_b);
    for (int i = thread_idx(); i < N * kK; i += 256) sB(i / kK, i % kK) = p.b[i];
    fence_async_proxy();
    sync_block();

    bool const none = kSwizzle == SmemSwizzle::kNone;
    uint64_t const a = wgmma_descriptor(at_a, kSwizzle, 64 / 8 * 128, 8 * kWidth);
    uint64_t b;
    int step_b;
    if (kMajorB == Major::kK) {
      b = wgmma_descriptor(at_b, kSwizzle, N / 8 * 128, 8 * kWidth);
      step_b = step_bytes(N);
    } else {  // bricks of 8 along k by the width along n, one after another along n
      int const brick = 8 * kWidth, bricks = N * 2 / kWidth * brick;
      b = none ? wgmma_descriptor(at_b, kSwizzle, bricks, brick)
               : wgmma_descriptor(at_b, kSwizzle, brick, bricks);
      step_b = 2 * bricks;
    }

    Sum d[N / 2];
    auto const place = [&](int i) {
      int const row = group * 64 + t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
      return row * N + i / 4 * 8 + t % 4 * 2 + i % 2;
    };
    for (int i = 0; i < N / 2; ++i) d[i] = p.d[place(i)];
    uint32_t r[2][4];  // before the fence, as it orders what is written to them
    if constexpr (kRegistersA) {
      for (int i = 0; i < 8; ++i) {
        int const row = group * 64 + t / 32 * 16 + t % 32 / 4 + i % 2 * 8, byte = t % 4 * 4 + i / 2 % 2 * 16;
        memcpy(&r[i / 4][i % 4], p.a + row * kK + i / 4 * kStep + byte / static_cast<int>(sizeof(T)), 4);
      }
      wgmma_fence_operand(r[0]);
      wgmma_fence_operand(r[1]);
    }
    wgmma_fence_operand(d);
    wgmma_fence();
    for (int k = 0; k < 2; ++k) {
      uint64_t const bk = wgmma_advance(b, k * step_b);
      if constexpr (kRegistersA) {
        wgmma_rs<T, N, kMajorB>(d, r[k], bk, true);
      } else {
        wgmma_ss<T, N, kMajorB>(d, wgmma_advance(a, k * step_bytes(64)), bk, true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_operand(d);
    for (int i = 0; i < N / 2; ++i) p.d[place(i)] = d[i];
  }
};

// A value of b: signed where a is not.
template <class T>
float value_of_b(T b) {
  if constexpr (std::is_same<T, uint8_t>::value) return static_cast<float>(static_cast<int8_t>(b));
  return static_cast<float>(b);
}

template <class T, int N, Major kMajorB, SmemSwizzle kSwizzle, bool kRegistersA>
void test_product() {
  using Kernel = ProductKernel<T, N, kMajorB, kSwizzle, kRegistersA>;
  constexpr int kK = Kernel::kK;
  auto const a = numbers<T>(128 * kK, 1), b = numbers<T>(size_t(N) * kK, 2);
  auto d = numbers<typename Kernel::Sum>(128 * N, 3);
  auto const start = d;
  launch<Kernel>({1, 1, 1}, kSmemBytes, nullptr, {a.data(), b.data(), d.data()});
  for (int m = 0; m < 128; ++m) {
    for (int n = 0; n < N; ++n) {
      auto sum = static_cast<float>(start[size_t(m * N + n)]);
      for (int k = 0; k < kK; ++k) {
        sum += static_cast<float>(a[size_t(m * kK + k)]) * value_of_b(b[size_t(n * kK + k)]);
      }
      if (static_cast<float>(d[size_t(m * N + n)]) != sum) {
        throw std::runtime_error(kernel_name<Kernel>() + ": d(" + std::to_string(m) + ", " +
                                 std::to_string(n) + ") is " + std::to_string(float(d[size_t(m * N + n)])) +
                                 ", not " + std::to_string(sum));
      }
    }
  }
}

using Half = cute::half_t;
using Brain = cute::bfloat16_t;

void test_products_k() {
  test_product<Brain, 64, Major::kK, SmemSwizzle::k128, false>();
  test_product<Half, 80, Major::kK, SmemSwizzle::k128, true>();
  test_product<Half, 128, Major::kK, SmemSwizzle::k64, false>();
  test_product<Brain, 176, Major::kK, SmemSwizzle::k32, true>();
  test_product<Brain, 256, Major::kK, SmemSwizzle::kNone, false>();
}
void test_products_mn() {
  test_product<Brain, 64, Major::kMN, SmemSwizzle::k128, false>();
  test_product<Half, 192, Major::kMN, SmemSwizzle::k128, true>();
  test_product<Half, 96, Major::kMN, SmemSwizzle::k64, true>();
  test_product<Brain, 112, Major::kMN, SmemSwizzle::k32, false>();
  test_product<Half, 144, Major::kMN, SmemSwizzle::kNone, true>();
}
void test_products_s8() {
  test_product<int8_t, 128, Major::kK, SmemSwizzle::k128, false>();
  test_product<int8_t, 96, Major::kK, SmemSwizzle::k64, true>();
  test_product<int8_t, 16, Major::kK, SmemSwizzle::kNone, true>();
}

void test_products_u8() {
  test_product<uint8_t, 128, Major::kK, SmemSwizzle::k128, false>();
  test_product<uint8_t, 48, Major::kK, SmemSwizzle::k64, true>();
}

// Three groups under way on two accumulators: d0 is due at wait<1>, and d1, which the last group adds to
// without its old contents, only at wait<0>. p.slot plants a mistake.
enum Mistake {
  kNothing,
  kReadEarly,
  kWriteEarly,
  kNoFence,
  kNoProxyFence,
  kOverwrite,
  kDifferentLanes,
  kHalfGroup,
  kNoWait,
  kOutside,
};
CASE_KERNEL(GroupsKernel, 128) {
  auto* const half = reinterpret_cast<Half*>(smem);
  for (int i = thread_idx(); i < 64 * 64; i += 128) half[i] = Half(i % 64 == i / 64 % 64 ? 1.0f : 0.0f);
  for (int i = thread_idx(); i < 64 * 64; i += 128) half[4096 + i] = Half(static_cast<float>(i % 7));
  if (p.slot != kNoProxyFence) fence_async_proxy();
  sync_block();
  if (p.slot == kHalfGroup && warp_idx() == 3) return;
  uint64_t a = wgmma_descriptor(smem, SmemSwizzle::kNone, 128, 256);
  uint64_t const b =
      wgmma_descriptor(smem + (p.slot == kOutside ? 65536 : 8192), SmemSwizzle::kNone, 128, 256);
  if (p.slot == kDifferentLanes && thread_idx() == 77) a = wgmma_advance(a, 16);
  float d0[32], d1[32];
  for (int i = 0; i < 32; ++i) d0[i] = d1[i] = 1.0f;
  if (p.slot != kNoFence) wgmma_fence();
  wgmma_ss<Half, 64>(d0, a, b, false);
  wgmma_ss<Half, 64>(d0, a, b, true);
  wgmma_commit();
  wgmma_ss<Half, 64>(d1, a, b, true);
  wgmma_commit();
  wgmma_ss<Half, 64>(d1, b, a, false);
  wgmma_commit();
  if (p.slot == kReadEarly) p.floats[2 * 4096 + thread_idx()] = d0[3];
  if (p.slot == kWriteEarly) d1[5] = 0.0f;
  if (p.slot == kOverwrite && thread_idx() == 9) half[4096 + 5] = Half(1.0f);
  wgmma_wait<2>();
  for (int i = 0; i < 32; ++i) p.floats[thread_idx() * 32 + i] = d0[i];
  if (p.slot == kNoWait) return;
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) p.floats[4096 + thread_idx() * 32 + i] = d1[i];
}
void test_groups() {
  std::vector<float> out(3 * 4096);
  std::vector<float> a(64 * 16), b(64 * 16);  // as the descriptors read them: bricks of 8x8, two along k
  for (int i = 0; i < 64 * 16; ++i) {
    int const row = i / 16, k = i % 16, at = row / 8 * 128 + row % 8 * 8 + k / 8 * 64 + k % 8;
    a[size_t(i)] = at % 64 == at / 64 % 64 ? 1.0f : 0.0f;
    b[size_t(i)] = static_cast<float>(at % 7);
  }
  Buffers p = {};
  p.floats = out.data();
  launch<GroupsKernel>({1, 1, 1}, kSmemBytes, nullptr, p);
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 32; ++i) {
      int const row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float ab = 0, ba = 0;
      for (int k = 0; k < 16; ++k) {
        ab += a[size_t(row * 16 + k)] * b[size_t(column * 16 + k)];
        ba += b[size_t(row * 16 + k)] * a[size_t(column * 16 + k)];
      }
      EXPECT(out[size_t(t * 32 + i)] == 2 * ab);
      EXPECT(out[size_t(4096 + t * 32 + i)] == ba);
    }
  }
}
template <int kMistake>
void broken_groups() {
  std::vector<float> out(3 * 4096);
  Buffers p = {};
  p.floats = out.data();
  p.slot = kMistake;
  launch<GroupsKernel>({1, 1, 1}, kSmemBytes, nullptr, p);
  printf("read %g\n", static_cast<double>(out[2 * 4096]));
}

// ---- A pipeline ------------------------------------------------------------------------------------------

enum class Slip {
  kNone,
  kStalePhase,
  kEarlyRelease,
  kFewBytes,
  kManyBytes,
  kNoExpect,
  kManyArrivals,
  kNoRelease,
  kNoProducer,
};

struct PipeParams {
  TensorMap a, b, d;  // [m, k] and [k, n] by columns of 64, [m, n] by columns of 64, all k128
  int k_tiles;
  Slip slip;
};

// d = a b: a producer warp brings tiles of 64 along k through two stages, two consumer warpgroups multiply 64
// rows each, b lies as it comes from memory (kMN).
struct PipeKernel {
  using Params = PipeParams;
  using T = Brain;
  static constexpr int kThreads = 384;
  static constexpr int kMinBlocks = 1;
  static constexpr int kStages = 2, kM = 128, kN = 128, kK = 64;
  static constexpr int kBytesA = kM * kK * 2, kBytesB = kK * kN * 2, kStage = kBytesA + kBytesB;
  static constexpr size_t kSmemBytes = kStages * kStage + 1024;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    auto* const full = reinterpret_cast<Barrier*>(smem + kStages * kStage);
    Barrier* const empty = full + kStages;
    if (thread_idx() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(&full[s], 1);
        barrier_init(&empty[s], 2);
      }
      fence_barrier_init();
    }
    sync_block();
    if (thread_idx() < 128) {
      set_max_registers_down<40>();
      if (warp_idx() == 0 && elect_one() && p.slip != Slip::kNoProducer) produce(p, smem, full, empty);
    } else {
      set_max_registers_up<232>();
      consume(p, smem, full, empty);
    }
  }

  VDIT_DEVICE void produce(Params const& p, char* smem, Barrier* full, Barrier* empty) const {
    for (int i = 0; i < p.k_tiles; ++i) {
      int const s = i % kStages, parity = i / kStages & 1;
      char* const stage = smem + s * kStage;
      barrier_wait(&empty[s], parity ^ 1);
      int const wrong = p.slip == Slip::kFewBytes ? -1024 : p.slip == Slip::kManyBytes ? 1024 : 0;
      if (p.slip == Slip::kNoExpect) {
        barrier_arrive(&full[s]);
      } else {
        barrier_arrive_expect(&full[s], kStage + wrong);
      }
      tma_load(stage, p.a, &full[s], i * kK, block_idx_y() * kM);
      tma_load(stage + kBytesA, p.b, &full[s], block_idx_x() * kN, i * kK);
      tma_load(stage + kBytesA + kBytesB / 2, p.b, &full[s], block_idx_x() * kN + 64, i * kK,
               CacheHint::kEvictLast);
    }
  }

  VDIT_DEVICE void release(Params const& p, Barrier* empty) const {
    if (p.slip == Slip::kNoRelease) return;
    if (p.slip == Slip::kManyArrivals || thread_idx() % 128 == 0) barrier_arrive(empty);
  }

  VDIT_DEVICE void consume(Params const& p, char* smem, Barrier* full, Barrier* empty) const {
    int const group = thread_idx() / 128 - 1, t = thread_idx() % 128;
    float d[kN / 2];
    for (int i = 0; i < p.k_tiles; ++i) {
      int const s = i % kStages, parity = i / kStages & 1;
      char* const stage = smem + s * kStage;
      uint64_t const a = wgmma_descriptor(stage + group * 64 * 128, SmemSwizzle::k128, 0, 1024);
      uint64_t const b = wgmma_descriptor(stage + kBytesA, SmemSwizzle::k128, kBytesB / 2, 1024);
      barrier_wait(&full[s], p.slip == Slip::kStalePhase ? 0 : parity);
      wgmma_fence_operand(d);
      wgmma_fence();
      for (int k = 0; k < kK / 16; ++k) {
        wgmma_ss<T, kN, Major::kMN>(d, wgmma_advance(a, k * 32), wgmma_advance(b, k * 2048), i > 0 || k > 0);
      }
      wgmma_commit();
      if (p.slip == Slip::kEarlyRelease) release(p, &empty[s]);
      wgmma_wait<0>();
      wgmma_fence_operand(d);
      if (p.slip != Slip::kEarlyRelease) release(p, &empty[s]);
    }
    store(p, smem + group * (kStage / 2), d, group, t);
  }

  // Through this group's part of the first stage, in the order that the store's swizzle reads.
  VDIT_DEVICE void store(Params const& p, char* to, float const (&d)[kN / 2], int group, int t) const {
    named_sync(1, 256);                    // all have read the stage
    for (int i = 0; i < kN / 2; i += 8) {  // four matrices: rows g and g + 8, two columns of eight
      uint32_t const r[4] = {pack2<T>(d[i], d[i + 1]), pack2<T>(d[i + 2], d[i + 3]),
                             pack2<T>(d[i + 4], d[i + 5]), pack2<T>(d[i + 6], d[i + 7])};
      int const lane = t % 32, row = t / 32 * 16 + lane % 16, column = i * 2 + lane / 16 * 8;
      stmatrix_x4(to + column / 64 * 8192 + row * 128 + (column % 64 / 8 ^ row % 8) * 16, r);
    }
    fence_async_proxy();
    named_sync(2 + group, 128);
    if (t == 0) {
      for (int half = 0; half < 2; ++half) {
        tma_store(p.d, to + half * 8192, block_idx_x() * kN + half * 64, block_idx_y() * kM + group * 64);
      }
      bulk_store_commit();
      bulk_store_wait_read<0>();
    }
  }
};

template <Slip kSlip>
void run_pipe() {
  constexpr int m = 200, n = 192, k = 328;  // all ragged
  auto const a = numbers<Brain>(m * k, 4), b = numbers<Brain>(k * n, 5);
  std::vector<Brain> d(m * n, Brain(99.0f));
  auto const map = [](std::vector<Brain> const& x, int rows, int columns, int side) {
    return make_tensor_map(x.data(), 2, {columns, rows}, {columns * 2}, {64, side}, SmemSwizzle::k128);
  };
  launch<PipeKernel>({2, 2, 1}, PipeKernel::kSmemBytes, nullptr,
                     {map(a, m, k, 128), map(b, k, n, 64), map(d, m, n, 64), (k + 63) / 64, kSlip});
  float worst = 0;
  for (int i = 0; i < m * n; ++i) {
    float sum = 0;
    for (int j = 0; j < k; ++j) sum += float(a[size_t(i / n * k + j)]) * float(b[size_t(j * n + i % n)]);
    float const error = std::abs(float(d[size_t(i)]) - float(Brain(sum)));
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  }
  printf("max error %g\n", static_cast<double>(worst));
}

// ---- Planted mistakes: each must end in an error ---------------------------------------------------------

CASE_KERNEL(NamedDeadlockKernel, 128) {
  if (warp_idx() < 2) named_sync(3, 96);
  if (warp_idx() == 3) named_arrive(4, 128);
}
CASE_KERNEL(NamedCountsKernel, 128) {
  if (warp_idx() < 2) {
    named_sync(3, 128);
  } else {
    named_sync(3, 64);
  }
}
CASE_KERNEL(NamedIdKernel, 64) { named_sync(16, 64); }
CASE_KERNEL(NamedLanesKernel, 64) { named_arrive(1 + lane_idx() / 31, 64); }
CASE_KERNEL(BarrierDeadlockKernel, 64) {
  Barrier* const barrier = make_barriers(smem, 2, 3);
  if (thread_idx() == 40) barrier_arrive_expect(&barrier[1], 512);
  if (warp_idx() == 0) barrier_wait(&barrier[1], 0);
}
CASE_KERNEL(PollDeadlockKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  while (!barrier_try(barrier, 0)) {
  }
}
CASE_KERNEL(UninitialisedKernel, 32) { barrier_wait(reinterpret_cast<Barrier*>(smem + kBarrierAt), 0); }
CASE_KERNEL(InitTwiceKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 1) barrier_init(barrier, 1);
}
CASE_KERNEL(OverwrittenKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 4) *barrier = 0;
  sync_warp();
  if (thread_idx() == 5) barrier_arrive(barrier);
}
CASE_KERNEL(UnfencedInitKernel, 32) {
  auto* const barrier = reinterpret_cast<Barrier*>(smem + kBarrierAt);
  if (thread_idx() == 0) {
    barrier_init(barrier, 1);
    bulk_load(smem, p.bytes, 16, barrier);
  }
}
CASE_KERNEL(LeftoverKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 2);
  if (thread_idx() == 0) barrier_arrive_expect(barrier, 64);
}
CASE_KERNEL(NobodyWaitsKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) {
    barrier_arrive_expect(barrier, 16);
    bulk_load(smem, p.bytes, 16, barrier);
  }
}
CASE_KERNEL(OverArriveKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) barrier_arrive_expect(barrier, 64);
  if (thread_idx() == 0) barrier_arrive(barrier);
}
CASE_KERNEL(TwoLoadsKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) {
    bulk_load(smem, p.bytes, 32, barrier);
    bulk_load(smem + 16, p.bytes, 32, barrier);
  }
}
CASE_KERNEL(LoadSlotKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) tma_load(smem + 64, p.map, barrier, 0, 0);
}
CASE_KERNEL(LoadRankKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  if (thread_idx() == 0) tma_load(smem, p.map, barrier, 0, 0, 0);
}
CASE_KERNEL(LoadCopyKernel, 32) {
  Barrier* const barrier = make_barriers(smem, 1, 1);
  TensorMap const copy = p.map;
  if (thread_idx() == 0) tma_load(smem, copy, barrier, 0, 0);
}
CASE_KERNEL(UnpublishedStoreKernel, 32) {
  if (p.slot == 1) fence_async_proxy();
  for (int i = thread_idx(); i < 1024; i += 32) smem[i] = 1;
  sync_warp();
  if (thread_idx() == 0) tma_store(p.map, smem, 0, 0);
}
CASE_KERNEL(ReusedStoreKernel, 32) {
  for (int i = thread_idx(); i < 1024; i += 32) smem[i] = 1;
  fence_async_proxy();
  sync_warp();
  if (thread_idx() == 0) {
    tma_store(p.map, smem, 0, 0);
    bulk_store_commit();
    if (p.slot == 0) smem[100] = 3;
    if (p.slot == 0) bulk_store_wait<0>();
  }
}

template <class Kernel, int kSlot = 0>
void broken() {
  alignas(128) static char memory[4096];
  Buffers p = {};
  p.map = make_tensor_map(memory, 2, {64, 8}, {128}, {64, 8}, SmemSwizzle::k128);
  p.bytes = memory;
  p.slot = kSlot;
  launch<Kernel>({1, 1, 1}, kSmemBytes, nullptr, p);
}

}  // namespace vdit

int main(int, char** arguments) {
  using namespace vdit;
  return run_case(
      {
          {"named", test_named},
          {"arrive", test_arrive},
          {"elect", test_elect},
          {"stmatrix", test_stmatrix},
          {"registers", test_registers},
          {"tma_load", test_tma_load},
          {"overlap", test_overlap},
          {"tma_store", test_tma_store},
          {"bulk_load", test_bulk_load},
          {"map_errors", test_map_errors},
          {"products_k", test_products_k},
          {"products_mn", test_products_mn},
          {"products_s8", test_products_s8},
          {"products_u8", test_products_u8},
          {"groups", test_groups},
          {"pipe", run_pipe<Slip::kNone>},
          {"stale_phase", run_pipe<Slip::kStalePhase>},
          {"early_release", run_pipe<Slip::kEarlyRelease>},
          {"few_bytes", run_pipe<Slip::kFewBytes>},
          {"many_bytes", run_pipe<Slip::kManyBytes>},
          {"no_expect", run_pipe<Slip::kNoExpect>},
          {"many_arrivals", run_pipe<Slip::kManyArrivals>},
          {"no_release", run_pipe<Slip::kNoRelease>},
          {"no_producer", run_pipe<Slip::kNoProducer>},
          {"read_early", broken_groups<kReadEarly>},
          {"write_early", broken_groups<kWriteEarly>},
          {"no_fence", broken_groups<kNoFence>},
          {"no_proxy_fence", broken_groups<kNoProxyFence>},
          {"overwrite", broken_groups<kOverwrite>},
          {"different_lanes", broken_groups<kDifferentLanes>},
          {"half_group", broken_groups<kHalfGroup>},
          {"no_wait", broken_groups<kNoWait>},
          {"outside", broken_groups<kOutside>},
          {"named_deadlock", broken<NamedDeadlockKernel>},
          {"named_counts", broken<NamedCountsKernel>},
          {"named_id", broken<NamedIdKernel>},
          {"named_lanes", broken<NamedLanesKernel>},
          {"barrier_deadlock", broken<BarrierDeadlockKernel>},
          {"poll_deadlock", broken<PollDeadlockKernel>},
          {"uninitialised", broken<UninitialisedKernel>},
          {"init_twice", broken<InitTwiceKernel>},
          {"overwritten", broken<OverwrittenKernel>},
          {"unfenced_init", broken<UnfencedInitKernel>},
          {"leftover", broken<LeftoverKernel>},
          {"nobody_waits", broken<NobodyWaitsKernel>},
          {"over_arrive", broken<OverArriveKernel>},
          {"two_loads", broken<TwoLoadsKernel>},
          {"other_rows", broken_overlap},
          {"load_slot", broken<LoadSlotKernel>},
          {"load_rank", broken<LoadRankKernel>},
          {"load_copy", broken<LoadCopyKernel>},
          {"unpublished_store", broken<UnpublishedStoreKernel>},
          {"early_fence", broken<UnpublishedStoreKernel, 1>},
          {"reused_store", broken<ReusedStoreKernel>},
          {"unread_store", broken<ReusedStoreKernel, 1>},
          {"registers_deadlock", broken<RegisterKernel, 1>},
      },
      arguments[1]);
}
