// The tensor cores: matrices in shared memory as their descriptors name them, and products that are under way
// from their call until the wait that makes them due. Meanwhile their accumulators hold NaN.
#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <vector>

#include "engines.h"
#include "fiber.h"
#include "hopper.h"
#include "numbers.h"

namespace vdit::emu {

// sums [64][n] += a [64][k] b [k][n], in order of k. Products of 16-bit floats are exact in fp32.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
[[gnu::target_clones("avx512f", "avx2", "default")]]
#endif
void add_products(float* sums, float const* a, float const* b, int k, int n) {
  constexpr int kColumns = 16;
  for (int m = 0; m < 64; ++m) {
    for (int column = 0; column < n; column += kColumns) {
      float row[kColumns];
      for (int j = 0; j < kColumns; ++j) row[j] = sums[m * n + column + j];
      for (int i = 0; i < k; ++i) {
        for (int j = 0; j < kColumns; ++j) row[j] += a[m * k + i] * b[i * n + column + j];
      }
      for (int j = 0; j < kColumns; ++j) sums[m * n + column + j] = row[j];
    }
  }
}

namespace {

constexpr int kThreads = 128;
constexpr uint32_t kPoison = 0xffffffffu;
constexpr uint32_t kSharedStart = 1024;  // the address of a block's first byte

// Registers d of all threads that products are added to.
struct Accumulators {
  uint32_t* registers[kThreads];
  int n;
  std::vector<float> floats;   // [64][n], or
  std::vector<uint32_t> ints;  // the same
  int under_way = 0;           // products

