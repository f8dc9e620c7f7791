#include "common/cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace vdit {

void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> scratch;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    scratch.reset();
    scratch.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!scratch) throw std::bad_alloc();
    size = bytes;
  }
  return scratch.get();
}

}  // namespace vdit
