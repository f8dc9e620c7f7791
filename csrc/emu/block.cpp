// One block at a time: whose turn it is, who waits for whom, and what to say when nobody can go on.
#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

namespace vdit::emu {
namespace {

constexpr size_t kMostShared = 232448;   // what an H100 allows a block, the largest of the GPUs built for
constexpr size_t kSharedAlign = 1024;    // as launch.h promises on the GPU
constexpr size_t kCanary = 256;          // bytes watched past the end, where AddressSanitizer does not watch
constexpr unsigned char kPoison = 0xFF;  // NaN in fp16, bf16 and fp32; -1 as an integer

struct OrderChoice {
  Order order;
  uint64_t seed;
};
bool order_is_set = false;
OrderChoice set_choice;

OrderChoice choose_order() {
  if (order_is_set) return set_choice;
  char const* const text = getenv("VDIT_EMU_ORDER");
  std::string const value = text == nullptr || *text == '\0' ? "forward" : text;
  if (value == "forward") return {Order::kForward, 1};
  if (value == "reverse") return {Order::kReverse, 1};
  if (value == "random") return {Order::kRandom, 1};
  if (value.rfind("random:", 0) == 0) return {Order::kRandom, strtoull(value.c_str() + 7, nullptr, 10)};
  throw std::runtime_error("VDIT_EMU_ORDER must be forward, reverse, random or random:SEED, got '" + value +
                           "'.");
}

// VDIT_EMU_LAUNCHES=1 says which kernels an op has chosen.
bool launches_are_told() {
  static bool const told = [] {
    char const* const text = getenv("VDIT_EMU_LAUNCHES");
    return text != nullptr && std::string(text) == "1";
  }();
  return told;
}

struct Thread {
  Fiber fiber;
  int index = 0;
  bool exited = false;
  char const* waits_at = nullptr;  // the collective, while it waits
  Site where{};
  std::deque<AsyncCopy> copies;  // issued, not yet done, oldest first
  std::deque<int> groups;        // how many of them belong to each committed group
  int uncommitted = 0;

  int warp() const { return index / 32; }
  int lane() const { return index % 32; }
  uint32_t bit() const { return 1u << lane(); }
};

// Where `expected` threads meet. The last to come computes for all and wakes the others.
struct Rendezvous {
  int first = 0;  // of the threads
  int expected = 0;
  bool one_place = false;  // must all have come by the same line? Lanes of a warp, not warps of a block.
  char const* name = nullptr;
  Site where{};
  std::vector<void*> operands;
  std::vector<Thread*> waiting;
  // ThreadSanitizer's view, by parity of the epoch: a thread that ran ahead to the next meeting must not seem
  // to have been here already, or its early writes would look ordered before the others' reads.
  char sync[2] = {};
  unsigned epoch = 0;

  void reset(int from, int count, bool same_place) {
    first = from;
    expected = count;
    one_place = same_place;
    operands.assign(static_cast<size_t>(count), nullptr);
    waiting.clear();
    // Not on a fiber: ThreadSanitizer sees allocations even in code that it does not instrument.
    waiting.reserve(static_cast<size_t>(count));
  }
};

class Block {
 public:
  void run(Launch const& launch);

  Thread& self() { return *current_; }
  Index3 index() const { return index_; }
  Launch const& launch() const { return *launch_; }
  char* shared() const { return smem_.get(); }
  Order order() const { return choice_.order; }

  void meet_warp(char const* name, Site at, void* operand, Compute compute) {
    Thread& me = *current_;
    meet(warp_meetings_[static_cast<size_t>(me.warp())], name, at, operand, compute);
  }
  void meet_warpgroup(char const* name, Site at, void* operand, Compute compute) {
    auto const group = static_cast<size_t>(current_->index / 128);
    if (group >= group_meetings_.size()) {
      throw std::runtime_error(title() + "thread " + std::to_string(current_->index) + " came to " +
                               place(name, at) + ", but a block of " + std::to_string(launch_->threads) +
                               " threads has only " + std::to_string(group_meetings_.size()) +
                               " whole warpgroups.");
    }
    meet(group_meetings_[group], name, at, operand, compute);
  }
  void meet_block(char const* name, Site at, void* operand, Compute compute) {
    meet(block_meeting_, name, at, operand, compute);
  }
  void sleep_at(char const* name, Site at);
  void wake(Thread& thread);
  Thread& thread(int i) { return *threads_[static_cast<size_t>(i)]; }
  uint64_t random();

