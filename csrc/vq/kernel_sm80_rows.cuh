// vq_linear on fp16 and bf16 for at most 16 rows: bound by the bytes of the codes, which are read once,
// straight into registers.
#pragma once
#include "vq/kernel_sm80_halves.cuh"

namespace vdit {

// A block takes 32 columns; its warps take turns along k and add up at the end. Grid: ceil(n / 32) blocks.
template <class T, VqFormat kFormat>
struct VqRowsKernel {
  // As the sums of a tile lie: one row of instructions, warps side by side along k.
  using Tile = GemmTileSm80<16, 32, 1, 1, 8, 1, 2>;
  using Words = HalfWords<kFormat>;
  using Sums = TileSums<Tile, float>;
  using Codes = LaneCodes<kFormat, 16>;
  struct Params {
    HalfRows x;
    VqWeightView weight;
    LinearEpilogue epilogue;
    bool wide;  // epilogue_is_wide
  };
  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kSmemBytes = Words::kBytes + Sums::kShareBytes;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const n0 = static_cast<int64_t>(block_idx_x()) * Tile::kBlockN;
    int const tiles = static_cast<int>((p.weight.k + 63) / 64);
    char const* const first =
        static_cast<char const*>(p.weight.codes) + n0 / 32 * tiles * kVqTileBytes<kFormat>;
    Words::fill(smem, p.weight.codebook, kThreads);
    Sums sums;
    sums.clear();
    Codes codes, next;
    if (Tile::warp_k() < tiles) next.load(first + Tile::warp_k() * kVqTileBytes<kFormat>);
    sync_block();  // the words are there
    for (int tile = Tile::warp_k(); tile < tiles; tile += Tile::kWarpsK) {
      codes = next;
      int const after = tile + Tile::kWarpsK;
      if (after < tiles) next.load(first + after * static_cast<int64_t>(kVqTileBytes<kFormat>));
      multiply_tile(p.x, Words{smem}, codes, 64 * static_cast<int64_t>(tile), sums);
    }
    sums.share(smem + Words::kBytes);
    sums.store(p.epilogue, p.wide, p.x.m, p.weight.n, 0, n0);
  }

  VDIT_DEVICE static void multiply_tile(HalfRows const& x, Words const& words, Codes const& codes, int64_t k0,
                                        Sums& sums) {
    CUTE_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      load_rows(x, k0 + 16 * step, a);
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        uint32_t b[2];
        words.look_up(codes.code(step / 2 * 8 + j * 2 + step % 2), b);
        mma_m16n8k16<T>(sums.v[0][j], a, b);
      }
    }
  }

  // All rows, 16 k from k0 on; 0 past m and k.
  VDIT_DEVICE static void load_rows(HalfRows const& x, int64_t k0, uint32_t (&a)[4]) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      int const row = 8 * h + lane_idx() / 4;
      uint2 v{0u, 0u};
      if (row < x.m && k0 < x.k) {
        v = *reinterpret_cast<uint2 const*>(static_cast<T const*>(x.x) + row * x.stride + k0 +
                                            4 * (lane_idx() % 4));
      }
      a[h] = v.x, a[h + 2] = v.y;
    }
  }
};

}  // namespace vdit
