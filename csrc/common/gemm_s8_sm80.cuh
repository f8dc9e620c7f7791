// The main loop of every int8 product on compute capability 8.0 and up: a thread block's tile of
//
//   sums[m, n] = sum over k of x[m, k] * code[n, k],   exact in int32
//
// x comes through shared memory and ldmatrix; the weight comes from a weight source, which knows how its
// codes are stored and hands them out as registers of mma.m16n8k32:
//
//   template <class Tile>
//   struct Source {
//     struct Params { ... };             // plain data
//     static constexpr int kFixedBytes;  // shared memory of its own for the whole loop, or 0
//     static constexpr int kStageBytes;  // shared memory a stage: kBlockN columns, kBlockK deep
//     Source(Params const&, int64_t n0, char* fixed);
//     void fetch(char* stage, int64_t block) const;
//     void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const;
//   };
//
// All threads make a source, for the columns from n0 on: what it stores to `fixed` is seen by `fragments`
// after a barrier. All threads call `fetch`, which starts cp.async of k from block * kBlockK on, with zeros
// past n and k, and commits nothing.
//
// `fragments` is called by whole warps for step 0 and 1: 32 k from Tile::k_in_block(step) on of the stage,
// and the warp's Tile::kWarpN columns from Tile::warp_n() on. Lane l gets, for columns 8 j .. 8 j + 7, in
// b[j][h] the four codes of column 8 j + l / 4 with k = 16 h + 4 (l % 4) .. + 3, the lowest k in the lowest
// byte.
#pragma once
#include "common/epilogue.cuh"
#include "common/tile_order.cuh"

namespace vdit {

// kBlockM x kBlockN sums a thread block, cut among kWarpsM x kWarpsN warps; with kWarpsK > 1 so many warps
// share the sums of one part, each with its own 64 of every 64 kWarpsK k.
template <int kBlockM_, int kBlockN_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_, int kMinBlocks_>
struct GemmTileSm80 {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kBlockK = 64 * kWarpsK_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWarpM = kBlockM / kWarpsM, kWarpN = kBlockN / kWarpsN;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  static constexpr int kOrderGroup = 16;  // of TileOrder
  static_assert(kWarpM % 16 == 0 && kWarpN % 32 == 0, "A warp's part is cut into tiles of 16 x 32.");

  VDIT_DEVICE static int warp_m() { return warp_idx() % kWarpsM * kWarpM; }
  VDIT_DEVICE static int warp_n() { return warp_idx() / kWarpsM % kWarpsN * kWarpN; }
  VDIT_DEVICE static int warp_k() { return warp_idx() / (kWarpsM * kWarpsN); }
  VDIT_DEVICE static int k_in_block(int step) { return 64 * warp_k() + 32 * step; }
};

// kRows rows of a block of int8 in shared memory, in panels of 64 bytes along k. The four 16-byte pieces of a
// row change places so that the eight rows of an ldmatrix meet no bank twice.
template <class Tile, int kRows>
struct BytePanels {
  static constexpr int kBytes = kRows * Tile::kBlockK;
  static constexpr int kRowPieces = Tile::kBlockK / 16;
  static constexpr int kSharers = Tile::kThreads / kRowPieces;  // rows that the block fetches at a time
  static_assert(kRows % kSharers == 0, "The rows are fetched in whole rounds.");

  int8_t const* first;  // this thread's piece of its first row
  int64_t stride, k;
  int rows;  // of the block that exist, less this thread's first

  VDIT_DEVICE BytePanels(int8_t const* base, int64_t stride, int64_t row0, int64_t row_count, int64_t k)
      : stride(stride), k(k - 16 * piece()) {
    int64_t const left = row_count - row0;
    rows = static_cast<int>(left < kRows ? left : kRows) - row();
    first = base + (row0 + row()) * stride + 16 * piece();
  }

  VDIT_DEVICE static int row() { return thread_idx() / kRowPieces; }
  VDIT_DEVICE static int piece() { return thread_idx() % kRowPieces; }
  VDIT_DEVICE static int offset(int panel, int row, int piece) {
    return panel * kRows * 64 + row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
  }