  std::string title() const {
    return launch_->kernel + ", block (" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " +
           std::to_string(index_.z) + "): ";
  }

 private:
  void prepare();
  void run_block();
  void check_canary() const;
  void meet(Rendezvous& r, char const* name, Site at, void* operand, Compute compute);
  void complete(Rendezvous& r, Compute compute);
  void check_same(Rendezvous const& r, char const* name, Site at) const;
  void switch_to(Thread& next);
  Thread* next_thread();
  Thread& somebody();
  int next_lane(int warp);
  std::string who_waits(int begin, int end) const;
  static void thread_main();

  Launch const* launch_ = nullptr;
  OrderChoice choice_{};
  Index3 index_{};
  int warps_ = 0;
  std::unique_ptr<char, void (*)(void*)> smem_{nullptr, free};

  std::vector<std::unique_ptr<Thread>> threads_;  // kept from launch to launch for their stacks
  std::vector<uint32_t> ready_;                   // by warp: the lanes that could run
  std::vector<Rendezvous> warp_meetings_, group_meetings_;
  Rendezvous block_meeting_;
  Fiber host_;  // whoever called launch
  Thread* current_ = nullptr;
  int exited_ = 0;
  std::exception_ptr error_;
  uint64_t random_state_ = 1;
  char start_sync_ = 0, end_sync_ = 0;
};

thread_local std::unique_ptr<Block> owner;
constinit thread_local Block* block = nullptr;  // the same; read at every instruction, so without a guard

// ---- Turns -----------------------------------------------------------------------------------------------

uint64_t Block::random() {  // xorshift64
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

// A ready lane of `warp`, counted on from the current thread if that is in the same warp.
int Block::next_lane(int warp) {
  uint32_t const ready = ready_[static_cast<size_t>(warp)];
  bool const mine = current_ != nullptr && current_->warp() == warp;
  switch (choice_.order) {
    case Order::kForward: {
      uint32_t const after = mine ? ready & ~(current_->bit() | (current_->bit() - 1)) : ready;
      return __builtin_ctz(after ? after : ready);
    }
    case Order::kReverse: {
      uint32_t const before = mine ? ready & (current_->bit() - 1) : ready;
      return 31 - __builtin_clz(before ? before : ready);
    }
    default: {
      uint32_t left = ready;
      for (auto skip = random() % static_cast<unsigned>(__builtin_popcount(ready)); skip > 0; --skip) {
        left &= left - 1;
      }
      return __builtin_ctz(left);
    }
  }
}

// Who runs next: the same warp as long as it can, as that is fast and lets warps run far apart, which is
// what a missing block barrier needs in order to show. Null when nobody can run.
Thread* Block::next_thread() {
  bool const reverse = choice_.order == Order::kReverse;
  int start = current_ != nullptr ? current_->warp() : reverse ? warps_ - 1 : 0;
  if (choice_.order == Order::kRandom && (ready_[static_cast<size_t>(start)] == 0 || random() % 8 == 0)) {
    start = static_cast<int>(random() % static_cast<unsigned>(warps_));
  }
  int warp = start;
  while (ready_[static_cast<size_t>(warp)] == 0) {
    warp += reverse ? -1 : 1;
    if (warp == warps_) warp = 0;
    if (warp < 0) warp = warps_ - 1;
    if (warp == start) return nullptr;
  }
  return threads_[static_cast<size_t>(warp * 32 + next_lane(warp))].get();
}

// Who runs next, once what is under way beside the threads has let somebody go on.
Thread& Block::somebody() {
  Thread* next = next_thread();
  while (next == nullptr && advance_engines()) next = next_thread();
  if (next == nullptr) {
    throw std::runtime_error(title() + "no thread can go on: " + who_waits(0, launch_->threads) + "." +
                             describe_engines());
  }
  return *next;
}

void Block::sleep_at(char const* name, Site at) {
  Thread& me = *current_;
  me.waits_at = name;
  me.where = at;
  ready_[static_cast<size_t>(me.warp())] &= ~me.bit();
  switch_to(somebody());
}

void Block::wake(Thread& thread) {
  thread.waits_at = nullptr;
  ready_[static_cast<size_t>(thread.warp())] |= thread.bit();
}

void Block::switch_to(Thread& next) {
  Thread& me = *current_;
  if (&next == &me) return;
  current_ = &next;
  Fiber::switch_to(me.fiber, next.fiber);
}

// ---- Meetings --------------------------------------------------------------------------------------------

void Block::meet(Rendezvous& r, char const* name, Site at, void* operand, Compute compute) {
  Thread& me = *current_;
  if (r.waiting.empty()) {
    r.name = name;
    r.where = at;
  } else {
    check_same(r, name, at);
  }
  r.operands[static_cast<size_t>(me.index - r.first)] = operand;
  void* const sync = &r.sync[r.epoch % 2];
  tsan_release(sync);
  if (static_cast<int>(r.waiting.size()) + 1 == r.expected) {
    tsan_acquire(sync);
    complete(r, compute);
    tsan_release(sync);
    // In random order the last to come does not always go on first.
    if (choice_.order == Order::kRandom && random() % 8 == 0) switch_to(*next_thread());
  } else {
    r.waiting.push_back(&me);
    sleep_at(name, at);
  }
  tsan_acquire(sync);
}

void Block::complete(Rendezvous& r, Compute compute) {
  if (compute != nullptr) compute(r.operands.data(), r.expected);
  for (Thread* thread : r.waiting) wake(*thread);
  r.waiting.clear();
  ++r.epoch;
}

void Block::check_same(Rendezvous const& r, char const* name, Site at) const {
  auto const equal = [](char const* a, char const* b) { return a == b || strcmp(a, b) == 0; };
  bool const same_place = r.where.line == at.line && equal(r.where.file, at.file);
  if (equal(r.name, name) && (same_place || !r.one_place)) return;
  throw std::runtime_error(title() + "thread " + std::to_string(current_->index) + " came to " +
                           place(name, at) + " while " + who_waits(r.first, r.first + r.expected) + ".");
}

// "threads 0-63 wait at sync_block (gemm.cuh:41); thread 64 exited", for those that wait or exited.
std::string Block::who_waits(int begin, int end) const {
  auto const state = [this](int i) -> std::string {
    Thread const& thread = *threads_[static_cast<size_t>(i)];
    if (thread.exited) return "exited";
    return thread.waits_at == nullptr ? "" : " at " + place(thread.waits_at, thread.where);
  };
  std::vector<std::pair<std::string, std::string>> groups;  // state, its threads
  for (int i = begin; i < end;) {
    std::string const what = state(i);
    int last = i;
    while (last + 1 < end && state(last + 1) == what) ++last;
    std::string const range = std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
    i = last + 1;
    if (what.empty()) continue;
    auto group = groups.begin();
    while (group != groups.end() && group->first != what) ++group;
    if (group == groups.end()) {
      groups.emplace_back(what, range);
    } else {
      group->second += ", " + range;
    }
  }
  std::string text;
  for (auto const& [what, threads] : groups) {
    bool const one = threads.find_first_of("-,") == std::string::npos;
    text += (text.empty() ? "" : "; ") + std::string(one ? "thread " : "threads ") + threads;
    text += what == "exited" ? " exited" : (one ? " waits" : " wait") + what;
  }
  return text;
}

// ---- Blocks and grids ------------------------------------------------------------------------------------

void Block::thread_main() {
  Block& b = *block;
  Thread& me = *b.current_;
  Fiber::arrived(me.fiber);
  tsan_acquire(&b.start_sync_);
  try {
    b.launch_->body(b.launch_->params, b.smem_.get());
  } catch (...) {
    b.error_ = std::current_exception();
  }
  tsan_release(&b.end_sync_);
  me.exited = true;
  ++b.exited_;
  b.ready_[static_cast<size_t>(me.warp())] &= ~me.bit();
  Thread* next = nullptr;
  if (!b.error_ && b.exited_ < b.launch_->threads) {
    try {
      next = &b.somebody();
    } catch (...) {
      b.error_ = std::current_exception();
    }
  }
  b.current_ = next;
  Fiber::leave_for(me.fiber, next != nullptr ? next->fiber : b.host_);
}

void Block::prepare() {
  auto const threads = static_cast<size_t>(launch_->threads);
  while (threads_.size() < threads) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->index = static_cast<int>(threads_.size()) - 1;
  }
  warps_ = launch_->threads / 32;
  ready_.resize(static_cast<size_t>(warps_));
  warp_meetings_.resize(static_cast<size_t>(warps_));
  group_meetings_.resize(static_cast<size_t>(warps_ / 4));
  // AddressSanitizer watches the end of an allocation of just the right size; without it a canary does.
  size_t const bytes = launch_->smem_bytes + (asan_is_loaded() ? 0 : kCanary);
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlign, bytes) != 0) throw std::bad_alloc();
  smem_.reset(static_cast<char*>(memory));
}

