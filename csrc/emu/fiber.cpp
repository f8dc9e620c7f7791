// NOTE: compile this file and block.cpp without sanitizer flags even when the kernel has them: a switch must
// not be instrumented. The sanitizers' fiber functions are weak here, so one object serves every kernel
// build.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if !defined(__x86_64__) && !defined(VDIT_EMU_UCONTEXT)
#define VDIT_EMU_UCONTEXT
#endif
#if defined(VDIT_EMU_UCONTEXT)
#include <ucontext.h>
#endif

extern "C" {
#define VDIT_WEAK __attribute__((weak))
VDIT_WEAK void __sanitizer_start_switch_fiber(void** fake_stack_save, void const* bottom, size_t size);
VDIT_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack_save, void const** bottom_old,
                                               size_t* size_old);
VDIT_WEAK void __asan_unpoison_memory_region(void const volatile* p, size_t size);
VDIT_WEAK void* __tsan_get_current_fiber(void);
VDIT_WEAK void* __tsan_create_fiber(unsigned flags);
VDIT_WEAK void __tsan_destroy_fiber(void* fiber);
VDIT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
VDIT_WEAK void __tsan_acquire(void* addr);
VDIT_WEAK void __tsan_release(void* addr);
VDIT_WEAK void __tsan_ignore_thread_begin(void);
VDIT_WEAK void __tsan_ignore_thread_end(void);
}

#if !defined(VDIT_EMU_UCONTEXT)
// Pushes what the System V ABI asks a callee to keep, swaps the stack pointers, pops. Floating-point control
// words are left alone: no kernel changes them.
extern "C" void vdit_emu_switch(void** save, void* load);
asm(R"(
.text
.type vdit_emu_switch, @function
.globl vdit_emu_switch
.hidden vdit_emu_switch
vdit_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vdit_emu_switch, . - vdit_emu_switch
)");
#endif

namespace vdit::emu {
namespace {

// Virtual memory, touched only where used. Wide, because kernels at -O0 under AddressSanitizer have big
// frames.
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kTsanNoSync = 1;  // a switch orders nothing; barriers say what they order

// AddressSanitizer tells a fiber, on arrival, the stack that was left: how the caller's own gets known.
thread_local Fiber* left_behind = nullptr;

}  // namespace

Fiber::~Fiber() {
#if defined(VDIT_EMU_UCONTEXT)
  delete static_cast<ucontext_t*>(saved_);
#endif
  if (mapping_ == nullptr) return;
  if (tsan_fiber_ != nullptr) __tsan_destroy_fiber(tsan_fiber_);
  munmap(mapping_, kStackBytes + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

void Fiber::start(void (*entry)(), int colour) {
  if (mapping_ == nullptr) {
    auto const guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::runtime_error(std::string("The emulator could not map a fiber's stack: ") + strerror(errno) +
                               ".");
    }
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, guard, PROT_NONE);  // an overflow faults instead of writing into a neighbour
    low_ = mapping_ + guard;
    size_ = kStackBytes;
    if (__tsan_create_fiber) tsan_fiber_ = __tsan_create_fiber(0);
  }
  // A kernel that threw left its frames' red zones behind.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(low_, size_);
  fake_stack_ = nullptr;
  size_t const usable = size_ - static_cast<size_t>(colour % 8) * 576;
#if defined(VDIT_EMU_UCONTEXT)
  if (saved_ == nullptr) saved_ = new ucontext_t;
  auto* const context = static_cast<ucontext_t*>(saved_);
  getcontext(context);
  context->uc_stack.ss_sp = const_cast<void*>(low_);
  context->uc_stack.ss_size = usable;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#else
  auto* top = reinterpret_cast<void**>(const_cast<char*>(static_cast<char const*>(low_)) + usable);
  *--top = nullptr;                              // where a return address would be: backtraces end here
  *--top = reinterpret_cast<void*>(entry);       // what the switch's ret jumps to
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that it pops
  saved_ = top;
#endif
}

namespace {
// Kept out of line, so that nothing about thread-local variables is cached across it.
[[gnu::noinline]] void change_stacks([[maybe_unused]] void** save, void* load) {
#if defined(VDIT_EMU_UCONTEXT)
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
#else
  vdit_emu_switch(save, load);
#endif
}
}  // namespace

void Fiber::switch_to(Fiber& from, Fiber& to) {
#if defined(VDIT_EMU_UCONTEXT)
  if (from.saved_ == nullptr) from.saved_ = new ucontext_t;
#endif
  left_behind = &from;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake_stack_, to.low_, to.size_);
  if (__tsan_switch_to_fiber) {
    if (from.mapping_ == nullptr) from.tsan_fiber_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_fiber_, kTsanNoSync);
  }
  change_stacks(&from.saved_, to.saved_);
  arrived(from);
}

void Fiber::leave_for(Fiber& from, Fiber& to) {
  left_behind = &from;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(nullptr, to.low_, to.size_);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber_, kTsanNoSync);
  change_stacks(&from.saved_, to.saved_);
  abort();  // somebody continued a fiber that had ended: the emulator's own mistake
}

void Fiber::arrived(Fiber& self) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self.fake_stack_, &left_behind->low_, &left_behind->size_);
  }
}

void tsan_release(void* sync) {
  if (__tsan_release) __tsan_release(sync);
}

void tsan_acquire(void* sync) {
  if (__tsan_acquire) __tsan_acquire(sync);
}

Unwatched::Unwatched() {
  if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin();
}

Unwatched::~Unwatched() {
  if (__tsan_ignore_thread_end) __tsan_ignore_thread_end();
}

bool asan_is_loaded() { return __asan_unpoison_memory_region != nullptr; }

}  // namespace vdit::emu
