// How codes of int8 words become the first operand of wgmma: what RegisterWeightsKernel (common/gemm_sm90.cuh) asks
// for. A quad of four neighbouring channels is one register of it; the layouts are those of vdit/vq.h.
#pragma once
#include "common/device_sm90.h"
#include "common/tma.h"

namespace vdit::sm90 {

struct VqWeightsParams {
  TensorMap codes;
  void const* codebook;  // int8
};

// A strip has two tiles of 64 channels a stage. A quad's index among the eight of 32 channels is 2 n_sub + k_half, and
// its place in the products' registers follows.
template <class Words, int kTileBytes_>
struct VqWeightsBase {
  using Operand = int8_t;
  using Params = VqWeightsParams;
  static constexpr int kTileBytes = kTileBytes_;
  static constexpr int kStageBytes = 8 * 2 * kTileBytes;

  VDIT_DEVICE static char const* tile_of(char const* codes, int warp, int sub) {
    return codes + (warp * 2 + sub / 2) * kTileBytes;
  }
  VDIT_DEVICE static void place(int quad, uint32_t word, uint32_t (&a)[2][4]) {
    a[quad / 4][quad / 2 % 2 + quad % 2 * 2] = word;
  }
  template <int kProduct>
  VDIT_DEVICE static int32_t finish(int32_t sum) {
    return sum;
  }
};

// 256 words of four. Every lane has a copy of the codebook in its own bank: 32 lanes look up 32 words at once, whatever
// they are.
struct VqWeights256x4 : VqWeightsBase<VqWeights256x4, 512> {
  struct Fixed {
    uint32_t words[256 * 32];
  };
  struct Raw {
    uint32_t indices[2];  // one byte a quad
  };
  char const* words;  // with this lane's bank

  VDIT_DEVICE VqWeights256x4(Params const&, Fixed const& fixed, int64_t)
      : words(reinterpret_cast<char const*>(fixed.words) + lane_idx() * 4) {}

  VDIT_DEVICE static void fill(Params const& p, Fixed& fixed) {
    for (int i = warp_idx(); i < 256; i += 12) {
      fixed.words[i * 32 + lane_idx()] = static_cast<uint32_t const*>(p.codebook)[i];
    }
  }
  VDIT_DEVICE static void load(Params const& p, char* codes, Barrier* full, int strip, int step) {
    tma_load(codes, p.codes, full, 0, step * 2, strip);
  }
  VDIT_DEVICE static Raw fetch(char const* codes, int warp, int sub) {
    uint2 const v = *reinterpret_cast<uint2 const*>(tile_of(codes, warp, sub) + lane_idx() * 16 + sub % 2 * 8);
    return {{v.x, v.y}};
  }
  VDIT_DEVICE void decode(Raw const& raw, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int quad = 0; quad < 8; ++quad) {
      uint32_t const four = raw.indices[quad / 4];
      int const shift = quad % 4 * 8 - 7;  // an index times the 128 bytes of its copies
      uint32_t const at = (shift < 0 ? four << 7 : four >> (shift < 0 ? 0 : shift)) & 0x7f80u;
      place(quad, *reinterpret_cast<uint32_t const*>(words + at), a);
    }
  }
};

// 64 words of two, twice a quad. The codebook is 128 bytes, a word of each bank: two lanes never want two words of one.
struct VqWeights64x2 : VqWeightsBase<VqWeights64x2, 768> {
  struct Fixed {
    uint16_t words[64];
  };
  struct Raw {
    uint32_t indices[3];  // 12 bits a quad
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
  VDIT_DEVICE static Raw fetch(char const* codes, int warp, int sub) {
    auto const* const v =
        reinterpret_cast<uint32_t const*>(tile_of(codes, warp, sub) + lane_idx() * 24 + sub % 2 * 12);
    return {{v[0], v[1], v[2]}};
  }
  // The six bits from `bit` on, times the two bytes of a word.
  VDIT_DEVICE static uint32_t offset_of(Raw const& raw, int bit) {
    int const word = bit / 32, shift = bit % 32 - 1;
    if (shift < 0) return raw.indices[word] << 1 & 0x7eu;
    uint64_t const two = static_cast<uint64_t>(word < 2 ? raw.indices[word < 2 ? word + 1 : 2] : 0u) << 32 |
                         raw.indices[word];
    return static_cast<uint32_t>(two >> shift) & 0x7eu;
  }
  VDIT_DEVICE void decode(Raw const& raw, uint32_t (&a)[2][4]) const {
    CUTE_UNROLL
    for (int quad = 0; quad < 8; ++quad) {
      uint32_t const first = *reinterpret_cast<uint16_t const*>(words + offset_of(raw, quad * 12));
      uint32_t const second = *reinterpret_cast<uint16_t const*>(words + offset_of(raw, quad * 12 + 6));
      place(quad, byte_perm(first, second, 0x5410u), a);
    }
  }
};

}  // namespace vdit::sm90