  VDIT_DEVICE void fetch(char* stage, int64_t block) const {
    int64_t const k0 = block * Tile::kBlockK;
    CUTE_UNROLL
    for (int i = 0; i < kRows; i += kSharers) {
      cp_async_16(stage + offset(piece() / 4, row() + i, piece() % 4), first + i * stride + k0,
                  i < rows && k0 < k);
    }
  }

  // Four 8 x 16-byte matrices at (row0, byte 32 * step): rows 0-7 and 8-15 of the first 16 bytes, then of the
  // second.
  VDIT_DEVICE static void load_rows_first(char const* stage, int row0, int step, uint32_t (&r)[4]) {
    ldmatrix_x4(r, stage + offset(Tile::warp_k(), row0 + lane_idx() % 16, 2 * step + lane_idx() / 16));
  }
  // The same four with the halves of a row first: r[0], r[1] of rows 0-7, r[2], r[3] of rows 8-15.
  VDIT_DEVICE static void load_halves_first(char const* stage, int row0, int step, uint32_t (&r)[4]) {
    int const row = row0 + lane_idx() % 8 + lane_idx() / 16 * 8;
    ldmatrix_x4(r, stage + offset(Tile::warp_k(), row, 2 * step + lane_idx() / 8 % 2));
  }
};

// Weights stored as tiles of 32 columns and kDeep k, [n / 32, k / kDeep, kBytes], both counts rounded up: how
// a weight source fetches them and where it finds them in a stage.
template <class Tile, int kDeep, int kBytes>
struct PackedTiles {
  static constexpr int kTilesN = Tile::kBlockN / 32, kTilesK = Tile::kBlockK / kDeep;
  static constexpr int kRowPieces = kTilesK * kBytes / 16, kPieces = kTilesN * kRowPieces;
  static constexpr int kStageBytes = kPieces * 16;

  char const* first;  // the block's first tile
  int64_t tiles_k;
  int tiles_n;  // of the block that exist

  VDIT_DEVICE PackedTiles(void const* tiles, int64_t n, int64_t k, int64_t n0)
      : tiles_k((k + kDeep - 1) / kDeep) {
    int64_t const left = (n + 31) / 32 - n0 / 32;
    tiles_n = static_cast<int>(left < kTilesN ? left : kTilesN);
    first = static_cast<char const*>(tiles) + n0 / 32 * tiles_k * kBytes;
  }

  VDIT_DEVICE void fetch(char* stage, int64_t block) const {
    CUTE_UNROLL
    for (int i = 0; i < kPieces; i += Tile::kThreads) {
      int const piece = i + thread_idx(), row = piece / kRowPieces, in_row = piece % kRowPieces;
      if (kPieces % Tile::kThreads != 0 && piece >= kPieces) break;
      int64_t const tile_k = block * kTilesK + in_row / (kBytes / 16);
      char const* source = first + (row * tiles_k + block * kTilesK) * kBytes + in_row * 16;
      cp_async_16(stage + piece * 16, source, row < tiles_n && tile_k < tiles_k);
    }
  }

  // The tile that holds column warp_n() + 32 group and the k of `step`.
  VDIT_DEVICE static char const* tile(char const* stage, int group, int step) {
    int const row = Tile::warp_n() / 32 + group;
    return stage + (row * kTilesK + Tile::k_in_block(step) / kDeep) * kBytes;
  }
};

// A thread's sums of a tile, int32_t or float, spread as mma.m16n8k32 and m16n8k16 spread them: v[i][j][2 h +
// c] is row 16 i + 8 h + lane / 4, column 8 j + 2 (lane % 4) + c of the warp's part.
template <class Tile, class Sum>
struct TileSums {
  Sum v[Tile::kMmaM][Tile::kMmaN][4];

  template <class F>
  VDIT_DEVICE void for_each(F const& f) {
    CUTE_UNROLL
    for (int i = 0; i < Tile::kMmaM; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < Tile::kMmaN; ++j) {
        CUTE_UNROLL
        for (int c = 0; c < 4; ++c) f((i * Tile::kMmaN + j) * 4 + c, v[i][j][c]);
      }
    }
  }

