// kmeans_assign: labels[i] = argmax_c x_i . c - |c|^2 / 2, a GEMM whose tiles end in a running argmax, so
// that no n x c matrix exists.
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// fp16 and bf16 on tensor cores. A block owns kBlockM rows of x, whose fragments stay in registers, and
// streams the centroids past them, kBlockN at a time, double buffered.
// Grid: x tiles of rows, y heads, z batch. Rows must be 16-byte aligned.
template <class T, int kHeadDim>
struct KMeansAssignKernel {
  using Params = KMeansAssignParams;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBlockM = 128;  // 4 warps of 32 rows
  static constexpr int kBlockN = 64;
  static constexpr int kStages = 2;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, a row

  using SmemX = typename SwizzledRows<kHeadDim>::template Tile<kBlockM>;
  using SmemC = typename SwizzledRows<kHeadDim>::template Tile<kBlockN>;
  using TiledMma = decltype(cute::make_tiled_mma(MmaAtom_m16n8k16<T>{},
                                                 cute::Layout<cute::Shape<cute::_4, cute::_1, cute::_1>>{},
                                                 cute::Tile<cute::_64, cute::_16, cute::_16>{}));

  static constexpr int kBytesX = kBlockM * kHeadDim * 2;
  static constexpr int kBytesC = kBlockN * kHeadDim * 2;
  static constexpr int kSmemBytes = kBytesX + kStages * kBytesC + kBlockN * 4;

  // Rows [first, first + kRows) of a matrix into shared memory; rows past the end become zero.
  template <int kRows, class SmemLayout>
  VDIT_DEVICE static void fetch_rows(T const* base, int64_t stride, int64_t first, int64_t rows, T* smem) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(smem), SmemLayout{});
    CUTE_UNROLL
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
      int const item = thread_idx() + i * kThreads;
      int const r = item / kChunks, col = item % kChunks * 8;
      bool const valid = first + r < rows;
      T const* source = base + (valid ? (first + r) * stride : 0) + col;
      cp_async_16(&tile(r, col), source, valid);
    }
  }

  // half_norms[c] = |c|^2 / 2 of the tile's centroids, +inf past the last one: two threads a centroid.
  VDIT_DEVICE static void compute_half_norms(T* smem, int64_t first, int64_t rows, float* half_norms) {
    static_assert(kThreads == 2 * kBlockN && kChunks % 2 == 0, "Two threads share a centroid.");
    auto tile = cute::make_tensor(cute::make_smem_ptr(smem), SmemC{});
    int const r = thread_idx() / 2, half = thread_idx() % 2;
    float sum = 0.f;
    for (int chunk = half * (kChunks / 2); chunk < (half + 1) * (kChunks / 2); ++chunk) {
      float v[8];
      load_floats<T, 8>(&tile(r, chunk * 8), v);
      for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    }
    sum += shfl_xor(sum, 1);
    if (half == 0) half_norms[r] = first + r < rows ? 0.5f * sum : INFINITY;
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    using namespace cute;
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const row0 = static_cast<int64_t>(block_idx_x()) * kBlockM;
    T const* x = static_cast<T const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h;
    T const* c = static_cast<T const*>(p.centroids) + b * p.stride_centroids.b + h * p.stride_centroids.h;
    T* smem_x = reinterpret_cast<T*>(smem);
    T* smem_c = reinterpret_cast<T*>(smem + kBytesX);
    float* half_norms = reinterpret_cast<float*>(smem + kBytesX + kStages * kBytesC);
    int const num_tiles = static_cast<int>((p.num_centroids + kBlockN - 1) / kBlockN);

    fetch_rows<kBlockM, SmemX>(x, p.stride_x.s, row0, p.num_rows, smem_x);
    fetch_rows<kBlockN, SmemC>(c, p.stride_centroids.s, 0, p.num_centroids, smem_c);
    cp_async_commit();

    TiledMma mma;
    auto thr_mma = mma.get_slice(thread_idx());
    auto sX = make_tensor(make_smem_ptr(smem_x), SmemX{});
    auto rX = thr_mma.partition_fragment_A(sX);
    auto load_x = make_tiled_copy_A(LdsmAtom<T>{}, mma);
    auto load_c = make_tiled_copy_B(LdsmAtom<T>{}, mma);
    auto thr_load_x = load_x.get_slice(thread_idx());
    auto thr_load_c = load_c.get_slice(thread_idx());
    auto acc = partition_fragment_C(mma, Shape<Int<kBlockM>, Int<kBlockN>>{});  // ((2, 2), m, n)
    constexpr int kM = size<1>(acc);
    constexpr int kN = size<2>(acc);

    float best[kM][2];
    int label[kM][2];
    CUTE_UNROLL
    for (int m = 0; m < kM; ++m) {
      best[m][0] = best[m][1] = -INFINITY;
      label[m][0] = label[m][1] = 0;
    }

    for (int tile = 0; tile < num_tiles; ++tile) {
      T* stage = smem_c + tile % kStages * (kBytesC / 2);
      cp_async_wait<0>();
      sync_block();  // the tile is here, and every warp has left the one before
      if (tile == 0) copy(load_x, thr_load_x.partition_S(sX), thr_load_x.retile_D(rX));
      if (tile + 1 < num_tiles) {
        fetch_rows<kBlockN, SmemC>(c, p.stride_centroids.s, static_cast<int64_t>(tile + 1) * kBlockN,
                                   p.num_centroids, smem_c + (tile + 1) % kStages * (kBytesC / 2));
      }
      cp_async_commit();
      compute_half_norms(stage, static_cast<int64_t>(tile) * kBlockN, p.num_centroids, half_norms);
      sync_block();

      // The accumulator starts at -|c|^2 / 2, which saves a pass over it afterwards.
      int const col0 = lane_idx() % 4 * 2;
      CUTE_UNROLL
      for (int n = 0; n < kN; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float const start = -half_norms[n * 8 + col0 + i % 2];
          CUTE_UNROLL
          for (int m = 0; m < kM; ++m) acc(make_coord(i % 2, i / 2), m, n) = start;
        }
      }
      auto sC = make_tensor(make_smem_ptr(stage), SmemC{});
      auto rC = thr_mma.partition_fragment_B(sC);
      auto from = thr_load_c.partition_S(sC);
      auto to = thr_load_c.retile_D(rC);
      CUTE_UNROLL
      for (int k = 0; k < size<2>(rX); ++k) {
        copy(load_c, from(_, _, k), to(_, _, k));
        gemm(mma, rX(_, _, k), rC(_, _, k), acc);
      }
      CUTE_UNROLL
      for (int n = 0; n < kN; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < kM; ++m) {
          CUTE_UNROLL
          for (int i = 0; i < 4; ++i) {
            // Columns come in rising order, so "greater" alone keeps the lowest index.
            float const score = acc(make_coord(i % 2, i / 2), m, n);
            if (score > best[m][i / 2]) {
              best[m][i / 2] = score;
              label[m][i / 2] = tile * kBlockN + n * 8 + col0 + i % 2;
            }
          }
        }
      }
    }

    // The four lanes of a quad hold different columns of the same rows.
    int32_t* labels = p.labels + (b * p.heads + h) * p.num_rows;
    CUTE_UNROLL
    for (int m = 0; m < kM; ++m) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        CUTE_UNROLL
        for (int step = 1; step < 4; step *= 2) {
          float const other = shfl_xor(best[m][half], step);
          int const other_label = shfl_xor(label[m][half], step);
          keep_best(best[m][half], label[m][half], other, other_label);
        }
        int64_t const row = row0 + m * 64 + warp_idx() * 16 + half * 8 + lane_idx() / 4;
        if (lane_idx() % 4 == 0 && row < p.num_rows) labels[row] = label[m][half];
      }
    }
  }
};

