// Tensor maps: how the copy engine of sm_90 is told of a tensor in global memory. Host side; device_sm90.h
// has the copies.
//
//   struct Params { TensorMap k; ... };   // params are __grid_constant__, which a map needs
//   params.k = make_tensor_map(k, 2, {d, s, h, b}, {stride_s, stride_h, stride_b}, {64, 128, 1, 1},
//                              SmemSwizzle::k128);
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "check.h"

#if defined(VDIT_EMU)
#include "../emu/hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace vdit {

// Which bits of a shared-memory address are changed: 16-byte pieces trade places within rows of this many
// bytes, by the number of the 128-byte line that they lie in (modulo 8, 4 and 2).
enum class SmemSwizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// Plain data of 128 bytes, to be handed to a kernel in its Params.
#if defined(VDIT_EMU)
using TensorMap = emu::TensorMap;
#else
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "A TensorMap carries a CUtensorMap.");
#endif

namespace detail {

struct TensorMapShape {
  int rank;
  uint64_t sizes[5];
  uint64_t strides[5];  // bytes; of dimension 1 and on, as the driver counts
  uint32_t box[5];
};

// What CUDA's documentation asks of a map, as sentences. One rule is ours: a swizzled box is as wide as its
// swizzle, since nothing says how many bytes a narrower one counts on its barrier. Load a box of full width
// instead: columns past the tensor's come as zeros.
inline TensorMapShape check_tensor_map(void const* base, int element_bytes,
                                       std::initializer_list<int64_t> sizes,
                                       std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                                       SmemSwizzle swizzle) {
  constexpr char const* kOp = "make_tensor_map";
  VDIT_CHECK(element_bytes == 1 || element_bytes == 2, kOp, "elements must have 1 or 2 bytes, got ",
             element_bytes);
  VDIT_CHECK(sizes.size() >= 2 && sizes.size() <= 5, kOp, "the rank must be 2 to 5, got ", sizes.size());
  VDIT_CHECK(strides.size() + 1 == sizes.size() && box.size() == sizes.size(), kOp, "rank ", sizes.size(),
             " needs one stride fewer and a box of that rank, got ", strides.size(), " strides and a box of ",
             box.size());
  VDIT_CHECK(reinterpret_cast<uintptr_t>(base) % 16 == 0, kOp,
             "the base must be a multiple of 16 bytes, got ", base);
  TensorMapShape shape = {static_cast<int>(sizes.size()), {}, {}, {}};
  for (int i = 0; i < shape.rank; ++i) {
    int64_t const size = sizes.begin()[i];
    int const side = box.begin()[i];
    VDIT_CHECK(size >= 1 && size <= int64_t{1} << 32, kOp, "size ", i, " must be 1 to 2^32, got ", size);
    VDIT_CHECK(side >= 1 && side <= 256, kOp, "side ", i, " of the box must be 1 to 256, got ", side);
    shape.sizes[i] = static_cast<uint64_t>(size);
    shape.box[i] = static_cast<uint32_t>(side);
    if (i == 0) continue;
    int64_t const stride = strides.begin()[i - 1];
    VDIT_CHECK(stride >= 0 && stride < int64_t{1} << 40 && stride % 16 == 0, kOp, "the stride of dimension ",
               i, " must be a multiple of 16 below 2^40 bytes, got ", stride);
    shape.strides[i - 1] = static_cast<uint64_t>(stride);
  }
  int const width = static_cast<int>(shape.box[0]) * element_bytes;
  VDIT_CHECK(width % 16 == 0, kOp, "a row of the box must be a multiple of 16 bytes, got ", width);
  VDIT_CHECK(swizzle == SmemSwizzle::kNone || width == static_cast<int>(swizzle), kOp,
             "a row of the box must have ", static_cast<int>(swizzle),
             " bytes, the width of its swizzle, got ", width);
  return shape;
}

}  // namespace detail

// A map over [..., size1, size0] of elements of 1 or 2 bytes, dimension 0 contiguous and first in every list.
// Strides are in bytes and start with dimension 1. What a box reads outside of the tensor is zero; what it
// writes there is dropped.
inline TensorMap make_tensor_map(void const* base, int element_bytes, std::initializer_list<int64_t> sizes,
                                 std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                                 SmemSwizzle swizzle) {
  auto const shape = detail::check_tensor_map(base, element_bytes, sizes, strides, box, swizzle);
#if defined(VDIT_EMU)
  TensorMap map = {static_cast<char*>(const_cast<void*>(base)),
                   element_bytes,
                   static_cast<int>(swizzle),
                   shape.rank,
                   {},
                   {},
                   {}};
  for (int i = 0; i < shape.rank; ++i) {
    map.sizes[i] = shape.sizes[i];
    map.strides[i] = i == 0 ? static_cast<uint64_t>(element_bytes) : shape.strides[i - 1];
    map.box[i] = static_cast<uint16_t>(shape.box[i]);
  }
  return map;
#else
  // Asked of the runtime, so that nothing needs to be linked with libcuda, which machines without a GPU lack.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaError_t const error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaError_t const error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    VDIT_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess && found != nullptr,
               "make_tensor_map", "the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMapSwizzle const mode = swizzle == SmemSwizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == SmemSwizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == SmemSwizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                : CU_TENSOR_MAP_SWIZZLE_NONE;
  uint32_t const every[5] = {1, 1, 1, 1, 1};
  CUtensorMap driver;
  CUresult const result =
      encode(&driver, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
             static_cast<uint32_t>(shape.rank), const_cast<void*>(base), shape.sizes, shape.strides,
             shape.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  VDIT_CHECK(result == CUDA_SUCCESS, "make_tensor_map", "the driver refused a map of rank ", shape.rank,
             " with error ", static_cast<int>(result));
  TensorMap map;
  memcpy(&map, &driver, sizeof(map));
  return map;
#endif
}

}  // namespace vdit
