// What the decoders of both architectures do with a word of codes, in the layouts of vdit/linear.h.
#pragma once
#include "common/device.h"

namespace vdit {

constexpr uint32_t kLowNibbles = 0x0f0f0f0fu, kHighNibbles = 0xf0f0f0f0u;

// A word of each plane to the codes of its low nibbles and of its high nibbles: 16 high + low - 128, where
// taking 128 off turns the highest bit around.
VDIT_DEVICE void merge_planes(uint32_t high, uint32_t low, uint32_t& of_low, uint32_t& of_high) {
  high ^= 0x88888888u;
  of_low = (high << 4 & kHighNibbles) | (low & kLowNibbles);
  of_high = (high & kHighNibbles) | (low >> 4 & kLowNibbles);
}

// A row of a table of int8 in registers. PRMT looks four codes up at once: in 8 entries directly, in 16 among
// those of the lower and of the upper half, and then chooses by bit 3.
template <int kSize>
struct TableRow {
  uint32_t words[kSize / 4];

  // Zeros where there is no such row. The table starts at a multiple of 8 bytes.
  VDIT_DEVICE void load(int8_t const* table, int64_t row, int64_t rows) {
    CUTE_UNROLL
    for (int i = 0; i < kSize / 4; i += 2) {
      uint2 v{0u, 0u};
      if (row < rows) v = *reinterpret_cast<uint2 const*>(table + row * kSize + i * 4);
      words[i] = v.x, words[i + 1] = v.y;
    }
  }

  // The entries of the four codes in the lower half of `codes`, and of those in its upper half. What is
  // masked and shifted for both at once is half the work of doing it twice.
  VDIT_DEVICE void look_up(uint32_t codes, uint32_t& first, uint32_t& second) const {
    uint32_t const entry = codes & 0x77777777u;  // PRMT takes bit 3 for a sign
    if constexpr (kSize == 8) {
      first = byte_perm(words[0], words[1], entry);
      second = byte_perm(words[0], words[1], entry >> 16);
    } else {
      uint32_t const half = (codes >> 1 & 0x44444444u) | 0x32103210u;
      first = choose(entry, half);
      second = choose(entry >> 16, half >> 16);
    }
  }

 private:
  // `half` says of each byte whether the lower or the upper eight entries are meant.
  VDIT_DEVICE uint32_t choose(uint32_t entry, uint32_t half) const {
    return byte_perm(byte_perm(words[0], words[1], entry),
                     byte_perm(words[kSize / 4 - 2], words[kSize / 4 - 1], entry), half);
  }
};

}  // namespace vdit
