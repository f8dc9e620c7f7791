// Codes and codebooks on the GPU: a lane's codes of a tile as registers, and codebooks in shared memory,
// copied so often that the lanes of a warp never meet in a bank, whatever their codes are. (A single copy
// serialises about three times on random codes.)
#pragma once
#include "common/device.h"
#include "vdit/vq.h"

namespace vdit {

template <VqFormat kFormat>
inline constexpr int kVqTileBytes = kFormat == VqFormat::k256x4 ? 512 : 768;
template <VqFormat kFormat>
inline constexpr int kVqWords = kFormat == VqFormat::k256x4 ? 256 : 64;
template <VqFormat kFormat>
inline constexpr int kVqDim = kFormat == VqFormat::k256x4 ? 4 : 2;

// kCount of a lane's sixteen codes: those of one half (32 k) of a tile, or all. Code j is of column 8 (j % 8
// / 2) + lane / 4 and of four k from 32 (j / 8) + 16 (j % 2) + 4 (lane % 4) on.
template <VqFormat kFormat, int kCount>
struct LaneCodes {
  static constexpr int kBits = kFormat == VqFormat::k256x4 ? 8 : 12;
  static constexpr int kRegisters = kCount * kBits / 32;
  uint32_t r[kRegisters];

  // Of the half `half` where kCount is 8.
  VDIT_DEVICE void load(char const* tile, int half = 0) {
    char const* const mine = tile + lane_idx() * (16 * kBits / 8) + half * (8 * kBits / 8);
    if constexpr (kRegisters == 4) {
      uint4 const v = *reinterpret_cast<uint4 const*>(mine);
      r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
    } else if constexpr (kRegisters == 3) {
      CUTE_UNROLL
      for (int i = 0; i < 3; ++i) r[i] = reinterpret_cast<uint32_t const*>(mine)[i];
    } else {
      CUTE_UNROLL
      for (int i = 0; i < kRegisters / 2; ++i) {
        uint2 const v = reinterpret_cast<uint2 const*>(mine)[i];
        r[2 * i] = v.x, r[2 * i + 1] = v.y;
      }
    }
  }

  // `j` is known at compile time once its loop is unrolled.
  VDIT_DEVICE int code(int j) const {
    int const word = j * kBits / 32, shift = j * kBits % 32;
    uint32_t bits = r[word] >> shift;
    if (shift + kBits > 32) bits |= r[word + 1] << (32 - shift);
    return static_cast<int>(bits & ((1u << kBits) - 1u));
  }
};

// An int8 codebook: look_up gives the four bytes of a code.
template <VqFormat kFormat>
struct ByteWords {
  static constexpr int kBytes = kVqWords<kFormat> * 32 * 4;  // a copy a lane
  char const* words;

  // All threads; seen by others after a barrier.
  VDIT_DEVICE static void fill(char* to, void const* codebook, int threads) {
    for (int i = thread_idx(); i < kVqWords<kFormat> * 32; i += threads) {
      if constexpr (kFormat == VqFormat::k256x4) {
        reinterpret_cast<uint32_t*>(to)[i] = static_cast<uint32_t const*>(codebook)[i / 32];
      } else {  // two bytes, twice
        reinterpret_cast<uint32_t*>(to)[i] = static_cast<uint16_t const*>(codebook)[i / 32] * 0x10001u;
      }
    }
  }

  VDIT_DEVICE uint32_t word(int index) const {
    return reinterpret_cast<uint32_t const*>(words)[index * 32 + lane_idx()];
  }
  VDIT_DEVICE uint32_t look_up(int code) const {
    if constexpr (kFormat == VqFormat::k256x4) {
      return word(code);
    } else {
      return byte_perm(word(code & 63), word(code >> 6), 0x5410);
    }
  }
};

// A codebook of 16-bit floats: look_up gives a code's four as two registers.
template <VqFormat kFormat>
struct HalfWords {
  static constexpr int kWordBytes = 2 * kVqDim<kFormat>;
  static constexpr int kCopies = 128 / kWordBytes;  // one for each lane that is served at a time
  static constexpr int kBytes = kVqWords<kFormat> * 128;
  char const* words;

  VDIT_DEVICE static void fill(char* to, void const* codebook, int threads) {
    for (int i = thread_idx(); i < kVqWords<kFormat> * kCopies; i += threads) {
      if constexpr (kFormat == VqFormat::k256x4) {
        reinterpret_cast<uint2*>(to)[i] = static_cast<uint2 const*>(codebook)[i / kCopies];
      } else {
        reinterpret_cast<uint32_t*>(to)[i] = static_cast<uint32_t const*>(codebook)[i / kCopies];
      }
    }
  }

  VDIT_DEVICE void look_up(int code, uint32_t (&b)[2]) const {
    int const copy = lane_idx() % kCopies;
    if constexpr (kFormat == VqFormat::k256x4) {
      uint2 const v = reinterpret_cast<uint2 const*>(words)[code * kCopies + copy];
      b[0] = v.x, b[1] = v.y;
    } else {
      b[0] = reinterpret_cast<uint32_t const*>(words)[(code & 63) * kCopies + copy];
      b[1] = reinterpret_cast<uint32_t const*>(words)[(code >> 6) * kCopies + copy];
    }
  }
};

}  // namespace vdit
