// Hopper's instructions as device_sm90.h calls them: barriers are in hopper.cpp, the copy engine is in
// copies.cpp, the tensor cores in wgmma.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"

namespace vdit::emu {

// ---- mbarriers: 8 bytes of shared memory, whose state is kept beside them ---------------------------------

void barrier_init(uint64_t* barrier, int arrivals, Site at);
void fence_barrier_init();
// Expects `bytes` more in this phase, then arrives `arrivals` times (0 or 1).
void barrier_arrive(char const* name, uint64_t* barrier, int arrivals, int bytes, Site at);
// True when the phase of that parity is over. Without `block`, false when all else stands still.
bool barrier_wait(char const* name, uint64_t* barrier, int parity, bool block, Site at);

// ---- Named barriers, registers, one lane for all ----------------------------------------------------------

void named_barrier(char const* name, int id, int threads, bool wait, Site at);
void set_max_registers(char const* name, int registers, bool up, Site at);
bool elect_one(Site at);

// ---- The copy engine --------------------------------------------------------------------------------------

// What cuTensorMapEncodeTiled is told; dimension 0 is contiguous.
struct alignas(64) TensorMap {
  char* base;
  int element_bytes;
  int swizzle;  // 0, 32, 64 or 128 bytes
  int rank;
  uint64_t sizes[5];
  uint64_t strides[5];  // bytes
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's, so that Params are alike");

void tma_load(void* smem, TensorMap const& map, uint64_t* barrier, int rank, int const* at_element, Site at);
void tma_store(TensorMap const& map, void const* smem, int rank, int const* at_element, Site at);
void bulk_load(void* smem, void const* gmem, int bytes, uint64_t* barrier, Site at);
void bulk_store_commit();
void bulk_store_wait(int groups_left, bool only_read);

// The copy engine and the tensor cores see of ordinary stores only what was stored before somebody's fence.
void fence_async_proxy();

// ---- stmatrix: an ordinary store --------------------------------------------------------------------------

inline void stmatrix(char const* name, void* row, uint32_t const* r, int matrices, bool transpose, Site at) {
  struct Operand {
    char* row;
    uint32_t const* r;
    int matrices;
    bool transpose;
  } mine{static_cast<char*>(row), r, matrices, transpose};
  if (thread_index() % 32 < matrices * 8) check_shared(name, at, row, 16);
  meet_warp(name, at, &mine, [](void* const* operands, int count) {
    auto const lane = [operands](int i) { return static_cast<Operand*>(operands[i]); };
    for (int m = 0; m < lane(0)->matrices; ++m) {
      for (int i = 0; i < count; ++i) {  // ldmatrix, backwards
        uint32_t const value = lane(i)->r[m];
        if (lane(0)->transpose) {
          uint16_t const low = static_cast<uint16_t>(value), high = static_cast<uint16_t>(value >> 16);
          memcpy(lane(m * 8 + i % 4 * 2)->row + i / 4 * 2, &low, 2);
          memcpy(lane(m * 8 + i % 4 * 2 + 1)->row + i / 4 * 2, &high, 2);
        } else {
          memcpy(lane(m * 8 + i / 4)->row + i % 4 * 4, &value, 4);
        }
      }
    }
  });
}

// ---- wgmma ------------------------------------------------------------------------------------------------

enum class WgmmaType { kF16, kBF16, kS8, kU8S8 };  // kU8S8: a is unsigned

inline bool is_integer(WgmmaType type) { return type == WgmmaType::kS8 || type == WgmmaType::kU8S8; }

// The address that a matrix descriptor names. NOTE: not zero for the first byte, as on the GPU, where the
// system keeps the lowest kilobyte.
uint32_t shared_address(char const* name, Site at, void const* p);

struct Wgmma {
  char const* name;
  WgmmaType type;
  int n;
  bool mn_major_b;
  uint32_t* d;        // n / 2 registers, fp32 or int32
  uint32_t const* a;  // four registers, or null
  uint64_t descriptor_a, descriptor_b;
  bool accumulate;
};
void wgmma(Wgmma const& mine, Site at);
void wgmma_fence(Site at);
void wgmma_commit(Site at);
void wgmma_wait(int groups_left, Site at);

}  // namespace vdit::emu