void Block::run_block() {
  size_t const bytes = launch_->smem_bytes + (asan_is_loaded() ? 0 : kCanary);
  memset(smem_.get(), kPoison, bytes);
  for (int i = 0; i < warps_; ++i) warp_meetings_[static_cast<size_t>(i)].reset(i * 32, 32, true);
  for (int i = 0; i < warps_ / 4; ++i) group_meetings_[static_cast<size_t>(i)].reset(i * 128, 128, true);
  block_meeting_.reset(0, launch_->threads, false);
  for (auto& lanes : ready_) lanes = 0xffffffffu;
  for (int i = 0; i < launch_->threads; ++i) {
    Thread& thread = *threads_[static_cast<size_t>(i)];
    thread.exited = false;
    thread.waits_at = nullptr;
    thread.copies.clear();
    thread.groups.clear();
    thread.uncommitted = 0;
    thread.fiber.start(thread_main, i);
  }
  exited_ = 0;
  start_engines();
  tsan_release(&start_sync_);
  current_ = nullptr;
  current_ = next_thread();
  Fiber::switch_to(host_, current_->fiber);
  tsan_acquire(&end_sync_);
  current_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  finish_engines();
  if (!asan_is_loaded()) check_canary();
}

void Block::check_canary() const {
  char const* const end = smem_.get() + launch_->smem_bytes;
  for (size_t i = 0; i < kCanary; ++i) {
    if (static_cast<unsigned char>(end[i]) != kPoison) {
      throw std::runtime_error(title() + "a thread wrote to byte " + std::to_string(launch_->smem_bytes + i) +
                               " of " + std::to_string(launch_->smem_bytes) +
                               " bytes of shared memory; a build with -fsanitize=address names the line.");
    }
  }
}

