// What the launchers for compute capability 9.0 share: which tensors TMA can walk, and maps of their rows.
#pragma once
#include <cstdint>

#include "common/tma.h"
#include "vdit/types.h"

namespace vdit::sm90 {

// TMA takes strides below 2^40 bytes. Elements are of 2 bytes, strides multiples of 16 bytes. A stride of 0
// is not said to be one.
inline bool can_walk(Strides3 const& stride, int64_t batch, int64_t heads, int64_t length) {
  auto const fits = [](int64_t size, int64_t elements) {
    return size <= 1 || (elements > 0 && elements * 2 < (int64_t{1} << 40));
  };
  return fits(batch, stride.b) && fits(heads, stride.h) && fits(length, stride.s);
}

struct RowsShape {
  int64_t batch, heads, length, head_dim;
};

// Rows [batch, heads, length, head_dim] of 2-byte elements as TMA sees them, in boxes of 64 columns.
inline TensorMap map_rows(void const* rows, Strides3 const& stride, RowsShape const& shape, int box_rows) {
  // A dimension of one entry is never stepped over; its stride may be anything, TMA's may not.
  auto const bytes = [](int64_t size, int64_t elements) { return size > 1 ? elements * 2 : int64_t{16}; };
  return make_tensor_map(
      rows, 2, {shape.head_dim, shape.length, shape.heads, shape.batch},
      {bytes(shape.length, stride.s), bytes(shape.heads, stride.h), bytes(shape.batch, stride.b)},
      {64, box_rows, 1, 1}, SmemSwizzle::k128);
}

}  // namespace vdit::sm90
