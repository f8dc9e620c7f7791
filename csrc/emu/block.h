// The emulator's core as kernels see it: run a grid, ask who one is, meet the other threads, fail with a
// name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace vdit::emu {

// The line that called. As a default argument it is the caller's, which lets an error point into the kernel.
struct Site {
  char const* file;
  int line;

  static constexpr Site here(char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Index3 {
  unsigned x, y, z;
};

struct Launch {
  std::string kernel;  // for errors
  Index3 grid;
  int threads;  // a block, a multiple of 32
  std::size_t smem_bytes;
  void const* params;
  void (*body)(void const* params, char* smem);  // one thread's work
  int blocks_a_processor = 1;                    // that are to fit: bounds the registers of a thread
};

// Runs the blocks one after another, each thread on a fiber. What a thread throws comes out here, as does
// std::runtime_error where threads wait for ones that will never come. Launches from several host threads may
// run side by side.
void run_grid(Launch const& launch);

// In which order threads, warps and blocks get their turn. A correct kernel gives the same result in every
// order; a missing barrier shows in at least one. VDIT_EMU_ORDER = forward | reverse | random | random:SEED
// says it where set_order has not; forward is the default.
enum class Order { kForward, kReverse, kRandom };
void set_order(Order order, uint64_t seed = 1);

// ---- For the device functions (collectives.h): all of these are called on a fiber ------------------------

int thread_index();
Index3 block_index();
Index3 grid_dim();

// Ends the launch: "KERNEL, block (0, 0, 0): thread 5 gave NAME (FILE:LINE) WHAT."
[[noreturn]] void fail(char const* name, Site at, std::string const& what);
[[noreturn]] void trap(char const* why);

// A rendezvous: waits for every thread of the warp (or block), hands over `operand`, and returns after
// `compute` (may be null) has run once over all operands, which lie in lane (thread) order. Operands stay on
// their owners' stacks, so compute writes results straight into them.
using Compute = void (*)(void* const* operands, int count);
void meet_warp(char const* name, Site at, void* operand, Compute compute);
void meet_block(char const* name, Site at, void* operand, Compute compute);
void meet_warpgroup(char const* name, Site at, void* operand, Compute compute);  // 128 aligned threads

// The offset of `p`. Fails unless [p, p + bytes) lies in the block's shared memory, p a multiple of `align`
// (of `bytes` where that is 0).
std::size_t check_shared(char const* name, Site at, void const* p, std::size_t bytes, std::size_t align = 0);

// cp.async: a copy is kept until a wait of the same thread makes it due. Source null means zeros.
struct AsyncCopy {
  void* destination;
  void const* source;
};
void push_copy(AsyncCopy copy);
void commit_copies();
// The next copy that is due when at most `groups_left` groups may stay unfinished; false when none is.
bool pop_copy(int groups_left, AsyncCopy* copy);

// ---- For what works beside the threads (hopper.cpp, wgmma.cpp) -------------------------------------------

// A thread that waits for something else than a meeting: until somebody wakes it.
void sleep_at(char const* name, Site at);
void wake(int thread);

Launch const& current_launch();
char* shared_memory();
Order current_order();
uint64_t random_below(uint64_t n);  // follows the seed of Order::kRandom

std::string place(char const* name, Site at);  // "NAME (FILE:LINE)"
std::string range_text(std::size_t first,
                       std::size_t bytes);  // "bytes 0 to 15 of 512 bytes of shared memory"
// Ends the launch: "KERNEL, block (0, 0, 0): WHAT."
[[noreturn]] void fail_block(std::string const& what);

// Called by the core: when a block starts; when no thread can go on, to finish one thing that is under way
// (false: there is none); for the sentence about a dead-lock; and when all threads have exited.
void start_engines();
bool advance_engines();
std::string describe_engines();
void finish_engines();

}  // namespace vdit::emu
