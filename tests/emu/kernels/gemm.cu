// A CuTe GEMM tile as attention and linear kernels are built: cp.async into swizzled shared memory, two
// stages, ldmatrix, tensor-core MMA; right in three types, and with one planted mistake each.
//
//   gemm CASE    runs it in the order of VDIT_EMU_ORDER and prints "max error X"
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/device.h"
#include "common/launch.h"

namespace vdit {

// What is left out, on purpose.
enum class Bug { kNone, kNoBarrierBeforeRead, kNoBarrierAfterRead, kNoWait };

template <class T>
struct GemmParams {
  T const* a;  // [m, k]
  T const* b;  // [n, k], or [k, n] where kTransposeB
  std::conditional_t<std::is_same<T, int8_t>::value, int32_t, float>* d;  // [m, n]
  int m, n, k;  // m may be ragged; n and k are multiples of the tile
  Bug bug;
};

template <class T>
struct MmaFor {
  using Atom = MmaAtom_m16n8k16<T>;
};
template <>
struct MmaFor<int8_t> {
  using Atom = MmaAtom_m16n8k32_s8;
};

// d = a * b^T
template <class T, bool kTransposeB>
struct GemmKernel {
  using Params = GemmParams<T>;
  using Accumulator = std::remove_pointer_t<decltype(Params::d)>;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 64 / sizeof(T);  // 64 bytes along k
  static constexpr int kStages = 2;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr size_t kSmemBytes = kStages * (kBlockM + kBlockN) * kBlockK * sizeof(T);

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    using namespace cute;
    // Rows of 64 bytes, their 16-byte pieces swizzled so that ldmatrix meets no bank conflict.
    using Rows = decltype(composition(Swizzle < 2, sizeof(T) == 1 ? 4 : 3, 3 > {},
                                      Layout<Shape<_8, Int<kBlockK>>, Stride<Int<kBlockK>, _1>>{}));
    using Columns = decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_64, _8>, Stride<_1, _64>>{}));
    using LayoutA = decltype(tile_to_shape(Rows{}, Shape<Int<kBlockM>, Int<kBlockK>, Int<kStages>>{}));
    using LayoutB = decltype(tile_to_shape(std::conditional_t<kTransposeB, Columns, Rows>{},
                                           Shape<Int<kBlockN>, Int<kBlockK>, Int<kStages>>{}));
    auto const stride_b = [&] {
      if constexpr (kTransposeB) {
        return make_stride(_1{}, p.n);
      } else {
        return make_stride(p.k, _1{});
      }
    }();

    Tensor sA = make_tensor(make_smem_ptr(reinterpret_cast<T*>(smem)), LayoutA{});
    Tensor sB = make_tensor(make_smem_ptr(reinterpret_cast<T*>(smem) + cosize_v<LayoutA>), LayoutB{});
    Tensor mA = make_tensor(make_gmem_ptr(p.a), make_shape(p.m, p.k), make_stride(p.k, _1{}));
    Tensor mB = make_tensor(make_gmem_ptr(p.b), make_shape(p.n, p.k), stride_b);
    Tensor gA = local_tile(mA, Shape<Int<kBlockM>, Int<kBlockK>>{}, make_coord(block_idx_y(), _));
    Tensor gB = local_tile(mB, Shape<Int<kBlockN>, Int<kBlockK>>{}, make_coord(block_idx_x(), _));

    auto fetch_a = make_tiled_copy(CpAsyncAtom<T>{}, Layout<Shape<_32, _4>, Stride<_4, _1>>{},
                                   Layout<Shape<_1, Int<kVector>>>{});
    auto fetch_b = [] {
      if constexpr (kTransposeB) {
        return make_tiled_copy(CpAsyncAtom<T>{}, Layout<Shape<_8, _16>>{}, Layout<Shape<Int<kVector>, _1>>{});
      } else {
        return make_tiled_copy(CpAsyncAtom<T>{}, Layout<Shape<_32, _4>, Stride<_4, _1>>{},
                               Layout<Shape<_1, Int<kVector>>>{});
      }
    }();
    auto thread_fetch_a = fetch_a.get_slice(thread_idx());
    auto thread_fetch_b = fetch_b.get_slice(thread_idx());
    Tensor from_a = thread_fetch_a.partition_S(gA);  // [copy, m, k, tile]
    Tensor from_b = thread_fetch_b.partition_S(gB);
    Tensor to_a = thread_fetch_a.partition_D(sA);  // [copy, m, k, stage]
    Tensor to_b = thread_fetch_b.partition_D(sB);
    int const first_row = block_idx_y() * kBlockM + thread_idx() / 4;

    auto mma = make_tiled_mma(typename MmaFor<T>::Atom{}, Layout<Shape<_2, _2, _1>>{},
                              Tile<_32, _32, Int<32 / sizeof(T)>>{});
    auto thread_mma = mma.get_slice(thread_idx());
    Tensor rA = thread_mma.partition_fragment_A(sA(_, _, 0));
    Tensor rB = thread_mma.partition_fragment_B(sB(_, _, 0));
    Tensor acc = partition_fragment_C(mma, Shape<Int<kBlockM>, Int<kBlockN>>{});
    clear(acc);
    auto load_a = make_tiled_copy_A(LdsmAtom<T>{}, mma);
    auto load_b = make_tiled_copy_B(std::conditional_t<kTransposeB, LdsmTransAtom<T>, LdsmAtom<T>>{}, mma);
    auto thread_load_a = load_a.get_slice(thread_idx());
    auto thread_load_b = load_b.get_slice(thread_idx());

    int const tiles = p.k / kBlockK;
    auto const fetch = [&](int tile) {
      if (tile < tiles) {
        int const stage = tile % kStages;
        for (int i = 0; i < size<1>(from_a); ++i) {
          copy(fetch_a.with(first_row + i * 32 < p.m), from_a(_, i, _, tile), to_a(_, i, _, stage));
        }
        copy(fetch_b, from_b(_, _, _, tile), to_b(_, _, _, stage));
      }
      cp_async_commit();
    };

    fetch(0);
    for (int tile = 0; tile < tiles; ++tile) {
      fetch(tile + 1);
      if (p.bug != Bug::kNoWait) cp_async_wait<1>();
      if (p.bug != Bug::kNoBarrierBeforeRead) sync_block();
      copy(load_a, thread_load_a.partition_S(sA(_, _, tile % kStages)), thread_load_a.retile_D(rA));
      copy(load_b, thread_load_b.partition_S(sB(_, _, tile % kStages)), thread_load_b.retile_D(rB));
      gemm(mma, rA, rB, acc);
      if (p.bug != Bug::kNoBarrierAfterRead) sync_block();
    }

    Tensor mD = make_tensor(make_gmem_ptr(p.d), make_shape(p.m, p.n), make_stride(p.n, _1{}));
    Tensor gD = local_tile(mD, Shape<Int<kBlockM>, Int<kBlockN>>{}, make_coord(block_idx_y(), block_idx_x()));
    Tensor to_d = thread_mma.partition_C(gD);
    Tensor where = thread_mma.partition_C(make_identity_tensor(Shape<Int<kBlockM>, Int<kBlockN>>{}));
    for (int i = 0; i < size(acc); ++i) {
      if (block_idx_y() * kBlockM + get<0>(where(i)) < p.m) to_d(i) = acc(i);
    }
  }
};