  VDIT_DEVICE void clear() {
    for_each([](int, Sum& sum) { sum = 0; });
  }

  static constexpr int kShareBytes = (Tile::kWarpsK - 1) * Tile::kBlockM * Tile::kBlockN * 4;

  // Adds what the warps along k have, in the first of them, through `space`, which nobody uses any more after
  // a barrier.
  VDIT_DEVICE void share(char* space) {
    constexpr int kWarps = Tile::kWarpsM * Tile::kWarpsN;
    auto const slot = [&](int warp_k, int value) -> Sum& {
      int const part = (warp_k - 1) * kWarps + warp_idx() % kWarps;
      return reinterpret_cast<Sum*>(space)[(part * Tile::kMmaM * Tile::kMmaN * 4 + value) * 32 + lane_idx()];
    };
    sync_block();
    for_each([&](int value, Sum& sum) {
      if (Tile::warp_k() > 0) slot(Tile::warp_k(), value) = sum;
    });
    sync_block();
    if (Tile::warp_k() > 0) return;
    CUTE_UNROLL
    for (int k = 1; k < Tile::kWarpsK; ++k) {
      for_each([&](int value, Sum& sum) { sum += slot(k, value); });
    }
  }

  // A quad of lanes swaps columns, so that a lane has eight neighbours of row 16 i + 8 h + lane / 4: a quad
  // then stores 64 bytes of bf16 in a row.
  VDIT_DEVICE void gather(int i, int group, int h, Sum (&mine)[8]) const {
    Sum even[4], odd[4];
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      even[j] = v[i][4 * group + j][2 * h], odd[j] = v[i][4 * group + j][2 * h + 1];
    }
    quad_transpose(even);
    quad_transpose(odd);
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) mine[2 * j] = even[j], mine[2 * j + 1] = odd[j];
  }

  // Finishes and stores the block's tile of [m, n].
  VDIT_DEVICE void store(LinearEpilogue const& e, bool wide, int64_t m, int64_t n, int64_t m0, int64_t n0) {
    if (Tile::warp_k() > 0) return;
    CUTE_UNROLL
    for (int group = 0; group < Tile::kMmaN / 4; ++group) {
      int64_t const column = n0 + Tile::warp_n() + 32 * group + 8 * (lane_idx() % 4);
      int const count = n - column < 8 ? static_cast<int>(n - column) : 8;
      EpilogueColumns const columns(e, column, count, wide);
      CUTE_UNROLL
      for (int i = 0; i < Tile::kMmaM; ++i) {
        int64_t const first = m0 + Tile::warp_m() + 16 * i + lane_idx() / 4;
        store_rows(e, columns, wide, m, n, first, column, count, i, group);
      }
    }
  }

  // Rows `first` and 8 below. NOTE: the loads of both at a time would cost VqRowsKernel, which keeps float
  // sums, 105 registers instead of 80.
  VDIT_DEVICE void store_rows(LinearEpilogue const& e, EpilogueColumns const& columns, bool wide, int64_t m,
                              int64_t n, int64_t first, int64_t column, int count, int i, int group) {
    Sum mine[8];
    if constexpr (std::is_same<Sum, int32_t>::value) {
      EpilogueRow const rows[2] = {{e, first, column, first < m ? count : 0, wide},
                                   {e, first + 8, column, first + 8 < m ? count : 0, wide}};
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        gather(i, group, h, mine);
        int64_t const row = first + 8 * h;
        finish_outputs(e, columns, rows[h], row, n, column, row < m ? count : 0, wide, mine);
      }
    } else {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        gather(i, group, h, mine);
        int64_t const row = first + 8 * h;
        if (row < m && count > 0) store_outputs(e, columns, row, n, column, count, wide, mine);
      }
    }
  }
};

// The rows of x that a block multiplies: k is a multiple of 16, rows start at multiples of 16 bytes.
struct GemmRows {
  int8_t const* x;  // [m, k]
  int64_t stride, m, k;
};

