// Packed weight codes to int8 [n, k].
#pragma once
#include "linear/kernel_sm80_weights.cuh"

namespace vdit {

// A warp takes a tile of 32 x 32. Grid: x four tiles a block, in order of [n / 32, stride_out / 32].
template <WeightFormat kFormat, int kTableSize>
struct ExpandWeightKernel {
  struct Params {
    ExpandWeightParams p;
    bool wide;  // rows of out start at multiples of 16 bytes
  };
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& a, char*) const {
    ExpandWeightParams const& p = a.p;
    int64_t const tiles_n = (p.n + 31) / 32, tiles_k = (p.k + 31) / 32, columns = (p.stride_out + 31) / 32;
    int64_t const tile = static_cast<int64_t>(block_idx_x()) * (kThreads / 32) + warp_idx();
    if (tile >= tiles_n * columns) return;
    int64_t const n0 = tile / columns * 32, k0 = tile % columns * 32;
    WeightRegisters b = {};
    if (k0 < p.k) decode(p, (n0 / 32 * tiles_k + k0 / 32) * 512, n0, b);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      // A lane has four codes of a row: those of a quad make 16 neighbours.
      uint32_t words[4] = {b[0][half], b[1][half], b[2][half], b[3][half]};
      quad_transpose(words);
      store(p, a.wide, n0 + 8 * (lane_idx() % 4) + lane_idx() / 4, k0 + 16 * half, words);
    }
  }

  VDIT_DEVICE static void decode(ExpandWeightParams const& p, int64_t at, int64_t n0, WeightRegisters& b) {
    uint4 const codes = lane_bytes(static_cast<char const*>(p.weight) + at);
    if constexpr (kFormat == WeightFormat::kInt4) {
      decode_nibbles(codes, b);
    } else if constexpr (kFormat == WeightFormat::kNibblePlanes) {
      decode_planes(codes, lane_bytes(static_cast<char const*>(p.weight_low) + at), b);
    } else {
      TableRow<kTableSize> tables[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) tables[j].load(p.table, n0 + 8 * j + lane_idx() / 4, p.n);
      decode_codes<kTableSize>(codes, tables, b);
    }
  }

  // 16 codes of row n from k0 on, those past k as 0.
  VDIT_DEVICE static void store(ExpandWeightParams const& p, bool wide, int64_t n, int64_t k0,
                                uint32_t (&words)[4]) {
    if (n >= p.n) return;
    int8_t* const out = p.out + n * p.stride_out + k0;
    if (wide && k0 + 16 <= p.k) {
      *reinterpret_cast<uint4*>(out) = uint4{words[0], words[1], words[2], words[3]};
      return;
    }
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      uint32_t const code = k0 + i < p.k ? words[i / 4] >> (8 * (i % 4)) & 255u : 0u;
      if (k0 + i < p.stride_out) out[i] = static_cast<int8_t>(code);
    }
  }
};

}  // namespace vdit