// Any type, head size and alignment, on FMA units: 64 x 64 tiles, 4 x 4 a thread, 16 columns of x at a time.
// Grid as above.
template <class T>
struct KMeansAssignSimpleKernel {
  using Params = KMeansAssignParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBlock = 64;  // rows, and centroids, of a tile
  static constexpr int kDepth = 16;  // columns a step
  static constexpr int kPitch = 68;  // floats; 4 past the tile, so that rows begin at different banks
  static constexpr int kSmemBytes = 2 * kDepth * kPitch * 4;

  // tile[d][r] = m[first + r][d0 + d], zero outside.
  VDIT_DEVICE static void fetch(T const* m, int64_t stride, int64_t first, int64_t rows, int d0, int head_dim,
                                float* tile) {
    for (int i = thread_idx(); i < kBlock * kDepth; i += kThreads) {
      int const r = i / kDepth, d = i % kDepth;
      bool const valid = first + r < rows && d0 + d < head_dim;
      tile[d * kPitch + r] = valid ? static_cast<float>(m[(first + r) * stride + d0 + d]) : 0.f;
    }
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const row0 = static_cast<int64_t>(block_idx_x()) * kBlock;
    T const* x = static_cast<T const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h;
    T const* c = static_cast<T const*>(p.centroids) + b * p.stride_centroids.b + h * p.stride_centroids.h;
    float* tile_x = reinterpret_cast<float*>(smem);  // [kDepth, kPitch]
    float* tile_c = tile_x + kDepth * kPitch;
    int const tx = thread_idx() % 16, ty = thread_idx() / 16;

    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    int label[4] = {};
    for (int64_t c0 = 0; c0 < p.num_centroids; c0 += kBlock) {
      float acc[4][4] = {}, norm[4] = {};
      for (int d0 = 0; d0 < p.head_dim; d0 += kDepth) {
        sync_block();
        fetch(x, p.stride_x.s, row0, p.num_rows, d0, p.head_dim, tile_x);
        fetch(c, p.stride_centroids.s, c0, p.num_centroids, d0, p.head_dim, tile_c);
        sync_block();
        for (int d = 0; d < kDepth; ++d) {
          float a[4], w[4];
          load_floats<float, 4>(tile_x + d * kPitch + ty * 4, a);
          load_floats<float, 4>(tile_c + d * kPitch + tx * 4, w);
          for (int j = 0; j < 4; ++j) {
            norm[j] += w[j] * w[j];
            for (int i = 0; i < 4; ++i) acc[i][j] += a[i] * w[j];
          }
        }
      }
      for (int j = 0; j < 4; ++j) {
        int const candidate = static_cast<int>(c0) + tx * 4 + j;
        if (candidate >= p.num_centroids) continue;
        for (int i = 0; i < 4; ++i) {
          float const score = acc[i][j] - 0.5f * norm[j];
          if (score > best[i]) best[i] = score, label[i] = candidate;
        }
      }
    }

    int32_t* labels = p.labels + (b * p.heads + h) * p.num_rows;
    for (int i = 0; i < 4; ++i) {
      for (int step = 1; step < 16; step *= 2) {
        float const other = shfl_xor(best[i], step);
        int const other_label = shfl_xor(label[i], step);
        keep_best(best[i], label[i], other, other_label);
      }
      int64_t const row = row0 + ty * 4 + i;
      if (tx == 0 && row < p.num_rows) labels[row] = label[i];
    }
  }
};

}  // namespace vdit
