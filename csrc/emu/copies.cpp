// The copy engine of one block: TMA, bulk copies, and shared memory as asynchronous readers see it.
//
// Copies are under way from their call until the last moment: a load ends when no thread can go on and one
// waits for its barrier, a store when its thread waits for it. Meanwhile a load's destination is poison.
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "engines.h"
#include "fiber.h"
#include "hopper.h"

namespace vdit::emu {
namespace {

// A box of a tensor, or plain bytes (rank 0), beside where it lies in shared memory.
struct Box {
  TensorMap map;
  int corner[5];
  size_t offset, bytes;
};

struct Load {
  char const* name;
  Site where;
  int thread;
  Mbarrier* barrier;
  Box box;
};

struct Store {
  Site where;
  Box box;
  std::vector<char> bytes;  // as they were at the call
};

struct StoreGroup {
  std::vector<Store> stores;
  bool read = false;  // has shared memory been read?
};

struct Copies {
  std::vector<char> view;  // shared memory as the copy engine and the tensor cores see it
  std::vector<Load> loads;
  std::map<int, std::vector<Store>> open;        // by thread: stores not yet committed
  std::map<int, std::deque<StoreGroup>> groups;  // by thread
};

thread_local std::unique_ptr<Copies> copies;

Copies& state() {
  if (copies == nullptr) {
    Unwatched unwatched;
    copies = std::make_unique<Copies>();
    copies->view.assign(current_launch().smem_bytes, '\xff');
  }
  return *copies;
}

// ---- Boxes ------------------------------------------------------------------------------------------------

// Calls row(offset in shared memory before the swizzle, its bytes, where in the tensor they start or null,
// first and last + 1 of the bytes that lie inside of the tensor).
template <class Row>
void for_rows(Box const& box, Row const& row) {
  TensorMap const& map = box.map;
  if (map.rank == 0) return row(box.offset, box.bytes, map.base, size_t{0}, box.bytes);
  auto const element = static_cast<size_t>(map.element_bytes);
  size_t const width = map.box[0] * element;
  int64_t const first = std::max<int64_t>(0, -int64_t{box.corner[0]});
  int64_t const last = std::clamp<int64_t>(static_cast<int64_t>(map.sizes[0]) - box.corner[0], 0, map.box[0]);
  for (size_t r = 0; r < box.bytes / width; ++r) {
    char* start = map.base + int64_t{box.corner[0]} * map.element_bytes;
    bool inside = first < last;
    size_t rest = r;
    for (int i = 1; i < map.rank; ++i) {
      int64_t const at = box.corner[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[i]);
      start += at * static_cast<int64_t>(map.strides[i]);
    }
    row(box.offset + r * width, width, inside ? start : nullptr, static_cast<size_t>(first) * element,
        static_cast<size_t>(last) * element);
  }
}

void poison(size_t offset, size_t bytes) {
  memset(shared_memory() + offset, 0xFF, bytes);
  memset(state().view.data() + offset, 0xFF, bytes);
}

// ---- Loads ------------------------------------------------------------------------------------------------

void end_load(size_t which) {
  Load const load = state().loads[which];
  {
    Unwatched unwatched;
    state().loads.erase(state().loads.begin() + static_cast<std::ptrdiff_t>(which));
    for_rows(load.box, [&](size_t at, size_t bytes, char const* from, size_t first, size_t last) {
      std::vector<char> row(bytes, '\0');
      if (from != nullptr) memcpy(row.data() + first, from + first, last - first);
      for (size_t i = 0; i < bytes; i += 16) {
        write_shared(swizzled(at + i, load.box.map.swizzle), &row[i], 16);
      }
    });
  }
  complete_bytes(*load.barrier, load.box.bytes,
                 place(load.name, load.where) + " of thread " + std::to_string(load.thread));
}

// Do two loads bring the same bytes to all that they both write? Then it does not matter which comes last.
bool agree(Box const& a, Box const& b) {
  std::map<size_t, char const*> rows;
  for_rows(a, [&](size_t at, size_t, char const* from, size_t, size_t) { rows[at] = from; });
  bool same = a.map.rank != 0 && b.map.rank != 0 && a.map.box[0] == b.map.box[0];
  for_rows(b, [&](size_t at, size_t bytes, char const* from, size_t, size_t) {
    if (at + bytes <= a.offset || at >= a.offset + a.bytes) return;
    auto const row = rows.find(at);
    same = same && row != rows.end() && row->second == from;
  });
  return same;
}

void start_load(char const* name, Site at, Box const& box, uint64_t const* barrier) {
  end_some_loads();
  Mbarrier& b = find_barrier(name, barrier, at);
  if (!b.fenced) {
    fail(name, at, describe(b) + " without a fence_barrier_init by the thread that set it up");
  }
  Unwatched unwatched;
  check_published(place(name, at) + " writes", box.offset, box.bytes);
  for (Load const& other : state().loads) {
    bool const apart =
        box.offset >= other.box.offset + other.box.bytes || other.box.offset >= box.offset + box.bytes;
    if (!apart && !agree(other.box, box)) {
      fail(name, at,
           range_text(box.offset, box.bytes) + ", which " + place(other.name, other.where) + " of thread " +
               std::to_string(other.thread) + " is still writing");
    }
  }
  poison(box.offset, box.bytes);
  state().loads.push_back({name, at, thread_index(), &b, box});
  tsan_release(&b.sync[b.phase % 2]);
}

Box make_box(char const* name, TensorMap const& map, void const* smem, int rank, int const* corner, Site at) {
  if (map.rank < 2 || map.rank > 5) fail(name, at, "a TensorMap that make_tensor_map has not made");
  if (map.rank != rank) {
    fail(name, at, std::to_string(rank) + " coordinates for a map of rank " + std::to_string(map.rank));
  }
  char const here = 0;  // NOTE: a copy of Params on a thread's stack is a map that the GPU cannot read
  if (std::abs(reinterpret_cast<char const*>(&map) - &here) < 1 << 18) {
    fail(name, at, "a TensorMap on the thread's own stack, where it must lie in Params or in global memory");
  }
  Box box = {map, {}, 0, static_cast<size_t>(map.element_bytes)};
  for (int i = 0; i < rank; ++i) {
    box.corner[i] = corner[i];
    box.bytes *= map.box[i];
  }
  box.offset = check_shared(name, at, smem, box.bytes, 128);
  return box;
}

// ---- Stores -----------------------------------------------------------------------------------------------

void finish_reading(StoreGroup& group) {
  if (group.read) return;
  group.read = true;
  for (Store const& store : group.stores) {
    if (memcmp(shared_memory() + store.box.offset, store.bytes.data(), store.box.bytes) != 0) {
      fail_block(place("tma_store", store.where) + " has not been waited for, but its source, " +
                 range_text(store.box.offset, store.box.bytes) + ", was written over");
    }
  }
}

void finish_writing(StoreGroup const& group) {
  for (Store const& store : group.stores) {
    for_rows(store.box, [&](size_t at, size_t bytes, char* to, size_t first, size_t last) {
      std::vector<char> row(bytes);
      for (size_t i = 0; i < bytes; i += 16) {
        memcpy(&row[i], &store.bytes[swizzled(at + i, store.box.map.swizzle) - store.box.offset], 16);
      }
      if (to != nullptr) memcpy(to + first, row.data() + first, last - first);
    });
  }
}

}  // namespace

// ---- Shared memory, seen twice ----------------------------------------------------------------------------

char const* async_view() { return state().view.data(); }

void write_shared(size_t offset, void const* from, size_t bytes) {
  memcpy(shared_memory() + offset, from, bytes);
  memcpy(state().view.data() + offset, from, bytes);
}

void check_published(std::string const& who, size_t offset, size_t bytes) {
  if (memcmp(async_view() + offset, shared_memory() + offset, bytes) == 0) return;
  fail_block(who + " " + range_text(offset, bytes) +
             ", where ordinary stores have been followed by no fence_async_proxy");
}

void fence_async_proxy() {
  Unwatched unwatched;
  memcpy(state().view.data(), shared_memory(), current_launch().smem_bytes);
}

// ---- The copy engine --------------------------------------------------------------------------------------

void tma_load(void* smem, TensorMap const& map, uint64_t* barrier, int rank, int const* corner, Site at) {
  start_load("tma_load", at, make_box("tma_load", map, smem, rank, corner, at), barrier);
}

void bulk_load(void* smem, void const* gmem, int bytes, uint64_t* barrier, Site at) {
  if (bytes < 16 || bytes % 16 != 0) {
    fail("bulk_load", at, std::to_string(bytes) + " bytes, where a multiple of 16 is possible");
  }
  if (reinterpret_cast<uintptr_t>(gmem) % 16 != 0) {
    fail("bulk_load", at, "a global address that is not a multiple of 16");
  }
  Box box = {};
  box.map.base = static_cast<char*>(const_cast<void*>(gmem));
  box.bytes = static_cast<size_t>(bytes);
  box.offset = check_shared("bulk_load", at, smem, box.bytes, 16);
  start_load("bulk_load", at, box, barrier);
}

void tma_store(TensorMap const& map, void const* smem, int rank, int const* corner, Site at) {
  Box const box = make_box("tma_store", map, smem, rank, corner, at);
  Unwatched unwatched;
  check_published(place("tma_store", at) + " reads", box.offset, box.bytes);
  char const* const from = async_view() + box.offset;
  state().open[thread_index()].push_back({at, box, {from, from + box.bytes}});
}

void bulk_store_commit() {
  Unwatched unwatched;
  state().groups[thread_index()].push_back({std::move(state().open[thread_index()])});
  state().open.erase(thread_index());
}

void bulk_store_wait(int groups_left, bool only_read) {
  Unwatched unwatched;
  auto& groups = state().groups[thread_index()];
  int const due = static_cast<int>(groups.size()) - groups_left;
  for (int i = 0; i < due; ++i) finish_reading(groups[static_cast<size_t>(i)]);
  for (int i = 0; i < due && !only_read; ++i) {
    finish_writing(groups.front());
    groups.pop_front();
  }
}

// ---- For the core -----------------------------------------------------------------------------------------

// In random order some loads end before they must, as they do on the GPU.
void end_some_loads() {
  if (copies == nullptr || copies->loads.empty()) return;
  if (current_order() != Order::kRandom || random_below(4) != 0) return;
  size_t const which = random_below(copies->loads.size());
  Load const& load = copies->loads[which];
  if (load.barrier->bytes >= static_cast<int64_t>(load.box.bytes)) end_load(which);
}

void start_copies() { copies.reset(); }

bool advance_copies() {
  if (copies == nullptr) return false;
  std::vector<size_t> due;
  for (size_t i = 0; i < copies->loads.size(); ++i) {
    if (copies->loads[i].barrier->awaited()) due.push_back(i);
  }
  if (due.empty()) return false;
  end_load(current_order() == Order::kForward   ? due.front()
           : current_order() == Order::kReverse ? due.back()
                                                : due[random_below(due.size())]);
  return true;
}

void finish_copies() {
  if (copies == nullptr) return;
  for (Load const& load : copies->loads) {
    fail_block("the block has ended before " + place(load.name, load.where) + " of thread " +
               std::to_string(load.thread) + ", whose barrier nobody has waited for");
  }
  for (auto const& [thread, stores] : copies->open) {
    if (stores.empty()) continue;
    fail_block("the block has ended before a bulk_store_commit of thread " + std::to_string(thread) +
               " for its " + place("tma_store", stores[0].where));
  }
  for (auto const& [thread, groups] : copies->groups) {
    for (StoreGroup const& group : groups) {
      if (!group.read && !group.stores.empty()) {
        fail_block("the block has ended before thread " + std::to_string(thread) + " waited until its " +
                   place("tma_store", group.stores[0].where) + " had read shared memory");
      }
      finish_writing(group);
    }
  }
}

}  // namespace vdit::emu
