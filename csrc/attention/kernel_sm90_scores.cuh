// The product of queries and keys in shared memory on wgmma, for attention and block masses.
#pragma once
#include "common/device_sm90.h"

namespace vdit::sm90 {

// Scores of 64 queries and kKeys keys, in flight when this returns. Both lie in slabs of 64 columns: rows of
// 128 bytes with the widest swizzle, all rows of one slab before the next slab. Descriptors are stepped on
// from the first: building each from its address would cost five instructions a product.
template <class T, int kHeadDim, int kKeys>
VDIT_DEVICE void multiply_slabs(char const* queries, char const* keys, float (&scores)[kKeys / 2]) {
  constexpr int kRowBytes = 128;
  uint64_t const q = wgmma_descriptor(queries, SmemSwizzle::k128, 16, 8 * kRowBytes);
  uint64_t const k = wgmma_descriptor(keys, SmemSwizzle::k128, 16, 8 * kRowBytes);
  CUTE_UNROLL
  for (int i = 0; i < kHeadDim / 16; ++i) {
    int const slab = i / 4, column = i % 4 * 32;  // in bytes, within the slab
    wgmma_ss<T, kKeys, Major::kK>(scores, wgmma_advance(q, slab * 64 * kRowBytes + column),
                                  wgmma_advance(k, slab * kKeys * kRowBytes + column), i > 0);
  }
}

}  // namespace vdit::sm90