// The maximum error against a plain loop; NaN counts as infinite. `smem_short`: how many bytes too few to ask
// for.
template <class T, bool kTransposeB = false>
double gemm_error(Bug bug = Bug::kNone, size_t smem_short = 0) {
  using Kernel = GemmKernel<T, kTransposeB>;
  int const m = 100, n = 128, k = 256;
  std::vector<T> a(static_cast<size_t>(m * k)), b(static_cast<size_t>(n * k));
  std::vector<typename Kernel::Accumulator> d(static_cast<size_t>(m * n), 12345);
  uint32_t seed = 1;
  auto const draw = [&seed] {  // small multiples of 1/8, so that every sum is exact in fp32
    seed = seed * 1664525u + 1013904223u;
    int const whole = static_cast<int>(seed >> 24) % 65 - 32;
    return std::is_same<T, int8_t>::value ? T(whole * 3) : T(static_cast<float>(whole) / 8);
  };
  for (auto& x : a) x = draw();
  for (auto& x : b) x = draw();
  launch<Kernel>({static_cast<unsigned>(n / 64), static_cast<unsigned>((m + 63) / 64), 1},
                 Kernel::kSmemBytes - smem_short, nullptr, {a.data(), b.data(), d.data(), m, n, k, bug});
  double worst = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += static_cast<double>(a[size_t(i * k + l)]) *
               static_cast<double>(b[size_t(kTransposeB ? l * n + j : j * k + l)]);
      }
      double const error = std::abs(sum - static_cast<double>(d[size_t(i * n + j)]));
      worst = error <= worst ? worst : error;
      if (std::isnan(error)) return INFINITY;
    }
  }
  return worst;
}

}  // namespace vdit

int main(int, char** arguments) {
  using namespace vdit;
  using cute::bfloat16_t;
  using cute::half_t;
  std::string const name = arguments[1];
  try {
    double error = -1;
    if (name == "bf16") error = gemm_error<bfloat16_t>();
    if (name == "no_wait") error = gemm_error<bfloat16_t>(Bug::kNoWait);
    if (name == "no_barrier_before_read") error = gemm_error<bfloat16_t>(Bug::kNoBarrierBeforeRead);
    if (name == "no_barrier_after_read") error = gemm_error<bfloat16_t>(Bug::kNoBarrierAfterRead);
    if (name == "short_shared") error = gemm_error<bfloat16_t>(Bug::kNone, 64);
#if !defined(VDIT_TEST_BF16_ONLY)  // half the compile time, where only that is asked
    if (name == "bf16_transposed") error = gemm_error<bfloat16_t, true>();
    if (name == "f16") error = gemm_error<half_t>();
    if (name == "s8") error = gemm_error<int8_t>();
#endif
    printf("max error %g\n", error);
    return error < 0;
  } catch (std::exception const& problem) {
    printf("error: %s\n", problem.what());
    return 1;
  }
}
