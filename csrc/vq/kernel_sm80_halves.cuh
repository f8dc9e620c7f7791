// vq_linear on fp16 and bf16: words are looked up where the registers of mma.m16n8k16 are filled.
//
// A sum does not care in which order it adds its k. In a group of 16, lane l of a quad holds what lies at 4 l
// .. 4 l + 3, in x as in the weight: the instruction then pairs x's first two with the first half of a word,
// and its last two with the second. So a word of four is a B fragment as it is, and a lane's part of a row of
// x is one load of 8 bytes.
#pragma once
#include "common/gemm_s8_sm80.cuh"
#include "vq/kernel_sm80_int8.cuh"
#include "vq/kernel_sm80_words.cuh"

namespace vdit {

// The rows of x that a block multiplies: k is a multiple of 16, rows start at multiples of 16 bytes.
struct HalfRows {
  void const* x;  // [m, k]
  int64_t stride, m, k;
};

// kBlockM rows of x in shared memory, in panels of 64 k (128 bytes). The 32-byte parts of a row change places
// so that the eight rows of a fragment meet no bank twice.
template <class T, class Tile>
struct HalfPanels {
  static constexpr int kRows = Tile::kBlockM, kBytes = kRows * Tile::kBlockK * 2;
  static constexpr int kRowPieces = Tile::kBlockK / 8;  // of 16 bytes
  static constexpr int kSharers = Tile::kThreads / kRowPieces;
  static_assert(kRows % kSharers == 0, "The rows are fetched in whole rounds.");

  T const* first;  // this thread's piece of its first row
  int64_t stride, k;
  int rows;  // of the block that exist, less this thread's first

  VDIT_DEVICE HalfPanels(HalfRows const& x, int64_t row0) : stride(x.stride), k(x.k - 8 * piece()) {
    int64_t const left = x.m - row0;
    rows = static_cast<int>(left < kRows ? left : kRows) - row();
    first = static_cast<T const*>(x.x) + (row0 + row()) * stride + 8 * piece();
  }

  VDIT_DEVICE static int row() { return thread_idx() / kRowPieces; }
  VDIT_DEVICE static int piece() { return thread_idx() % kRowPieces; }
  VDIT_DEVICE static int offset(int panel, int row, int piece) {
    return panel * kRows * 128 + row * 128 + ((piece ^ ((row & 3) << 1)) << 4);
  }

  VDIT_DEVICE void fetch(char* stage, int64_t block) const {
    int64_t const k0 = block * Tile::kBlockK;
    CUTE_UNROLL
    for (int i = 0; i < kRows; i += kSharers) {
      cp_async_16(stage + offset(piece() / 8, row() + i, piece() % 8), first + i * stride + k0,
                  i < rows && k0 < k);
    }
  }

  // Rows row0 .. row0 + 15, the 16 k of `step` (0 to 3) of the warp's panel.
  VDIT_DEVICE static void load(char const* stage, int row0, int step, uint32_t (&a)[4]) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      int const row = row0 + 8 * h + lane_idx() / 4, part = lane_idx() % 4;
      char const* const at = stage + offset(Tile::warp_k(), row, 2 * step + part / 2) + part % 2 * 8;
      uint2 const v = *reinterpret_cast<uint2 const*>(at);
      a[h] = v.x, a[h + 2] = v.y;
    }
  }
};

// out = epilogue(x W^T). Grid: one block a tile of [m, n], in the order of TileOrder.
template <class T, class Tile, VqFormat kFormat>
struct VqHalfKernel {
  using Panels = HalfPanels<T, Tile>;
  using Tiles = PackedTiles<Tile, 64, kVqTileBytes<kFormat>>;
  using Words = HalfWords<kFormat>;
  using Sums = TileSums<Tile, float>;
  struct Params {
    HalfRows x;
    VqWeightView weight;
    LinearEpilogue epilogue;
    TileOrder order;
    bool wide;  // epilogue_is_wide
  };
  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kStageBytes = Panels::kBytes + Tiles::kStageBytes;
  static constexpr int kLoopBytes = Tile::kStages * kStageBytes;
  static constexpr int kSmemBytes =
      Words::kBytes + (kLoopBytes > Sums::kShareBytes ? kLoopBytes : Sums::kShareBytes);

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    auto const tile = p.order.at(block_idx_x());
    int64_t const m0 = static_cast<int64_t>(tile.m) * Tile::kBlockM;
    int64_t const n0 = static_cast<int64_t>(tile.n) * Tile::kBlockN;
    Sums sums;
    sums.clear();
    multiply(p, m0, n0, smem, sums);
    if constexpr (Tile::kWarpsK > 1) sums.share(smem + Words::kBytes);
    sums.store(p.epilogue, p.wide, p.x.m, p.weight.n, m0, n0);
  }

  VDIT_DEVICE static void multiply(Params const& p, int64_t m0, int64_t n0, char* smem, Sums& sums) {
    Panels const rows(p.x, m0);
    Tiles const tiles(p.weight.codes, p.weight.n, p.weight.k, n0);
    Words const words{smem};
    char* const stages = smem + Words::kBytes;
    int const blocks = static_cast<int>((p.x.k + Tile::kBlockK - 1) / Tile::kBlockK);
    for (int block = 0; block < Tile::kStages - 1; ++block)
      fetch(rows, tiles, stages + block * kStageBytes, block, blocks);
    Words::fill(smem, p.weight.codebook, kThreads);
    for (int block = 0, stage = 0; block < blocks; ++block) {
      cp_async_wait<Tile::kStages - 2>();
      sync_block();  // this stage has come for everybody, and everybody has done with the one before
      int const last = stage == 0 ? Tile::kStages - 1 : stage - 1;
      fetch(rows, tiles, stages + last * kStageBytes, block + Tile::kStages - 1, blocks);
      multiply_stage(words, stages + stage * kStageBytes, sums);
      stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }

  // Closes a group of copies also where there is no such block, so that every turn waits for one.
  VDIT_DEVICE static void fetch(Panels const& rows, Tiles const& tiles, char* stage, int block, int blocks) {
    if (block < blocks) {
      rows.fetch(stage, block);
      tiles.fetch(stage + Panels::kBytes, block);
    }
    cp_async_commit();
  }

  VDIT_DEVICE static void multiply_stage(Words const& words, char const* stage, Sums& sums) {
    LaneCodes<kFormat, 16> codes[Tile::kMmaN / 4];
    CUTE_UNROLL
    for (int group = 0; group < Tile::kMmaN / 4; ++group)
      codes[group].load(Tiles::tile(stage + Panels::kBytes, group, 0));
    CUTE_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t b[Tile::kMmaN][2];
      CUTE_UNROLL
      for (int j = 0; j < Tile::kMmaN; ++j)
        words.look_up(codes[j / 4].code(step / 2 * 8 + j % 4 * 2 + step % 2), b[j]);
      CUTE_UNROLL
      for (int i = 0; i < Tile::kMmaM; ++i) {
        uint32_t a[4];
        Panels::load(stage, Tile::warp_m() + 16 * i, step, a);
        CUTE_UNROLL
        for (int j = 0; j < Tile::kMmaN; ++j) mma_m16n8k16<T>(sums.v[i][j], a, b[j]);
      }
    }
  }
};

}  // namespace vdit
