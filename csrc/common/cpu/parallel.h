// Hands work items to the lent threads one at a time, so that uneven items balance themselves.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>

#include "vdit/types.h"

namespace vdit {

// Calls item(i) for every i in [0, n). The lender's pool (torch's at::parallel_for, say) cuts [0, n) into one
// static piece per thread; so each thread gets one piece that pulls from a shared counter instead.
template <class Item>
void for_each_item(ParallelFor const& parallel, int64_t n, Item const& item) {
  if (parallel.run == nullptr || parallel.num_threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) item(i);
    return;
  }
  struct State {
    Item const* item;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // the first one; written by the thread that set `failed`
  } state{&item, n};
  // An item may run out of memory. A lent thread need not survive an exception, so none leaves the body.
  auto const body = [](void* opaque, int64_t begin, int64_t end) {
    State& s = *static_cast<State*>(opaque);
    try {
      for (int64_t piece = begin; piece < end; ++piece) {
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n;) (*s.item)(i);
      }
    } catch (...) {
      s.next = s.n;  // the others stop at their next item
      if (!s.failed.exchange(true)) s.error = std::current_exception();
    }
  };
  int64_t const pieces = n < parallel.num_threads ? n : parallel.num_threads;
  parallel.run(parallel.context, pieces, 1, body, &state);
  if (state.error) std::rethrow_exception(state.error);
}

// The same in slices [begin, end) of at most `slice`, for work that is small per index.
template <class Body>
void for_each_slice(ParallelFor const& parallel, int64_t n, int64_t slice, Body const& body) {
  for_each_item(parallel, (n + slice - 1) / slice, [&](int64_t i) {
    int64_t const begin = i * slice;
    body(begin, begin + slice < n ? begin + slice : n);
  });
}

}  // namespace vdit