  void* at(size_t i) { return ints.empty() ? static_cast<void*>(&floats[i]) : &ints[i]; }
};

struct Product {
  Wgmma asked;
  Site where;
  int warpgroup;
  Accumulators* d;
  std::vector<char> a, b;  // what they held at the call: rows of 32 bytes; b's rows of 2 * n where kMN
};

struct Tensorgroup {
  std::vector<Product> open;  // not yet committed
  std::deque<std::vector<Product>> groups;
  std::list<Accumulators> accumulators;
  bool fenced = false;   // since registers were last free to be used otherwise
  bool waiting = false;  // for all but groups_left to be finished
  int groups_left = 0;
  Site wait{};
};

struct Operand {
  Wgmma wgmma;
  Site where;
};

thread_local std::vector<Tensorgroup> tensorgroups;

Tensorgroup& mine() {
  Unwatched unwatched;
  if (tensorgroups.empty()) tensorgroups.resize(static_cast<size_t>(current_launch().threads / kThreads));
  return tensorgroups[static_cast<size_t>(thread_index() / kThreads)];
}

std::string title(char const* name, Site at, int warpgroup) {
  return place(name, at) + " of warpgroup " + std::to_string(warpgroup);
}

// ---- Matrices in shared memory ----------------------------------------------------------------------------

// Calls each(i, offset) for every 16 bytes of a matrix of `rows` rows along m or n: i counts them in rows of
// 32 bytes along k, or along n where `mn_major`.
template <class Each>
void for_pieces(uint64_t descriptor, int rows, bool mn_major, Each const& each) {
  auto const field = [descriptor](int bit) { return static_cast<size_t>(descriptor >> bit & 0x3fff) << 4; };
  size_t const start = field(0), leading = field(16), stride = field(32);
  size_t const base = descriptor >> 49 & 7;  // lines by which the pattern starts later
  int const mode = static_cast<int>(descriptor >> 62);
  int const swizzle = mode == 0 ? 0 : 256 >> mode;  // 128, 64, 32
  size_t const width = swizzle == 0 ? 16 : static_cast<size_t>(swizzle), pieces = width / 16;
  size_t const across = mn_major ? static_cast<size_t>(rows) / 8 : 2;  // pieces of a row
  size_t const down = mn_major ? 16 : static_cast<size_t>(rows);
  for (size_t i = 0; i < down; ++i) {
    for (size_t j = 0; j < across; ++j) {
      size_t at = start + i % 8 * width;
      if (!mn_major) {
        at += i / 8 * stride + j * (swizzle == 0 ? leading : 16);
      } else if (swizzle == 0) {
        at += i / 8 * leading + j * stride;
      } else {
        at += i / 8 * stride + j / pieces * leading + j % pieces * 16;
      }
      each(i * across + j, swizzled(at, swizzle, base));
    }
  }
}

size_t offset_of(std::string const& who, size_t address) {
  size_t const offset = address - kSharedStart;
  if (address < kSharedStart || offset + 16 > current_launch().smem_bytes) {
    fail_block(who + " reads " + range_text(offset, 16));
  }
  return offset;
}

// As the tensor cores see it, which must be as it is.
std::vector<char> read_matrix(std::string const& who, uint64_t descriptor, int rows, bool mn_major) {
  std::vector<char> bytes(static_cast<size_t>(rows) * 32);
  char const* const view = async_view();
  for_pieces(descriptor, rows, mn_major, [&](size_t i, size_t address) {
    size_t const offset = offset_of(who, address);
    memcpy(&bytes[i * 16], view + offset, 16);
    if (memcmp(&bytes[i * 16], shared_memory() + offset, 16) == 0) return;
    check_published(who + " reads", offset, 16);
  });
  return bytes;
}

// What a product reads must not change before it is due.
void check_unchanged(Product const& product, std::vector<char> const& bytes, uint64_t descriptor, int rows,
                     bool mn_major, Site wait) {
  std::string const who = title(product.asked.name, product.where, product.warpgroup);
  for_pieces(descriptor, rows, mn_major, [&](size_t i, size_t address) {
    size_t const offset = offset_of(who, address);
    if (memcmp(&bytes[i * 16], shared_memory() + offset, 16) == 0) return;
    fail_block(who + " reads " + range_text(offset, 16) + ", which changed before " +
               place("wgmma_wait", wait) + " made it due");
  });
}

// ---- Products ---------------------------------------------------------------------------------------------

// Where thread `t` holds its register `i` of d: CuTe's and the PTX manual's m64nN accumulator.
size_t place_of(int t, int i, int n) {
  int const row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
  int const column = i / 4 * 8 + t % 4 * 2 + i % 2;
  return static_cast<size_t>(row * n + column);
}

Accumulators& take_accumulators(Tensorgroup& group, void* const* operands, Wgmma const& asked) {
  for (Accumulators& d : group.accumulators) {
    if (d.registers[0] == asked.d && d.n == asked.n) return d;
  }
  Accumulators& d = group.accumulators.emplace_back();
  d.n = asked.n;
  auto const size = static_cast<size_t>(64 * asked.n);
  if (is_integer(asked.type)) {
    d.ints.resize(size);
  } else {
    d.floats.resize(size);
  }
  for (int t = 0; t < kThreads; ++t) {
    d.registers[t] = static_cast<Operand*>(operands[t])->wgmma.d;
    for (int i = 0; i < asked.n / 2; ++i) {
      memcpy(d.at(place_of(t, i, asked.n)), d.registers[t] + i, 4);
      memcpy(d.registers[t] + i, &kPoison, 4);
    }
  }
  return d;
}

// a from registers: lane 4 * g + t of a warp holds four bytes at t * 4 and 16 further on, of rows g and 8 on.
std::vector<char> read_registers(void* const* operands) {
  std::vector<char> bytes(64 * 32);
  for (int t = 0; t < kThreads; ++t) {
    for (int i = 0; i < 4; ++i) {
      int const row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, byte = t % 4 * 4 + i / 2 * 16;
      memcpy(&bytes[static_cast<size_t>(row * 32 + byte)], static_cast<Operand*>(operands[t])->wgmma.a + i,
             4);
    }
  }
  return bytes;
}

template <float (*kConvert)(uint32_t)>
void convert_halves(char const* bytes, float* to, int count) {
  for (int i = 0; i < count; ++i) {
    uint16_t half;
    memcpy(&half, bytes + 2 * i, 2);
    to[i] = kConvert(half);
  }
}

// `count` values of `type` as fp32; bytes are signed unless `unsigned_bytes`.
void convert(WgmmaType type, bool unsigned_bytes, char const* bytes, float* to, int count) {
  if (type == WgmmaType::kF16) return convert_halves<f16_to_float>(bytes, to, count);
  if (type == WgmmaType::kBF16) return convert_halves<bf16_to_float>(bytes, to, count);
  for (int i = 0; i < count; ++i) {
    to[i] = unsigned_bytes ? static_cast<float>(static_cast<unsigned char>(bytes[i]))
                           : static_cast<float>(static_cast<signed char>(bytes[i]));
  }
}

void multiply(Product const& product) {
  Wgmma const& asked = product.asked;
  int const n = asked.n, k = is_integer(asked.type) ? 32 : 16;
  float a[64 * 32], b[32 * 256], rows[256 * 32];
  convert(asked.type, asked.type == WgmmaType::kU8S8, product.a.data(), a, 64 * k);
  convert(asked.type, false, product.b.data(), asked.mn_major_b ? b : rows, n * k);
  if (!asked.mn_major_b) {
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < n; ++j) b[i * n + j] = rows[j * k + i];
    }
  }
  Accumulators& d = *product.d;
  if (!asked.accumulate) {
    std::fill(d.floats.begin(), d.floats.end(), 0.0f);
    std::fill(d.ints.begin(), d.ints.end(), 0u);
  }
  if (!is_integer(asked.type)) return add_products(d.floats.data(), a, b, k, n);
  // 32 products of bytes are at most 2^20: exact in fp32. Only the accumulator wraps.
  std::vector<float> sums(d.ints.size(), 0.0f);
  add_products(sums.data(), a, b, k, n);
  for (size_t i = 0; i < sums.size(); ++i) d.ints[i] += static_cast<uint32_t>(static_cast<int32_t>(sums[i]));
}

