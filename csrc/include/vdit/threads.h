// Threads for callers that have no pool of their own.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "vdit/types.h"

namespace vdit {

// Starts and joins `num_threads` std::threads a call: simple, and cheap beside a kernel of milliseconds. A
// program with a pool should lend that instead.
inline ParallelFor std_parallel_for(int num_threads = static_cast<int>(std::thread::hardware_concurrency())) {
  ParallelFor parallel;
  parallel.num_threads = std::max(1, num_threads);
  parallel.context = reinterpret_cast<void*>(static_cast<intptr_t>(parallel.num_threads));
  parallel.run = [](void* context, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* state) {
    int64_t const threads = static_cast<int64_t>(reinterpret_cast<intptr_t>(context));
    int64_t const chunk = std::max<int64_t>((n + threads - 1) / threads, std::max<int64_t>(1, grain));
    std::vector<std::thread> workers;
    for (int64_t begin = chunk; begin < n; begin += chunk)
      workers.emplace_back(body, state, begin, std::min(n, begin + chunk));
    if (n > 0) body(state, 0, std::min(n, chunk));
    for (std::thread& worker : workers) worker.join();
  };
  return parallel;
}

}  // namespace vdit
