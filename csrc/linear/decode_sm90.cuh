// How each format's codes become the first operand of wgmma: what RegisterWeightsKernel
// (common/gemm_sm90.cuh) asks for. The layouts are those of vdit/linear.h; a lane's 16 bytes of a 32 x 32
// tile are the codes of its registers in two m64 products.
#pragma once
#include "common/device_sm90.h"
#include "common/tma.h"
#include "linear/codes.cuh"

namespace vdit::sm90 {

constexpr int kWeightTile = 512;                         // bytes of 32 outputs x 32 channels
constexpr int kStripBytes = 4 * kWeightTile;             // of a stage: 32 outputs x 128 channels
constexpr int kStageStrips = 8;                          // 256 outputs
constexpr int kPlaneBytes = kStageStrips * kStripBytes;  // of a stage

struct NoFixed {};

// A lane's 16 bytes of the tile `sub` of strip `warp`.
struct Codes {
  uint32_t word[4];
};

VDIT_DEVICE Codes fetch_codes(char const* plane, int warp, int sub) {
  uint4 const v =
      *reinterpret_cast<uint4 const*>(plane + warp * kStripBytes + sub * kWeightTile + lane_idx() * 16);
  return {{v.x, v.y, v.z, v.w}};
}

// Tiles [strip, k / 32] of a plane: 4 x 8 of them come at once, zeros past the last.
VDIT_DEVICE void load_plane(TensorMap const& plane, char* to, Barrier* full, int strip, int step) {
  tma_load(to, plane, full, 0, step * 4, strip);
}

// Codes 0 to 15 as they are. The high nibbles are multiplied in place, as 16 times the code: their sums are
// still exact (240 x 128 x 65,536 is below 2^31), and a shift at the end saves one for each register.
struct Int4Weights {
  using Operand = uint8_t;
  using Fixed = NoFixed;
  using Raw = Codes;
  static constexpr int kStageBytes = kPlaneBytes;
  struct Params {
    TensorMap codes;
  };

  VDIT_DEVICE Int4Weights(Params const&, Fixed const&, int64_t) {}
  VDIT_DEVICE static void fill(Params const&, Fixed&) {}
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    load_plane(p.codes, codes, full, strip, step);
  }
  VDIT_DEVICE static void fetch(char const* codes, int warp, int sub, Raw& raw) {
    raw = fetch_codes(codes, warp, sub);
  }
  VDIT_DEVICE void decode(Raw const& raw, int, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      a[0][i] = raw.word[i] & kLowNibbles;
      a[1][i] = raw.word[i] & kHighNibbles;
    }
  }
  template <int kProduct>
  VDIT_DEVICE static int32_t finish(int32_t sum) {
    return kProduct == 0 ? sum : sum >> 4;
  }
};

// Codes 0 to 255 from two planes, less 128.
struct NibblePlaneWeights {
  using Operand = int8_t;
  using Fixed = NoFixed;
  static constexpr int kStageBytes = 2 * kPlaneBytes;
  struct Raw {
    Codes high, low;
  };
  struct Params {
    TensorMap high, low;
  };

  VDIT_DEVICE NibblePlaneWeights(Params const&, Fixed const&, int64_t) {}
  VDIT_DEVICE static void fill(Params const&, Fixed&) {}
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    load_plane(p.high, codes, full, strip, step);
    load_plane(p.low, codes + kPlaneBytes, full, strip, step);
  }
  VDIT_DEVICE static void fetch(char const* codes, int warp, int sub, Raw& raw) {
    raw = {fetch_codes(codes, warp, sub), fetch_codes(codes + kPlaneBytes, warp, sub)};
  }
  VDIT_DEVICE void decode(Raw const& raw, int, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) merge_planes(raw.high.word[i], raw.low.word[i], a[0][i], a[1][i]);
  }
  template <int kProduct>
  VDIT_DEVICE static int32_t finish(int32_t sum) {
    return sum;
  }
};

// Codes that index a row of a table of int8, 8 or 16 entries.
template <int kTableSize>
struct TableWeights {
  using Operand = int8_t;
  using Fixed = NoFixed;
  using Raw = Codes;
  static constexpr int kStageBytes = kPlaneBytes;
  struct Params {
    TensorMap codes;
    int8_t const* table;  // [n, kTableSize], on a multiple of 8 bytes
    int64_t n;
  };

  TableRow<kTableSize> table[4];  // of the rows 8 i + lane / 4

  VDIT_DEVICE TableWeights(Params const& p, Fixed const&, int64_t output0) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) table[i].load(p.table, output0 + i * 8 + lane_idx() / 4, p.n);
  }
  VDIT_DEVICE static void fill(Params const&, Fixed&) {}
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    load_plane(p.codes, codes, full, strip, step);
  }
  VDIT_DEVICE static void fetch(char const* codes, int warp, int sub, Raw& raw) {
    raw = fetch_codes(codes, warp, sub);
  }

  // A word has the codes of one row: four of the first 16 channels, four of the others.
  VDIT_DEVICE void decode(Raw const& raw, int, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) table[i].look_up(raw.word[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
  }
  template <int kProduct>
  VDIT_DEVICE static int32_t finish(int32_t sum) {
    return sum;
  }
};

}  // namespace vdit::sm90