template <class Tile, class Source>
struct GemmS8Sm80 {
  using Panels = BytePanels<Tile, Tile::kBlockM>;
  using Sums = TileSums<Tile, int32_t>;
  static constexpr int kFixedBytes = (Source::kFixedBytes + 127) / 128 * 128;
  static constexpr int kStageBytes = Panels::kBytes + Source::kStageBytes;
  static constexpr int kLoopBytes = Tile::kStages * kStageBytes;
  static constexpr int kSmemBytes =
      kFixedBytes + (kLoopBytes > Sums::kShareBytes ? kLoopBytes : Sums::kShareBytes);

  // Rows from m0, columns from n0 on. The sums are whole in the warps with warp_k() == 0.
  VDIT_DEVICE static void run(GemmRows const& x, typename Source::Params const& weight, int64_t m0,
                              int64_t n0, char* smem, Sums& sums) {
    Panels const rows(x.x, x.stride, m0, x.m, x.k);
    Source const source(weight, n0, smem);
    char* const stages = smem + kFixedBytes;
    int const blocks = static_cast<int>((x.k + Tile::kBlockK - 1) / Tile::kBlockK);
    sums.clear();
    auto const fetch = [&](int block, int stage) {
      if (block < blocks) {
        rows.fetch(stages + stage * kStageBytes, block);
        source.fetch(stages + stage * kStageBytes + Panels::kBytes, block);
      }
      cp_async_commit();
    };
    for (int block = 0; block < Tile::kStages - 1; ++block) fetch(block, block);
    for (int block = 0, stage = 0; block < blocks; ++block) {
      cp_async_wait<Tile::kStages - 2>();
      sync_block();  // this stage has come for everybody, and everybody has done with the one before
      fetch(block + Tile::kStages - 1, stage == 0 ? Tile::kStages - 1 : stage - 1);
      multiply(source, stages + stage * kStageBytes, sums);
      stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    if constexpr (Tile::kWarpsK > 1) sums.share(stages);
  }

  // One stage: registers of the next 32 k and of the next 16 rows are asked for before they are needed.
  VDIT_DEVICE static void multiply(Source const& source, char const* stage, Sums& sums) {
    uint32_t a[2][4], b[2][Tile::kMmaN][2];
    source.fragments(stage + Panels::kBytes, 0, b[0]);
    Panels::load_rows_first(stage, Tile::warp_m(), 0, a[0]);
    CUTE_UNROLL
    for (int step = 0; step < 2; ++step) {
      if (step == 0) source.fragments(stage + Panels::kBytes, 1, b[1]);
      CUTE_UNROLL
      for (int i = 0; i < Tile::kMmaM; ++i) {
        int const turn = step * Tile::kMmaM + i, next = turn + 1;
        if (next < 2 * Tile::kMmaM) {
          Panels::load_rows_first(stage, Tile::warp_m() + next % Tile::kMmaM * 16, next / Tile::kMmaM,
                                  a[next % 2]);
        }
        CUTE_UNROLL
        for (int j = 0; j < Tile::kMmaN; ++j) {
          mma_m16n8k32_s8(sums.v[i][j], a[turn % 2], b[step][j]);
        }
      }
    }
  }
};

// out = epilogue(x weight^T). Grid: one block a tile of [m, n], in the order of TileOrder.
template <class Tile, class Source>
struct GemmS8Kernel {
  using Gemm = GemmS8Sm80<Tile, Source>;
  struct Params {
    GemmRows x;
    typename Source::Params weight;
    LinearEpilogue epilogue;
    TileOrder order;
    bool wide;  // epilogue_is_wide
  };
  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kSmemBytes = Gemm::kSmemBytes;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    auto const tile = p.order.at(block_idx_x());
    int64_t const m0 = static_cast<int64_t>(tile.m) * Tile::kBlockM;
    int64_t const n0 = static_cast<int64_t>(tile.n) * Tile::kBlockN;
    typename Gemm::Sums sums;
    Gemm::run(p.x, p.weight, m0, n0, smem, sums);
    sums.store(p.epilogue, p.wide, p.x.m, p.weight.n, m0, n0);
  }
};

}  // namespace vdit
