// Types that every kernel family shares. Nothing here knows torch or CUDA, so that other inference stacks
// can include it.
#pragma once
#include <cstdint>

namespace vdit {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How a CPU kernel gets its threads. The caller lends its own pool, so that a process has one pool and not
// two: the torch ops lend torch's. `run` calls body(state, begin, end) on disjoint ranges that cover [0, n); body
// throws nothing.
// A null `run` means: the calling thread does all of it.
struct ParallelFor {
  void (*run)(void* context, int64_t n, int64_t grain, void (*body)(void* state, int64_t begin, int64_t end),
              void* state) = nullptr;
  void* context = nullptr;
  int num_threads = 1;
};

// Strides count elements. The last dimension is always contiguous. A stride of 0 broadcasts.
struct Strides3 {
  int64_t b = 0, h = 0, s = 0;
};
struct Strides2 {
  int64_t b = 0, h = 0;
};

// Compute capability of a CUDA device, 90 for 9.0; 0 where there is none. In vdit_kernels_cuda.
int compute_capability(int device);

}  // namespace vdit
