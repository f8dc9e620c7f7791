// How codes of int8 words become the first operand of wgmma: what RegisterWeightsKernel
// (common/gemm_sm90.cuh) asks for. A quad of four neighbouring channels is one register of it; the layouts
// are those of vdit/vq.h.
#pragma once
#include "common/gemm_sm90.cuh"
#include "common/tma.h"

namespace vdit::sm90 {

struct VqWeightsParams {
  TensorMap codes;
  void const* codebook;  // int8
};

// A strip has two tiles of 64 channels a stage; their codes are read once for two products along k. A quad's
// index among the eight of 32 channels is 2 n_sub + k_half, and its place in the products' registers follows.
template <int kTileBytes_>
struct VqWeightsBase {
  using Operand = int8_t;
  using Params = VqWeightsParams;
  static constexpr int kTileBytes = kTileBytes_;
  static constexpr int kStageBytes = 8 * 2 * kTileBytes;
  static constexpr int kLaneWords = kTileBytes / 128;
  struct Raw {
    uint32_t word[kLaneWords];
  };

  VDIT_DEVICE static char const* lane_codes(char const* codes, int warp, int sub) {
    return codes + (warp * 2 + sub / 2) * kTileBytes + lane_idx() * (kLaneWords * 4);
  }
  VDIT_DEVICE static void place(int quad, uint32_t word, uint32_t (&a)[2][4]) {
    a[quad / 4][quad / 2 % 2 + quad % 2 * 2] = word;
  }
  template <int kProduct>
  VDIT_DEVICE static int32_t finish(int32_t sum) {
    return sum;
  }
};

// 256 words of four. Every lane has a copy of the codebook in its own bank: 32 lanes look up 32 words at
// once, whatever they are.
struct VqWeights256x4 : VqWeightsBase<512> {
  struct Fixed {
    uint32_t words[256 * 32];
  };
  char const* words;  // with this lane's bank

  VDIT_DEVICE VqWeights256x4(Params const&, Fixed const& fixed, int64_t)
      : words(reinterpret_cast<char const*>(fixed.words) + lane_idx() * 4) {}

  VDIT_DEVICE static void fill(Params const& p, Fixed& fixed) {
    for (int i = warp_idx(); i < 256; i += kGemmThreads / 32) {
      fixed.words[i * 32 + lane_idx()] = static_cast<uint32_t const*>(p.codebook)[i];
    }
  }
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    tma_load(codes, p.codes, full, 0, step * 2, strip);
  }
  VDIT_DEVICE static void fetch(char const* codes, int warp, int sub, Raw& raw) {
    if (sub % 2 != 0) return;
    uint4 const v = *reinterpret_cast<uint4 const*>(lane_codes(codes, warp, sub));
    raw = {{v.x, v.y, v.z, v.w}};
  }
  // A byte a quad.
  VDIT_DEVICE void decode(Raw const& raw, int sub, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int quad = 0; quad < 8; ++quad) {
      uint32_t const four = raw.word[sub % 2 * 2 + quad / 4];
      int const shift = quad % 4 * 8 - 7;  // an index times the 128 bytes of its copies
      uint32_t const at = (shift < 0 ? four << 7 : four >> (shift < 0 ? 0 : shift)) & 0x7f80u;
      place(quad, *reinterpret_cast<uint32_t const*>(words + at), a);
    }
  }
};

// 64 words of two, twice a quad. The codebook is 128 bytes, a word of each bank: two lanes never want two
// words of one.
struct VqWeights64x2 : VqWeightsBase<768> {
  struct Fixed {
    uint16_t words[64];
  };
  char const* words;

  VDIT_DEVICE VqWeights64x2(Params const&, Fixed const& fixed, int64_t)
      : words(reinterpret_cast<char const*>(fixed.words)) {}

  VDIT_DEVICE static void fill(Params const& p, Fixed& fixed) {
    if (thread_idx() < 64) fixed.words[thread_idx()] = static_cast<uint16_t const*>(p.codebook)[thread_idx()];
  }
  // As two pieces a tile: a box has at most 256 values along a side.
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    tma_load(codes, p.codes, full, 0, step * 4, strip);
  }
  VDIT_DEVICE static void fetch(char const* codes, int warp, int sub, Raw& raw) {
    if (sub % 2 != 0) return;
    auto const* const v = reinterpret_cast<uint2 const*>(lane_codes(codes, warp, sub));
    raw = {{v[0].x, v[0].y, v[1].x, v[1].y, v[2].x, v[2].y}};
  }
  // The six bits from `bit` on, times the two bytes of a word.
  VDIT_DEVICE static uint32_t offset_of(Raw const& raw, int bit) {
    int const word = bit / 32, shift = bit % 32 - 1;
    if (shift < 0) return raw.word[word] << 1 & 0x7eu;
    uint32_t const next = word + 1 < kLaneWords ? raw.word[word + 1 < kLaneWords ? word + 1 : 0] : 0u;
    return static_cast<uint32_t>((static_cast<uint64_t>(next) << 32 | raw.word[word]) >> shift) & 0x7eu;
  }
  // 12 bits a quad.
  VDIT_DEVICE void decode(Raw const& raw, int sub, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int quad = 0; quad < 8; ++quad) {
      int const bit = (sub % 2 * 8 + quad) * 12;
      uint32_t const first = *reinterpret_cast<uint16_t const*>(words + offset_of(raw, bit));
      uint32_t const second = *reinterpret_cast<uint16_t const*>(words + offset_of(raw, bit + 6));
      place(quad, byte_perm(first, second, 0x5410u), a);
    }
  }
};

}  // namespace vdit::sm90
