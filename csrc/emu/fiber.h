// A fiber: a stack of its own and the place where it left off. One emulated CUDA thread runs on each.
#pragma once

#include <cstddef>

namespace vdit::emu {

class Fiber {
 public:
  Fiber() = default;  // the caller's own stack: what is left when switching away, and come back to
  ~Fiber();
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;

  // The next switch to this fiber starts `entry` on its own stack. `entry` must never return.
  // `colour` staggers the hot ends of the stacks: on page-aligned stacks they would share few cache lines.
  void start(void (*entry)(), int colour);

  // Continues `to` where it left off; returns when somebody switches back to `from`.
  static void switch_to(Fiber& from, Fiber& to);

  // The same for a fiber that will never be continued; AddressSanitizer may drop what it kept of it.
  [[noreturn]] static void leave_for(Fiber& from, Fiber& to);

  // To be called first thing on a fresh stack: tells AddressSanitizer where it is.
  static void arrived(Fiber& self);

 private:
  void* saved_ = nullptr;      // stack pointer, or a ucontext_t where there is no assembly
  char* mapping_ = nullptr;    // guard page, then the stack; null for the caller's own stack
  void const* low_ = nullptr;  // the usable stack, as AddressSanitizer wants to be told
  std::size_t size_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;  // ThreadSanitizer's
};

// What ThreadSanitizer must know: everything before a release happened before what follows the acquire.
// Without it in the process these do nothing.
void tsan_release(void* sync);
void tsan_acquire(void* sync);

// While one lives, ThreadSanitizer takes no notice of what this thread reads, writes, allocates or frees.
struct Unwatched {
  Unwatched();
  ~Unwatched();
};

bool asan_is_loaded();

}  // namespace vdit::emu
