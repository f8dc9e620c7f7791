// Starts a kernel functor (device.h shows one): on the GPU under nvcc, on fibers under VDIT_EMU.
#pragma once

#include <cxxabi.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>

#if defined(VDIT_EMU)
#include "../emu/block.h"
#else
#include <cuda_runtime.h>
#endif

namespace vdit {

struct Grid {
  int64_t x, y, z;
};

template <class Kernel>
std::string kernel_name() {
  int status = 0;
  char* readable = abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : typeid(Kernel).name();
  std::free(readable);
  return name;
}

namespace detail {
// What holds on every backend. Returns false where there is nothing to run.
template <class Kernel>
bool check_launch(Grid grid) {
  using Params = typename Kernel::Params;
  static_assert(Kernel::kThreads > 0 && Kernel::kThreads <= 1024 && Kernel::kThreads % 32 == 0,
                "kThreads must be a multiple of 32 up to 1024: the warp functions need full warps.");
  static_assert(std::is_trivially_copyable<Params>::value && sizeof(Params) <= 4096,
                "Params must be plain data of at most 4096 bytes, as kernel arguments are.");
  if (grid.x > 2147483647 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(
        kernel_name<Kernel>() + ": the grid may be at most 2147483647 x 65535 x 65535, got " +
        std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + ".");
  }
  return grid.x > 0 && grid.y > 0 && grid.z > 0;
}
}  // namespace detail

#if defined(VDIT_EMU)

template <class Kernel>
void launch(Grid grid, size_t smem_bytes, void* /*stream*/, typename Kernel::Params const& p) {
  if (!detail::check_launch<Kernel>(grid)) return;
  emu::run_grid(
      {kernel_name<Kernel>(),
       {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)},
       Kernel::kThreads,
       smem_bytes,
       &p,
       [](void const* params, char* smem) {
         Kernel{}(*static_cast<typename Kernel::Params const*>(params), smem);
       },
       Kernel::kMinBlocks});
}

inline int multiprocessors() { return 3; }  // any number: the blocks of a grid run one after another

#else

namespace detail {

// `what` is called only on failure: a launch that works builds no text.
template <class What>
void check_cuda(cudaError_t error, What const& what) {
  if (error != cudaSuccess) throw std::runtime_error(what() + ": " + cudaGetErrorString(error) + ".");
}

// 1024 bytes is what the widest shared-memory swizzle (TMA and wgmma, 128 bytes) asks of the base.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(__grid_constant__ typename Kernel::Params const p) {
  extern __shared__ __align__(1024) char vdit_dynamic_smem[];
  Kernel{}(p, vdit_dynamic_smem);
}

// Past 48 KB, shared memory is had only by asking for it. All that the device has is asked for, once: what a
// launch then takes may differ from call to call, also between threads.
template <class Kernel>
void allow_shared(size_t smem_bytes) {
  constexpr size_t kFreeBytes = 48 * 1024;
  static std::atomic<size_t> granted[64] = {};  // by device; those past 63 are asked every time
  if (smem_bytes <= kFreeBytes) return;
  int device = 0;
  check_cuda(cudaGetDevice(&device), [] { return kernel_name<Kernel>() + ": no CUDA device could be read"; });
  if (device < 64 && smem_bytes <= granted[device].load(std::memory_order_relaxed)) return;
  int allowed = 0;
  check_cuda(cudaDeviceGetAttribute(&allowed, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             [] { return kernel_name<Kernel>() + ": the shared memory limit could not be read"; });
  if (smem_bytes > static_cast<size_t>(allowed)) {
    throw std::runtime_error(kernel_name<Kernel>() + ": a block needs " + std::to_string(smem_bytes) +
                             " bytes of shared memory, but this device allows " + std::to_string(allowed) +
                             ".");
  }
  check_cuda(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed),
             [&] {
               return kernel_name<Kernel>() + ": " + std::to_string(allowed) +
                      " bytes of shared memory were refused";
             });
  if (device < 64) granted[device].store(static_cast<size_t>(allowed), std::memory_order_relaxed);
}

}  // namespace detail

template <class Kernel>
void launch(Grid grid, size_t smem_bytes, void* stream, typename Kernel::Params const& p) {
  if (!detail::check_launch<Kernel>(grid)) return;
  detail::allow_shared<Kernel>(smem_bytes);
  // The function and not <<<>>>: clang-format takes that token apart, which nvcc then refuses.
  void* arguments[] = {const_cast<typename Kernel::Params*>(&p)};
  detail::check_cuda(cudaLaunchKernel(reinterpret_cast<void const*>(detail::kernel_entry<Kernel>),
                                      dim3(grid.x, grid.y, grid.z), dim3(Kernel::kThreads), arguments,
                                      smem_bytes, static_cast<cudaStream_t>(stream)),
                     [] { return kernel_name<Kernel>() + ": the launch failed"; });
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  auto const what = [] { return std::string("vdit: the number of multiprocessors could not be read"); };
  detail::check_cuda(cudaGetDevice(&device), what);
  detail::check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), what);
  return count;
}

#endif

}  // namespace vdit