void Block::run(Launch const& launch) {
  if (launch.smem_bytes > kMostShared) {
    throw std::runtime_error(launch.kernel + ": a block needs " + std::to_string(launch.smem_bytes) +
                             " bytes of shared memory, but no GPU it is built for allows more than " +
                             std::to_string(kMostShared) + ".");
  }
  launch_ = &launch;
  choice_ = choose_order();
  prepare();
  uint64_t const blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  // A stride without a common divisor visits every block once: a shuffle that needs no list.
  uint64_t const hash = (choice_.seed + 1) * 0x9E3779B97F4A7C15u;
  uint64_t const first = (hash >> 32) % blocks;
  uint64_t stride = hash % blocks + 1;
  while (std::gcd(stride, blocks) != 1) ++stride;
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t at = i;
    if (choice_.order == Order::kReverse) at = blocks - 1 - i;
    if (choice_.order == Order::kRandom) {
      at = static_cast<uint64_t>((static_cast<unsigned __int128>(i) * stride + first) % blocks);
      random_state_ = (hash ^ at * 0xD1B54A32D192ED03u) | 1;
    }
    index_ = {static_cast<unsigned>(at % launch.grid.x),
              static_cast<unsigned>(at / launch.grid.x % launch.grid.y),
              static_cast<unsigned>(at / launch.grid.x / launch.grid.y)};
    run_block();
  }
}

}  // namespace

