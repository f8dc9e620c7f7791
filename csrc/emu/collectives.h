// The instructions, each as a rendezvous over the core. device.h calls these; kernels call device.h.
//
// They are inline, so that a sanitizer that watches the kernel also watches what the instructions read and
// write in shared memory; only arithmetic (mma.cpp) lives with the core.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "block.h"

namespace vdit::emu {

// ---- Barriers --------------------------------------------------------------------------------------------

inline void sync_block(Site at) { meet_block("sync_block", at, nullptr, nullptr); }
inline void sync_warp(Site at) { meet_warp("sync_warp", at, nullptr, nullptr); }

// How many threads of the block say true.
inline int sync_block_count(char const* name, bool mine, Site at) {
  int value = mine ? 1 : 0;
  meet_block(name, at, &value, [](void* const* operands, int count) {
    int total = 0;
    for (int i = 0; i < count; ++i) total += *static_cast<int*>(operands[i]);
    for (int i = 0; i < count; ++i) *static_cast<int*>(operands[i]) = total;
  });
  return value;
}

// ---- Warp exchange ---------------------------------------------------------------------------------------

// The value of lane `source`; one's own where there is no such lane.
inline uint64_t shuffle(char const* name, uint64_t value, int source, Site at) {
  struct Operand {
    uint64_t value, result;
    int source;
  } mine{value, value, source};
  meet_warp(name, at, &mine, [](void* const* operands, int count) {
    for (int i = 0; i < count; ++i) {
      auto* const to = static_cast<Operand*>(operands[i]);
      if (to->source >= 0 && to->source < count)
        to->result = static_cast<Operand*>(operands[to->source])->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(char const* name, bool mine, Site at) {
  uint32_t value = mine ? 1 : 0;
  meet_warp(name, at, &value, [](void* const* operands, int count) {
    uint32_t votes = 0;
    for (int i = 0; i < count; ++i) votes |= *static_cast<uint32_t*>(operands[i]) << i;
    for (int i = 0; i < count; ++i) *static_cast<uint32_t*>(operands[i]) = votes;
  });
  return value;
}

// ---- Atomics ---------------------------------------------------------------------------------------------

// Really atomic and relaxed, as on the GPU: other host threads may run blocks, and ThreadSanitizer should
// neither report it nor take it for a barrier.
template <class T, class Update>
T atomic_update(T* at, Update update) {
  std::atomic_ref<T> target(*at);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, update(old), std::memory_order_relaxed)) {
  }
  return old;
}

// ---- cp.async --------------------------------------------------------------------------------------------

// NOTE: the destination is poisoned at once and filled at the wait, because the hardware may write it at any
// time in between: whoever reads too early, or has not finished with the old contents, gets NaN.
inline void cp_async_16(void* destination, void const* source, bool valid, Site at) {
  check_shared("cp_async_16", at, destination, 16);
  if (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fail("cp_async_16", at, "a global address that is not a multiple of 16");
  }
  memset(destination, 0xFF, 16);
  push_copy({destination, valid ? source : nullptr});
}

inline void cp_async_commit() { commit_copies(); }

inline void cp_async_wait(int groups_left) {
  AsyncCopy copy;
  while (pop_copy(groups_left, &copy)) {
    if (copy.source != nullptr) {
      memcpy(copy.destination, copy.source, 16);
    } else {
      memset(copy.destination, 0, 16);
    }
  }
}

// ---- ldmatrix --------------------------------------------------------------------------------------------

inline void ldmatrix(char const* name, uint32_t* r, int matrices, void const* row, bool transpose, Site at) {
  struct Operand {
    uint32_t* r;
    char const* row;
    int matrices;
    bool transpose;
  } mine{r, static_cast<char const*>(row), matrices, transpose};
  if (thread_index() % 32 < matrices * 8) check_shared(name, at, row, 16);
  meet_warp(name, at, &mine, [](void* const* operands, int count) {
    auto const lane = [operands](int i) { return static_cast<Operand*>(operands[i]); };
    for (int m = 0; m < lane(0)->matrices; ++m) {
      for (int i = 0; i < count; ++i) {
        uint32_t& result = lane(i)->r[m];
        if (lane(0)->transpose) {  // rows 2 * (i % 4) and the next, column i / 4
          uint16_t low, high;
          memcpy(&low, lane(m * 8 + i % 4 * 2)->row + i / 4 * 2, 2);
          memcpy(&high, lane(m * 8 + i % 4 * 2 + 1)->row + i / 4 * 2, 2);
          result = low | static_cast<uint32_t>(high) << 16;
        } else {  // row i / 4, columns 2 * (i % 4) and the next
          memcpy(&result, lane(m * 8 + i / 4)->row + i % 4 * 4, 4);
        }
      }
    }
  });
}

// ---- mma.sync --------------------------------------------------------------------------------------------

struct MmaOperand {
  void* d;  // four fp32 or int32
  uint32_t const* a;
  uint32_t const* b;
};
void multiply_m16n8k16_f16(void* const* operands, int count);
void multiply_m16n8k16_bf16(void* const* operands, int count);
void multiply_m16n8k32_s8(void* const* operands, int count);

inline void mma_m16n8k16_f16(float* d, uint32_t const* a, uint32_t const* b, Site at) {
  MmaOperand mine{d, a, b};
  meet_warp("mma_m16n8k16_f16", at, &mine, multiply_m16n8k16_f16);
}

inline void mma_m16n8k16_bf16(float* d, uint32_t const* a, uint32_t const* b, Site at) {
  MmaOperand mine{d, a, b};
  meet_warp("mma_m16n8k16_bf16", at, &mine, multiply_m16n8k16_bf16);
}

inline void mma_m16n8k32_s8(int32_t* d, uint32_t const* a, uint32_t const* b, Site at) {
  MmaOperand mine{d, a, b};
  meet_warp("mma_m16n8k32_s8", at, &mine, multiply_m16n8k32_s8);
}

}  // namespace vdit::emu
