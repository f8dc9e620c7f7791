// What mma.sync computes, over the operands of a warp's 32 lanes. Products are exact in fp32 and are added in
// fp32 to the accumulator in order of k; the hardware adds them in another order and truncates.
#include <cstdint>
#include <cstring>

#include "collectives.h"
#include "numbers.h"

namespace vdit::emu {
namespace {

// How the PTX manual spreads the matrices over lanes: lane 4 * g + t holds rows g and g + 8 of a and d, and
// column g of b; t picks the position along k (four bytes) and the pair of columns of d.
// A row of eight columns is one vector of the compiler's, whatever registers it finds for it.
template <class T>
using Row [[gnu::vector_size(8 * sizeof(T))]] = T;

template <float (*kConvert)(uint32_t)>
void multiply_m16n8k16(void* const* operands) {
  float a[16][16];
  Row<float> b[16], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    auto const* const mine = static_cast<MmaOperand*>(operands[lane]);
    auto const* const c = static_cast<float const*>(mine->d);
    int const g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int const row = g + i % 2 * 8, k = t * 2 + i / 2 * 8;
      a[row][k] = kConvert(mine->a[i] & 0xffffu);
      a[row][k + 1] = kConvert(mine->a[i] >> 16);
      d[g + i / 2 * 8][t * 2 + i % 2] = c[i];
    }
    for (int i = 0; i < 2; ++i) {
      int const k = t * 2 + i * 8;
      b[k][g] = kConvert(mine->b[i] & 0xffffu);
      b[k + 1][g] = kConvert(mine->b[i] >> 16);
    }
  }
  for (int m = 0; m < 16; ++m) {
    Row<float> sum = d[m];
    for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k];
    d[m] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* const c = static_cast<float*>(static_cast<MmaOperand*>(operands[lane])->d);
    for (int i = 0; i < 4; ++i) c[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply_m16n8k16_f16(void* const* operands, int) { multiply_m16n8k16<f16_to_float>(operands); }
void multiply_m16n8k16_bf16(void* const* operands, int) { multiply_m16n8k16<bf16_to_float>(operands); }

// Thirty-two products of int8 are at most 2^19, so fp32 adds them exactly, and faster than integers where the
// compiler may assume no more than SSE2. Only the accumulator wraps, as the hardware's does.
void multiply_m16n8k32_s8(void* const* operands, int) {
  float a[16][32];
  Row<float> b[32], sum[16];
  for (int lane = 0; lane < 32; ++lane) {
    auto const* const mine = static_cast<MmaOperand*>(operands[lane]);
    int const g = lane / 4, t = lane % 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t * 4 + byte + i / 2 * 16] = byte_of(mine->a[i], byte);
      for (int i = 0; i < 2; ++i) b[t * 4 + byte + i * 16][g] = byte_of(mine->b[i], byte);
    }
  }
  for (int m = 0; m < 16; ++m) {
    Row<float> row = {};
    for (int k = 0; k < 32; ++k) row += a[m][k] * b[k];
    sum[m] = row;
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* const d = static_cast<uint32_t*>(static_cast<MmaOperand*>(operands[lane])->d);
    for (int i = 0; i < 4; ++i) {
      d[i] += static_cast<uint32_t>(static_cast<int32_t>(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]));
    }
  }
}

}  // namespace vdit::emu