void run_grid(Launch const& launch) {
  if (launches_are_told()) fprintf(stderr, "%s\n", launch.kernel.c_str());
  if (owner == nullptr) owner = std::make_unique<Block>();
  block = owner.get();
  try {
    block->run(launch);
  } catch (...) {
    owner.reset();  // fibers that stopped halfway are not to be used again
    throw;
  }
}

void set_order(Order order, uint64_t seed) {
  set_choice = {order, seed};
  order_is_set = true;
}

int thread_index() { return block->self().index; }
Index3 block_index() { return block->index(); }
Index3 grid_dim() { return block->launch().grid; }

std::string place(char const* name, Site at) {
  char const* const slash = strrchr(at.file, '/');
  return std::string(name) + " (" + (slash ? slash + 1 : at.file) + ":" + std::to_string(at.line) + ")";
}

void fail_block(std::string const& what) { throw std::runtime_error(block->title() + what + "."); }

void fail(char const* name, Site at, std::string const& what) {
  throw std::runtime_error(block->title() + "thread " + std::to_string(thread_index()) + " gave " +
                           place(name, at) + " " + what + ".");
}

void trap(char const* why) {
  throw std::runtime_error(block->title() + "thread " + std::to_string(thread_index()) + " trapped: " + why +
                           ".");
}

void meet_warp(char const* name, Site at, void* operand, Compute compute) {
  block->meet_warp(name, at, operand, compute);
}

void meet_block(char const* name, Site at, void* operand, Compute compute) {
  block->meet_block(name, at, operand, compute);
}

void meet_warpgroup(char const* name, Site at, void* operand, Compute compute) {
  block->meet_warpgroup(name, at, operand, compute);
}

void sleep_at(char const* name, Site at) { block->sleep_at(name, at); }
void wake(int thread) { block->wake(block->thread(thread)); }

Launch const& current_launch() { return block->launch(); }
char* shared_memory() { return block->shared(); }
Order current_order() { return block->order(); }
uint64_t random_below(uint64_t n) { return block->random() % n; }

std::string range_text(size_t first, size_t bytes) {
  return "bytes " + std::to_string(static_cast<int64_t>(first)) + " to " +
         std::to_string(static_cast<int64_t>(first + bytes) - 1) + " of " +
         std::to_string(block->launch().smem_bytes) + " bytes of shared memory";
}

size_t check_shared(char const* name, Site at, void const* p, size_t bytes, size_t align) {
  // Whole numbers, because comparing pointers into different objects is undefined.
  auto const offset =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(block->shared()));
  auto const size = static_cast<int64_t>(block->launch().smem_bytes);
  // As far off as no index of a block reaches; what is nearer is told as the bytes that were meant.
  if (std::abs(offset) > static_cast<int64_t>(kMostShared)) {
    fail(name, at, "an address that is not in shared memory");
  }
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > size) {
    fail(name, at, range_text(static_cast<size_t>(offset), bytes));
  }
  if (align == 0) align = bytes;
  if (static_cast<size_t>(offset) % align != 0) {
    fail(name, at,
         "byte " + std::to_string(offset) + " of shared memory, which is not a multiple of " +
             std::to_string(align));
  }
  return static_cast<size_t>(offset);
}

void push_copy(AsyncCopy copy) {
  block->self().copies.push_back(copy);
  ++block->self().uncommitted;
}

void commit_copies() {
  Thread& me = block->self();
  me.groups.push_back(me.uncommitted);
  me.uncommitted = 0;
}

bool pop_copy(int groups_left, AsyncCopy* copy) {
  Thread& me = block->self();
  while (static_cast<int>(me.groups.size()) > groups_left) {
    if (me.groups.front() > 0) {
      --me.groups.front();
      *copy = me.copies.front();
      me.copies.pop_front();
      return true;
    }
    me.groups.pop_front();
  }
  return false;
}

}  // namespace vdit::emu