void finish(Tensorgroup& group, Product const& product) {
  Site const wait = group.wait;
  Wgmma const& asked = product.asked;
  if (asked.a == nullptr) check_unchanged(product, product.a, asked.descriptor_a, 64, false, wait);
  check_unchanged(product, product.b, asked.descriptor_b, asked.n, asked.mn_major_b, wait);
  multiply(product);
  Accumulators& d = *product.d;
  if (--d.under_way > 0) return;
  for (int t = 0; t < kThreads; ++t) {
    for (int i = 0; i < d.n / 2; ++i) {
      if (memcmp(d.registers[t] + i, &kPoison, 4) != 0) {
        fail_block(title(asked.name, product.where, product.warpgroup) +
                   " had its accumulators written by other code before " + place("wgmma_wait", wait) +
                   " made it due");
      }
      memcpy(d.registers[t] + i, d.at(place_of(t, i, d.n)), 4);
    }
  }
  group.accumulators.remove_if([&d](Accumulators const& other) { return &other == &d; });
}

// All threads must ask for the same thing.
void check_alike(void* const* operands, std::string const& who) {
  Wgmma const& first = static_cast<Operand*>(operands[0])->wgmma;
  for (int t = 1; t < kThreads; ++t) {
    Wgmma const& other = static_cast<Operand*>(operands[t])->wgmma;
    char const* const what = other.descriptor_a != first.descriptor_a   ? "the descriptor of a"
                             : other.descriptor_b != first.descriptor_b ? "the descriptor of b"
                             : other.accumulate != first.accumulate     ? "accumulate"
                                                                        : nullptr;
    if (what == nullptr) continue;
    int const start = thread_index() / kThreads * kThreads;
    fail_block(who + ": threads " + std::to_string(start) + " and " + std::to_string(start + t) +
               " differ in " + what);
  }
}

void issue(void* const* operands, int) {
  Unwatched unwatched;
  auto const& [asked, where] = *static_cast<Operand*>(operands[0]);
  int const warpgroup = thread_index() / kThreads;
  std::string const who = title(asked.name, where, warpgroup);
  check_alike(operands, who);
  Tensorgroup& group = mine();
  if (!group.fenced) {
    fail_block(who + " comes without a wgmma_fence since its registers were free for other use");
  }
  Product product = {asked, where, warpgroup, nullptr, {}, {}};
  product.a = asked.a == nullptr ? read_matrix(who, asked.descriptor_a, 64, false) : read_registers(operands);
  product.b = read_matrix(who, asked.descriptor_b, asked.n, asked.mn_major_b);
  product.d = &take_accumulators(group, operands, asked);
  ++product.d->under_way;
  group.open.push_back(std::move(product));
}

}  // namespace

uint32_t shared_address(char const* name, Site at, void const* p) {
  return kSharedStart + static_cast<uint32_t>(check_shared(name, at, p, 16));
}

void wgmma(Wgmma const& asked, Site at) {
  Operand operand{asked, at};
  meet_warpgroup(asked.name, at, &operand, issue);
}

void wgmma_fence(Site at) {
  meet_warpgroup("wgmma_fence", at, nullptr, [](void* const*, int) { mine().fenced = true; });
}

void wgmma_commit(Site at) {
  meet_warpgroup("wgmma_commit", at, nullptr, [](void* const*, int) {
    Unwatched unwatched;
    mine().groups.push_back(std::move(mine().open));
    mine().open.clear();
  });
}

// NOTE: the products are finished when no thread can go on, so that whoever has been told too early that
// their operands are free has written over them by then.
void wgmma_wait(int groups_left, Site at) {
  struct Wait {
    int groups_left;
    Site where;
  } operand{groups_left, at};
  meet_warpgroup("wgmma_wait", at, &operand, [](void* const* operands, int) {
    auto const& wait = *static_cast<Wait*>(operands[0]);
    Tensorgroup& group = mine();
    group.waiting = static_cast<int>(group.groups.size()) > wait.groups_left;
    group.groups_left = wait.groups_left;
    group.wait = wait.where;
  });
  while (mine().waiting) sleep_at("wgmma_wait", at);
}

bool advance_tensor_cores() {
  for (size_t i = 0; i < tensorgroups.size(); ++i) {
    Tensorgroup& group = tensorgroups[i];
    if (!group.waiting) continue;
    Unwatched unwatched;
    while (static_cast<int>(group.groups.size()) > group.groups_left) {
      for (Product const& product : group.groups.front()) finish(group, product);
      group.groups.pop_front();
    }
    group.fenced = group.waiting = false;
    for (int t = 0; t < kThreads; ++t) wake(static_cast<int>(i) * kThreads + t);
    return true;
  }
  return false;
}

void start_tensor_cores() { tensorgroups.clear(); }

void finish_tensor_cores() {
  for (size_t i = 0; i < tensorgroups.size(); ++i) {
    Tensorgroup& group = tensorgroups[i];
    while (!group.groups.empty() && group.open.empty()) {
      group.open = std::move(group.groups.front());
      group.groups.pop_front();
    }
    if (group.open.empty()) continue;
    fail_block("the block has ended before warpgroup " + std::to_string(i) + " waited for its " +
               place(group.open[0].asked.name, group.open[0].where));
  }
}

}  // namespace vdit::emu
