// Memory that a thread keeps between calls: fresh memory would cost its page faults every call.
#pragma once
#include <cstddef>

namespace vdit {

// At least `bytes` bytes at a multiple of 64, of this thread alone, valid until the thread's next call.
// Contents are left over from whatever ran before. Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

}  // namespace vdit
