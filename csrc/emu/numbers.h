// The values that the tensor cores multiply, as fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace vdit::emu {

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float bf16_to_float(uint32_t half) { return from_bits(half << 16); }

// Shifts exponent and mantissa into fp32's places and corrects the bias by an exact multiplication, which
// also makes subnormals come out right; infinity and NaN need their exponent put back.
inline float f16_to_float(uint32_t half) {
  uint32_t const magnitude = (half & 0x7fffu) << 13;
  uint32_t bits;
  float const scaled = from_bits(magnitude) * 0x1p112f;
  memcpy(&bits, &scaled, sizeof(bits));
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;
  return from_bits(bits | (half & 0x8000u) << 16);
}

// Byte `i` of four int8 values.
inline float byte_of(uint32_t four, int i) { return static_cast<int8_t>(four >> (8 * i)); }

}  // namespace vdit::emu
