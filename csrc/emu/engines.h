// What mbarriers (hopper.cpp), the copy engine (copies.cpp) and the tensor cores (wgmma.cpp) want of each
// other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "block.h"

namespace vdit::emu {

// ---- mbarriers --------------------------------------------------------------------------------------------

struct Mbarrier {
  size_t offset = 0;
  int arrivals = 0;  // a phase
  Site where{};      // its init
  int initialiser = 0;
  bool fenced = false;
  unsigned phase = 0;                // how many have ended
  int pending = 0;                   // arrivals that this one lacks
  int64_t bytes = 0;                 // expected and not yet come
  bool seen = true;                  // has a thread waited for the end of the last phase?
  std::vector<int> waiting, asking;  // threads, the latter by barrier_try
  char sync[2] = {};                 // ThreadSanitizer's view, by parity

  bool awaited() const { return !waiting.empty() || !asking.empty(); }
};

std::string describe(Mbarrier const& b);
// Fails unless a barrier has been set up there.
Mbarrier& find_barrier(char const* name, uint64_t const* barrier, Site at);
// A copy has come. `who` starts the sentence where that was not expected.
void complete_bytes(Mbarrier& b, std::size_t bytes, std::string const& who);

// ---- Shared memory, seen twice ----------------------------------------------------------------------------
// By threads, and by what reads it asynchronously: ordinary stores reach that view only with a fence.

char const* async_view();
void write_shared(std::size_t offset, void const* from, std::size_t bytes);  // for both

// Fails where ordinary stores to these bytes have not been published. `who` starts the sentence.
void check_published(std::string const& who, std::size_t offset, std::size_t bytes);

// Where a byte of swizzled shared memory lies: 16-byte pieces trade places within `swizzle` bytes (0: none)
// by the number of their 128-byte line. `line_shift` lines are taken off that number first.
inline std::size_t swizzled(std::size_t offset, int swizzle, std::size_t line_shift = 0) {
  std::size_t const pieces = swizzle == 0 ? 0 : static_cast<std::size_t>(swizzle) / 16 - 1;
  return offset ^ (((offset >> 7) - line_shift) & pieces) << 4;
}

// ---- The hooks of block.h, each one's part ----------------------------------------------------------------

void start_copies();
void end_some_loads();  // may be called whenever a thread comes to a barrier
bool advance_copies();  // ends one load that is waited for; false where there is none
void finish_copies();

void start_tensor_cores();
bool advance_tensor_cores();  // finishes what one warpgroup waits for; false where none waits
void finish_tensor_cores();

}  // namespace vdit::emu
