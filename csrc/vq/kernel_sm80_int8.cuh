// vq_linear on int8: the words of the codebook are the registers of mma.m16n8k32.
#pragma once
#include "common/gemm_s8_sm80.cuh"
#include "vq/kernel_sm80_words.cuh"

namespace vdit {

struct VqWeightView {
  void const* codes;
  void const* codebook;
  int64_t n, k;
};

// A weight source of the int8 main loop (common/gemm_s8_sm80.cuh).
template <VqFormat kFormat>
struct VqWeights {
  template <class Tile>
  struct Of {
    using Params = VqWeightView;
    using Tiles = PackedTiles<Tile, 64, kVqTileBytes<kFormat>>;
    using Words = ByteWords<kFormat>;
    static constexpr int kFixedBytes = Words::kBytes, kStageBytes = Tiles::kStageBytes;
    Tiles tiles;
    Words words;

    VDIT_DEVICE Of(Params const& p, int64_t n0, char* fixed) : tiles(p.codes, p.n, p.k, n0), words{fixed} {
      Words::fill(fixed, p.codebook, Tile::kThreads);
    }

    VDIT_DEVICE void fetch(char* stage, int64_t block) const { tiles.fetch(stage, block); }

    VDIT_DEVICE void fragments(char const* stage, int step, uint32_t (&b)[Tile::kMmaN][2]) const {
      CUTE_UNROLL
      for (int group = 0; group < Tile::kMmaN / 4; ++group) {
        LaneCodes<kFormat, 8> codes;
        codes.load(Tiles::tile(stage, group, step), step);
        CUTE_UNROLL
        for (int j = 0; j < 8; ++j) b[4 * group + j / 2][j % 2] = words.look_up(codes.code(j));
      }
    }
  };
};

template <class Tile, VqFormat kFormat>
struct VqInt8Kernel : GemmS8Kernel<Tile, typename VqWeights<kFormat>::template Of<Tile>> {};

}  // namespace vdit
