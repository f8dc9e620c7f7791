// From rows of masses in shared memory to the lists of block_mass_topk.
#pragma once
#include "attention/kernel_sm80_select.cuh"
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// One row as it is sorted: entries are block numbers, kUnforced added to those that are not forced.
struct MassOrder {
  static constexpr uint32_t kUnforced = 0x8000;
  static_assert(kMaxMassBlocks < kUnforced, "A block number and a flag must fit 16 bits.");

  float const* row;   // [n]
  uint16_t* entries;  // [n]

  VDIT_DEVICE static int block_of(uint32_t entry) { return static_cast<int>(entry & (kUnforced - 1u)); }

  VDIT_DEVICE bool comes_before(uint32_t a, uint32_t b) const {
    if ((a & b & kUnforced) == 0) return a < b;  // the forced one, or the lower of two
    uint32_t const x = ordered_key(row[block_of(a)]), y = ordered_key(row[block_of(b)]);
    return x != y ? x > y : a < b;
  }

  VDIT_DEVICE void exchange(int low, int high) const {
    uint32_t const a = entries[low], b = entries[high];
    if (!comes_before(b, a)) return;
    entries[low] = static_cast<uint16_t>(b);
    entries[high] = static_cast<uint16_t>(a);
  }
};

// Bitonic sort of all rows at once. Every comparison puts the earlier entry to the lower place, so that
// places past n, which are left out, would hold what comes last. `sync` is a barrier of the kThreads threads
// that take part.
template <int kThreads, class Sync>
VDIT_DEVICE void sort_masses(float const* rows, uint16_t* entries, int n, int groups, Sync const& sync) {
  int bits = 0;  // 2^bits places
  while ((1 << bits) < n) ++bits;
  int const pairs = (1 << bits) / 2;
  for (int run = 1; run <= bits; ++run) {     // runs of 2^run places become sorted
    for (int step = run; step > 0; --step) {  // by comparisons within 2^step places
      int const half = 1 << (step - 1);
      for (int i = thread_idx(); i < groups * pairs; i += kThreads) {
        int const group = i >> (bits - 1), pair = i & (pairs - 1), offset = pair & (half - 1);
        int const low = (pair - offset) * 2 + offset;
        int const high = step == run ? low + 2 * (half - offset) - 1 : low + half;
        if (high < n) MassOrder{rows + group * n, entries + group * n}.exchange(low, high);
      }
      sync();
    }
  }
}

// Lists and totals of the query blocks from `first_block` on, by threads 0 to kThreads - 1.
//   rows     [groups, n] in shared memory, complete
//   entries  [groups, n] of shared memory, free to use
template <int kThreads, class Sync>
VDIT_DEVICE void list_heaviest(BlockMassTopkParams const& p, int64_t first_block, int groups,
                               float const* rows, uint16_t* entries, Sync const& sync) {
  int const n = static_cast<int>(p.row.num_kv_blocks), k_max = static_cast<int>(p.k_max);
  int64_t const row0 = map_index() * p.row.num_q_blocks + first_block;
  bool const* forced = p.forced;
  if (forced != nullptr) forced += block_idx_z() * p.stride_forced.b + block_idx_y() * p.stride_forced.h;

  for (int i = thread_idx(); i < n; i += kThreads) {
    uint32_t const entry = i + (forced != nullptr && forced[i] ? 0u : MassOrder::kUnforced);
    for (int group = 0; group < groups; ++group) entries[group * n + i] = static_cast<uint16_t>(entry);
  }
  for (int group = warp_idx(); group < groups; group += kThreads / 32) {
    float sum = 0.f;
    for (int i = lane_idx(); i < n; i += 32) sum += rows[group * n + i];
    sum = warp_sum(sum);
    if (lane_idx() == 0) p.total[row0 + group] = sum;
  }
  sync();
  sort_masses<kThreads>(rows, entries, n, groups, sync);
  for (int group = 0; group < groups; ++group) {
    int64_t const out = (row0 + group) * p.k_max;
    for (int i = thread_idx(); i < k_max; i += kThreads) {
      int const block = MassOrder::block_of(entries[group * n + i]);
      p.indices[out + i] = block;
      p.mass[out + i] = rows[group * n + block];
    }
  }
}

}  // namespace vdit
