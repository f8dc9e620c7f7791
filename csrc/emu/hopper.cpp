// mbarriers, named barriers and registers of one block, and what the core asks of all that works beside the
// threads: this, the copy engine (copies.cpp) and the tensor cores (wgmma.cpp).
#include "hopper.h"

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "engines.h"
#include "fiber.h"

namespace vdit::emu {
namespace {

constexpr uint64_t kMark = 0x4d42415252494552;  // what an mbarrier's 8 bytes hold here
constexpr int kMostBytes = (1 << 20) - 1;       // that a phase may expect
constexpr int kRegisters = 65536;               // of a processor
constexpr int kMostIdle = 1000;                 // times that everybody may ask in vain

struct NamedBarrier {
  int threads = 0, arrived = 0;
  unsigned epoch = 0;
  std::vector<int> waiting;
  char const* name = nullptr;  // who came first
  Site where{};
  char sync[2] = {};
};

struct Warpgroup {
  int now, wanted;  // registers a thread
  bool explicit_now = false;
};

struct Barriers {
  std::map<size_t, Mbarrier> mbarriers;  // by offset
  NamedBarrier named[16];
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;
  std::vector<int> waiting_for_registers;
  int idle = 0;  // rounds without anything happening
};

thread_local std::unique_ptr<Barriers> barriers;

Barriers& state() {
  if (barriers == nullptr) {
    Unwatched unwatched;
    barriers = std::make_unique<Barriers>();
  }
  return *barriers;
}

void wake_all(std::vector<int>& threads) {
  for (int thread : threads) wake(thread);
  threads.clear();
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  if (!b.seen) {
    fail_block(describe(b) + " has ended phase " + std::to_string(b.phase) +
               " before any thread has seen the end of phase " + std::to_string(b.phase - 1) +
               ": more arrivals came than the " + std::to_string(b.arrivals) + " of a phase");
  }
  b.seen = false;
  b.pending = b.arrivals;
  ++b.phase;
  wake_all(b.waiting);
  wake_all(b.asking);
}

// Tells all that only ask that their phase is not over; not for ever, where nothing else happens.
bool answer_askers() {
  bool any = false;
  if (state().idle++ > kMostIdle) return false;
  for (auto& [offset, b] : state().mbarriers) {
    any = any || !b.asking.empty();
    wake_all(b.asking);
  }
  return any;
}

// ---- Registers --------------------------------------------------------------------------------------------

// NOTE: as if the kernel started with all that its launch bounds allow, which the emulator cannot know
// better.
void share_out_registers() {
  Launch const& launch = current_launch();
  int const share = kRegisters / (launch.threads * launch.blocks_a_processor) / 8 * 8;
  int const each = std::min(share, 248);
  state().warpgroups.assign(static_cast<size_t>(launch.threads / 128), {each, each});
}

// Gives `asking` what it wants if there is as much, then those that wait what has become free.
void grant_registers(Warpgroup& asking) {
  auto const grant = [](Warpgroup& group) {
    int const more = (group.wanted - group.now) * 128;
    if (more > state().free_registers) return;
    state().free_registers -= more;
    group.now = group.wanted;
  };
  grant(asking);
  for (Warpgroup& group : state().warpgroups) grant(group);
  wake_all(state().waiting_for_registers);
}

}  // namespace

// ---- mbarriers --------------------------------------------------------------------------------------------

std::string describe(Mbarrier const& b) {
  return "the mbarrier at byte " + std::to_string(b.offset) + " of " + place("barrier_init", b.where);
}

Mbarrier& find_barrier(char const* name, uint64_t const* barrier, Site at) {
  size_t const offset = check_shared(name, at, barrier, sizeof(*barrier));
  auto const found = state().mbarriers.find(offset);
  if (found == state().mbarriers.end()) {
    fail(name, at, "an mbarrier at byte " + std::to_string(offset) + " that no barrier_init has set up");
  }
  uint64_t now;
  memcpy(&now, shared_memory() + offset, sizeof(now));
  if (now != kMark) fail(name, at, describe(found->second) + ", which something else has written over");
  return found->second;
}

void complete_bytes(Mbarrier& b, size_t bytes, std::string const& who) {
  tsan_release(&b.sync[b.phase % 2]);
  if (b.bytes < static_cast<int64_t>(bytes)) {
    fail_block(who + " brings " + std::to_string(bytes) + " bytes to " + describe(b) + ", which expects " +
               std::to_string(b.bytes) + " in phase " + std::to_string(b.phase));
  }
  b.bytes -= static_cast<int64_t>(bytes);
  state().idle = 0;
  end_phase_if_complete(b);
}

void barrier_init(uint64_t* barrier, int arrivals, Site at) {
  size_t const offset = check_shared("barrier_init", at, barrier, sizeof(*barrier));
  if (arrivals < 1 || arrivals > kMostBytes) {
    fail("barrier_init", at, std::to_string(arrivals) + " arrivals, where 1 to 1048575 are possible");
  }
  Unwatched unwatched;
  auto const [found, fresh] = state().mbarriers.try_emplace(offset);
  Mbarrier& b = found->second;
  if (!fresh) fail("barrier_init", at, describe(b) + ", which is there already");
  b.offset = offset, b.arrivals = b.pending = arrivals, b.where = at, b.initialiser = thread_index();
  write_shared(offset, &kMark, sizeof(kMark));
}

void fence_barrier_init() {
  for (auto& [offset, b] : state().mbarriers) b.fenced = b.fenced || b.initialiser == thread_index();
}

void barrier_arrive(char const* name, uint64_t* barrier, int arrivals, int bytes, Site at) {
  end_some_loads();
  Mbarrier& b = find_barrier(name, barrier, at);
  tsan_release(&b.sync[b.phase % 2]);
  if (bytes < 0 || b.bytes + bytes > kMostBytes) {
    fail(name, at,
         describe(b) + " and " + std::to_string(bytes) + " bytes, where a phase may expect 0 to 1048575");
  }
  if (b.pending == 0) {
    fail(name, at,
         describe(b) + ", where all " + std::to_string(b.arrivals) + " arrivals of phase " +
             std::to_string(b.phase) + " have come and only bytes are awaited");
  }
  b.bytes += bytes;
  b.pending -= arrivals;
  state().idle = 0;
  end_phase_if_complete(b);
}

bool barrier_wait(char const* name, uint64_t* barrier, int parity, bool block, Site at) {
  end_some_loads();
  Mbarrier& b = find_barrier(name, barrier, at);
  if (parity != 0 && parity != 1) {
    fail(name, at, "parity " + std::to_string(parity) + ", which is neither 0 nor 1");
  }
  unsigned const phase = b.phase;
  if (static_cast<int>(phase % 2) == parity) {  // it is still going on
    {
      Unwatched unwatched;
      (block ? b.waiting : b.asking).push_back(thread_index());
    }
    sleep_at(name, at);
    if (b.phase == phase) return false;
    if (b.phase != phase + 1) {
      fail(name, at,
           describe(b) + ", where phase " + std::to_string(phase + 1) +
               " ended too before this thread had seen the end of phase " + std::to_string(phase));
    }
  }
  b.seen = true;
  tsan_acquire(&b.sync[parity]);
  return true;
}

// ---- Named barriers, registers, one lane for all ----------------------------------------------------------

namespace {

struct NamedOperand {
  char const* name;
  Site where;
  int id, threads;
  unsigned epoch;
};

// A warp arrives as a whole.
void arrive_named(void* const* operands, int count) {
  auto const lane = [operands](int i) -> NamedOperand& { return *static_cast<NamedOperand*>(operands[i]); };
  NamedOperand const& first = lane(0);
  for (int i = 1; i < count; ++i) {
    if (lane(i).id != first.id || lane(i).threads != first.threads) {
      fail(first.name, first.where, "a barrier that differs between the lanes of a warp");
    }
  }
  NamedBarrier& b = state().named[first.id];
  if (b.arrived > 0 && b.threads != first.threads) {
    fail(first.name, first.where,
         "barrier " + std::to_string(first.id) + " and " + std::to_string(first.threads) +
             " threads, while " + place(b.name, b.where) + " has given it " + std::to_string(b.threads));
  }
  if (b.arrived == 0) b.threads = first.threads, b.name = first.name, b.where = first.where;
  for (int i = 0; i < count; ++i) lane(i).epoch = b.epoch;
  tsan_release(&b.sync[b.epoch % 2]);
  b.arrived += count;
  state().idle = 0;
  if (b.arrived < b.threads) return;
  b.arrived = 0;
  ++b.epoch;
  wake_all(b.waiting);
}

}  // namespace

void named_barrier(char const* name, int id, int threads, bool wait, Site at) {
  if (id < 1 || id > 15) fail(name, at, "barrier " + std::to_string(id) + ", where 1 to 15 are possible");
  if (threads < 32 || threads % 32 != 0 || threads > current_launch().threads) {
    fail(name, at,
         std::to_string(threads) + " threads, where a multiple of 32 up to the block's " +
             std::to_string(current_launch().threads) + " is possible");
  }
  NamedOperand mine{name, at, id, threads, 0};
  meet_warp(name, at, &mine, arrive_named);
  if (!wait) return;
  NamedBarrier& b = state().named[id];
  if (b.epoch == mine.epoch) {
    {
      Unwatched unwatched;
      b.waiting.push_back(thread_index());
    }
    sleep_at(name, at);
  }
  tsan_acquire(&b.sync[mine.epoch % 2]);
}

void set_max_registers(char const* name, int registers, bool up, Site at) {
  struct Operand {
    char const* name;
    Site where;
    int registers;
    bool up;
  } mine{name, at, registers, up};
  meet_warpgroup(name, at, &mine, [](void* const* operands, int) {
    Unwatched unwatched;
    auto const& asked = *static_cast<Operand*>(operands[0]);
    if (state().warpgroups.empty()) share_out_registers();
    Warpgroup& group = state().warpgroups[static_cast<size_t>(thread_index() / 128)];
    if (group.explicit_now && (asked.up ? asked.registers < group.now : asked.registers > group.now)) {
      fail(asked.name, asked.where,
           std::to_string(asked.registers) + " registers to threads that have " + std::to_string(group.now));
    }
    group.wanted = asked.registers;
    group.explicit_now = true;
    grant_registers(group);
  });
  Warpgroup const& group = state().warpgroups[static_cast<size_t>(thread_index() / 128)];
  while (group.now != group.wanted) {
    {
      Unwatched unwatched;
      state().waiting_for_registers.push_back(thread_index());
    }
    sleep_at(name, at);
  }
}

bool elect_one(Site at) {
  meet_warp("elect_one", at, nullptr, nullptr);
  int const lane = thread_index() % 32, warp = thread_index() / 32;
  if (current_order() == Order::kForward) return lane == 0;
  if (current_order() == Order::kReverse) return lane == 31;
  return lane == (warp * 7 + 13) % 32;
}

// ---- For the core -----------------------------------------------------------------------------------------

void start_engines() {
  barriers.reset();
  start_copies();
  start_tensor_cores();
}

bool advance_engines() {
  if (current_order() == Order::kReverse && advance_tensor_cores()) return true;
  return advance_copies() || advance_tensor_cores() || answer_askers();
}

std::string describe_engines() {
  std::string all;
  for (auto const& [offset, b] : state().mbarriers) {
    if (!b.awaited()) continue;
    all += " Phase " + std::to_string(b.phase) + " of " + describe(b) + " lacks " +
           std::to_string(b.pending) + " of " + std::to_string(b.arrivals) + " arrivals and " +
           std::to_string(b.bytes) + " bytes.";
  }
  for (int id = 1; id < 16; ++id) {
    NamedBarrier const& b = state().named[id];
    if (b.arrived == 0) continue;
    all += " To named barrier " + std::to_string(id) + ", " + std::to_string(b.arrived) + " of " +
           std::to_string(b.threads) + " threads have come.";
  }
  if (!state().waiting_for_registers.empty()) {
    all += " Of the block's registers, " + std::to_string(state().free_registers) + " are free.";
  }
  return all;
}

void finish_engines() {
  finish_tensor_cores();
  finish_copies();
  if (barriers == nullptr) return;
  for (auto const& [offset, b] : barriers->mbarriers) {
    if (b.bytes == 0 && b.pending == b.arrivals) continue;
    fail_block("the block has ended in the middle of phase " + std::to_string(b.phase) + " of " +
               describe(b) + ", which lacks " + std::to_string(b.pending) + " of " +
               std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) + " bytes");
  }
}

}  // namespace vdit::emu
