// topk_blocks and topp_blocks. Both keep a prefix of a descending order, so both are a search for the key at
// which the prefix ends: no sort, no float sums whose order matters.
//
// A score becomes a 32-bit key that sorts as the score does (NaN lowest). One row is searched by one warp,
// bit by bit. A whole map (top-k per head) is searched by radix histograms over many blocks, 11 bits a pass.
// The same warp code then writes each row's list in rising order.
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// Unsigned order of the keys is the floats' order; -0 equals +0; NaN is 0, below -inf.
VDIT_DEVICE uint32_t ordered_key(float v) {
  if (v != v) return 0;
  uint32_t const bits = v == 0.f ? 0u : detail::bits_as<uint32_t>(v);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The inverse, except that NaN comes back as some NaN.
VDIT_DEVICE float value_of_key(uint32_t key) {
  return detail::bits_as<float>((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

template <class T>
VDIT_DEVICE T warp_sum(T v) {
  for (int step = 16; step > 0; step /= 2) v += shfl_xor(v, step);
  return v;
}

VDIT_DEVICE uint32_t warp_max(uint32_t v) {
  for (int step = 16; step > 0; step /= 2) {
    uint32_t const other = shfl_xor(v, step);
    v = other > v ? other : v;
  }
  return v;
}

// Where a descending prefix ends: keys of at least `above` are kept, and of those in [tie, above) the first
// `ties` in index order.
struct Cut {
  uint64_t above;  // 2^32: none
  uint32_t tie;
  int64_t ties;
};

// The keys of one row: in shared memory where they fit, else computed again at each reading.
template <class Compute>
struct RowKeys {
  uint32_t* cache;  // [count] or null
  Compute compute;

  VDIT_DEVICE uint32_t operator()(int64_t i) const { return cache != nullptr ? cache[i] : compute(i); }
  VDIT_DEVICE void fill(int64_t count) const {
    if (cache == nullptr) return;
    for (int64_t i = lane_idx(); i < count; i += 32) cache[i] = compute(i);
    sync_warp();
  }
};

// Writes one row's list: what the cut keeps and, if asked, the row's best. `ties_before` counts the row's
// predecessors in index order that also lie in [tie, above). One warp.
template <class Keys>
VDIT_DEVICE void write_list(Keys const& keys, int64_t count, Cut const& cut, int64_t ties_before,
                            bool keep_row_max, int32_t* num_blocks, int32_t* indices) {
  int64_t best_at = -1;
  if (keep_row_max) {
    uint32_t best = 0;
    for (int64_t i = lane_idx(); i < count; i += 32) best = keys(i) > best ? keys(i) : best;
    best = warp_max(best);
    for (int64_t i0 = 0; i0 < count && best_at < 0; i0 += 32) {
      int64_t const i = i0 + lane_idx();
      uint32_t const found = ballot(i < count && keys(i) == best);
      if (found != 0) best_at = i0 + popcount((found & (0u - found)) - 1u);
    }
  }
  int64_t kept = 0, ties = ties_before;
  for (int64_t i0 = 0; i0 < count; i0 += 32) {
    int64_t const i = i0 + lane_idx();
    uint32_t const key = i < count ? keys(i) : 0;
    bool const over = i < count && key >= cut.above;
    bool const tied = i < count && !over && key >= cut.tie;
    uint32_t const all_tied = ballot(tied);
    bool const keep = over || (tied && ties + popcount(all_tied & lanes_below()) < cut.ties) || i == best_at;
    uint32_t const all_kept = ballot(keep);
    if (keep) indices[kept + popcount(all_kept & lanes_below())] = static_cast<int32_t>(i);
    kept += popcount(all_kept);
    ties += popcount(all_tied);
  }
  // NOTE: i0 runs ahead of `kept`, so the tail is cleared only after the list is complete.
  for (int64_t i = kept + lane_idx(); i < count; i += 32) indices[i] = 0;
  if (lane_idx() == 0) *num_blocks = static_cast<int32_t>(kept);
}

// What the row kernels share: a block is kWarps rows, each warp with its own stretch of shared memory.
struct RowSelect {
  static constexpr int kWarps = 4;
  static constexpr int64_t kMaxCached = 3072;  // keys a row; 4 rows of them fill 48 KB

  static int64_t cached(int64_t count) { return count <= kMaxCached ? count : 0; }
};

struct TopkBlocksLaunch {
  TopkBlocksParams topk;
  int64_t cached;  // keys a row in shared memory, 0: none
  // Per head only:
  uint32_t* histograms;  // [b * h, 3, kBins]
  uint32_t* row_ties;    // [b * h, nq]
  Cut* cuts;             // [b * h]
  int64_t rows_per_block;
  int32_t pass;
};

// Row `row` of map `bh`, flattened over batch and heads.
VDIT_DEVICE float const* score_row(TopkBlocksParams const& p, int64_t bh, int64_t row) {
  return p.scores + bh / p.heads * p.stride_scores.b + bh % p.heads * p.stride_scores.h +
         row * p.stride_scores.s;
}

// Grid: x tiles of kWarps rows, y batch * heads.
struct TopkRowsKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = RowSelect::kWarps * 32;
  static constexpr int kMinBlocks = 1;

  // The largest key that at least k keys reach, found from the top bit down.
  template <class Keys>
  VDIT_DEVICE static Cut search(Keys const& keys, int64_t count, int64_t k) {
    if (k <= 0) return Cut{uint64_t{1} << 32, 0xffffffffu, 0};
    if (k >= count) return Cut{0, 0, 0};
    uint32_t key = 0;
    int64_t reach = count, over = 0;  // how many reach `key`, and how many the next candidate above it
    for (int bit = 31; bit >= 0; --bit) {
      uint32_t const candidate = key | 1u << bit;
      int64_t n = 0;
      for (int64_t i = lane_idx(); i < count; i += 32) n += keys(i) >= candidate;
      n = warp_sum(n);
      if (n >= k) {
        key = candidate, reach = n;
      } else {
        over = n;
      }
      if (reach == k) return Cut{key, key, 0};  // exactly those that reach it
    }
    return Cut{uint64_t{key} + 1, key, k - over};
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = map_index();
    int64_t const row = static_cast<int64_t>(block_idx_x()) * RowSelect::kWarps + warp_idx();
    if (row >= p.topk.num_q_blocks) return;
    int64_t const count = p.topk.num_kv_blocks;
    float const* scores = score_row(p.topk, bh, row);
    auto compute = [scores](int64_t i) { return ordered_key(scores[i]); };
    uint32_t* cache = p.cached > 0 ? reinterpret_cast<uint32_t*>(smem) + warp_idx() * p.cached : nullptr;
    RowKeys<decltype(compute)> const keys{cache, compute};
    keys.fill(count);
    Cut const cut = search(keys, count, p.topk.k);
    int64_t const at = bh * p.topk.num_q_blocks + row;
    write_list(keys, count, cut, 0, p.topk.keep_row_max, p.topk.kv_num_blocks + at,
               p.topk.kv_indices + at * count);
  }
};

// The digits of a radix search over 32-bit keys: 11, 11 and 10 bits.
struct Radix {
  static constexpr int kBins = 2048;
  VDIT_HOST_DEVICE static int shift(int pass) { return pass == 0 ? 21 : (pass == 1 ? 10 : 0); }
  VDIT_HOST_DEVICE static int bits(int pass) { return pass == 2 ? 10 : 11; }
};

// Clears the histograms and sets each map's search to "all keys, k to find".
// Grid: x batch * heads.
struct TopkBeginKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const bh = block_idx_x();
    for (int i = thread_idx(); i < 3 * Radix::kBins; i += kThreads)
      p.histograms[bh * 3 * Radix::kBins + i] = 0;
    if (thread_idx() == 0) {
      int64_t const count = p.topk.num_q_blocks * p.topk.num_kv_blocks;
      p.cuts[bh] = Cut{uint64_t{1} << 32, 0, p.topk.k < count ? p.topk.k : count};
    }
  }
};

// Counts one digit of the keys that agree with the digits found so far.
// Grid: x tiles of rows_per_block rows, y batch * heads.
struct TopkHistogramKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSmemBytes = Radix::kBins * 4;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = map_index();
    int64_t const first = static_cast<int64_t>(block_idx_x()) * p.rows_per_block;
    int64_t const end = first + p.rows_per_block;
    int64_t const last = end < p.topk.num_q_blocks ? end : p.topk.num_q_blocks;
    uint32_t* counts = reinterpret_cast<uint32_t*>(smem);
    for (int i = thread_idx(); i < Radix::kBins; i += kThreads) counts[i] = 0;
    sync_block();

    int const shift = Radix::shift(p.pass), bits = Radix::bits(p.pass);
    uint32_t const found = p.cuts[bh].tie;
    for (int64_t row = first + warp_idx(); row < last; row += kThreads / 32) {
      float const* scores = score_row(p.topk, bh, row);
      for (int64_t i = lane_idx(); i < p.topk.num_kv_blocks; i += 32) {
        uint32_t const key = ordered_key(scores[i]);
        bool const agrees = p.pass == 0 || ((key ^ found) >> (shift + bits)) == 0;
        if (agrees) atomic_add(counts + ((key >> shift) & ((1u << bits) - 1u)), 1u);
      }
    }
    sync_block();
    uint32_t* histogram = p.histograms + (bh * 3 + p.pass) * Radix::kBins;
    for (int i = thread_idx(); i < Radix::kBins; i += kThreads) {
      if (counts[i] != 0) atomic_add(histogram + i, counts[i]);
    }
  }
};

// Adds a digit to each map's search: the highest at which the count from above reaches what is left to find.
// Grid: x batch * heads; one warp.
struct TopkDigitKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;
  static constexpr int kPerLane = Radix::kBins / 32;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const bh = block_idx_x();
    uint32_t const* histogram = p.histograms + (bh * 3 + p.pass) * Radix::kBins;
    // Lane l sums the l-th stretch of bins from the top, so that a prefix sum runs downwards.
    int const top = Radix::kBins - 1 - lane_idx() * kPerLane;
    int64_t mine = 0;
    for (int i = 0; i < kPerLane; ++i) mine += histogram[top - i];
    int64_t const upto = warp_prefix_sum(mine);
    Cut cut = p.cuts[bh];
    sync_warp();  // every lane has read the cut before one of them replaces it
    int64_t left = cut.ties - (upto - mine);
    if (left <= 0 || left > mine) return;  // another lane's stretch, or k was 0
    int digit = top;
    for (; left > histogram[digit]; --digit) left -= histogram[digit];
    int const shift = Radix::shift(p.pass);
    cut.tie |= static_cast<uint32_t>(digit) << shift;
    cut.above = uint64_t{cut.tie} + (uint64_t{1} << shift);
    cut.ties = left;
    p.cuts[bh] = cut;
  }
};

// How many keys of each row tie with the cut.
// Grid: x tiles of kWarps rows, y batch * heads.
struct TopkTiesKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = RowSelect::kWarps * 32;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const bh = map_index();
    int64_t const row = static_cast<int64_t>(block_idx_x()) * RowSelect::kWarps + warp_idx();
    if (row >= p.topk.num_q_blocks) return;
    uint32_t const tie = p.cuts[bh].tie;
    float const* scores = score_row(p.topk, bh, row);
    uint32_t n = 0;
    for (int64_t i = lane_idx(); i < p.topk.num_kv_blocks; i += 32) n += ordered_key(scores[i]) == tie;
    n = warp_sum(n);
    if (lane_idx() == 0) p.row_ties[bh * p.topk.num_q_blocks + row] = n;
  }
};

// Grid as above.
struct TopkListsKernel {
  using Params = TopkBlocksLaunch;
  static constexpr int kThreads = RowSelect::kWarps * 32;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const bh = map_index();
    int64_t const row = static_cast<int64_t>(block_idx_x()) * RowSelect::kWarps + warp_idx();
    if (row >= p.topk.num_q_blocks) return;
    uint32_t const* row_ties = p.row_ties + bh * p.topk.num_q_blocks;
    int64_t ties_before = 0;
    for (int64_t i = lane_idx(); i < row; i += 32) ties_before += row_ties[i];
    ties_before = warp_sum(ties_before);
    float const* scores = score_row(p.topk, bh, row);
    auto compute = [scores](int64_t i) { return ordered_key(scores[i]); };
    RowKeys<decltype(compute)> const keys{nullptr, compute};
    int64_t const at = bh * p.topk.num_q_blocks + row;
    write_list(keys, p.topk.num_kv_blocks, p.cuts[bh], ties_before, p.topk.keep_row_max,
               p.topk.kv_num_blocks + at, p.topk.kv_indices + at * p.topk.num_kv_blocks);
  }
};

struct ToppBlocksLaunch {
  ToppBlocksParams topp;
  int64_t cached;  // as above
};

// Grid: x tiles of kWarps rows, y batch * heads.
struct ToppRowsKernel {
  using Params = ToppBlocksLaunch;
  static constexpr int kThreads = RowSelect::kWarps * 32;
  static constexpr int kMinBlocks = 1;

  // The mass of a key relative to the best, in units of 2^-40. Integers make the sums exact, so that they do
  // not depend on their order; 2^23 blocks fit.
  VDIT_DEVICE static uint64_t mass_of(uint32_t key, float top) {
    if (key == 0) return 0;
    float const value = value_of_key(key);
    float const mass = value == top ? 1.f : expf(value - top);  // the best may be +inf
    return static_cast<uint64_t>(mass * 1099511627776.f);
  }

  // The largest key such that the keys that reach it are enough: their mass exceeds `target` and they number
  // `least`. Call only when all keys together are enough.
  template <class Keys>
  VDIT_DEVICE static Cut search(Keys const& keys, int64_t count, float top, int64_t target, int64_t least) {
    uint32_t key = 0;
    int64_t reach = count, over = 0,
            mass_over = 0;  // `over`: keys above the stretch under search, their mass
    for (int bit = 31; bit >= 0; --bit) {
      uint32_t const candidate = key | 1u << bit;
      int64_t n = 0, mass = 0;
      for (int64_t i = lane_idx(); i < count; i += 32) {
        if (keys(i) < candidate) continue;
        n += 1;
        mass += static_cast<int64_t>(mass_of(keys(i), top));
      }
      n = warp_sum(n), mass = warp_sum(mass);
      if (mass > target && n >= least) {
        key = candidate, reach = n;
      } else {
        over = n, mass_over = mass;
      }
      if (reach - over == 1) return Cut{key, key, 0};  // a single key is left: the one that crosses
    }
    // Equal keys have equal mass m: t of them are enough when mass_over + t m > target and over + t >= least.
    int64_t const m = static_cast<int64_t>(mass_of(key, top));
    int64_t ties = least - over;
    if (mass_over <= target && m > 0) {
      int64_t const crossing = (target - mass_over) / m + 1;
      ties = crossing > ties ? crossing : ties;
    }
    return Cut{uint64_t{key} + 1, key, ties};
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = map_index();
    int64_t const row = static_cast<int64_t>(block_idx_x()) * RowSelect::kWarps + warp_idx();
    if (row >= p.topp.num_q_blocks) return;
    int64_t const b = bh / p.topp.heads, h = bh % p.topp.heads, count = p.topp.num_kv_blocks;
    float const* scores = p.topp.scores + b * p.topp.stride_scores.b + h * p.topp.stride_scores.h +
                          row * p.topp.stride_scores.s;
    int32_t const* weights = p.topp.weights == nullptr
                                 ? nullptr
                                 : p.topp.weights + b * p.topp.stride_weights.b + h * p.topp.stride_weights.h;
    // The order is that of log(weight) + score, which cannot underflow as the mass itself does.
    auto compute = [scores, weights](int64_t i) {
      float const weight = weights == nullptr ? 1.f : static_cast<float>(weights[i]);
      return ordered_key(weight > 0.f ? scores[i] + logf(weight) : -INFINITY);
    };
    uint32_t* cache = p.cached > 0 ? reinterpret_cast<uint32_t*>(smem) + warp_idx() * p.cached : nullptr;
    RowKeys<decltype(compute)> const keys{cache, compute};
    keys.fill(count);

    uint32_t best = 0;
    for (int64_t i = lane_idx(); i < count; i += 32) best = keys(i) > best ? keys(i) : best;
    best = warp_max(best);
    float const top = value_of_key(best);
    int64_t const least = p.topp.min_blocks < 1 ? 1 : p.topp.min_blocks;
    Cut cut{0, 0, 0};  // all
    if (p.topp.p < 1.f && least < count) {
      int64_t total = 0;
      if (best != 0 && top > -INFINITY) {
        for (int64_t i = lane_idx(); i < count; i += 32) total += static_cast<int64_t>(mass_of(keys(i), top));
        total = warp_sum(total);
      }
      double const target = floor(static_cast<double>(p.topp.p) * static_cast<double>(total));
      // A row without any mass (every score -inf or NaN, every weight 0) keeps only what it must.
      cut = total == 0 ? TopkRowsKernel::search(keys, count, least)
                       : search(keys, count, top, static_cast<int64_t>(target), least);
    }
    int64_t const at = bh * p.topp.num_q_blocks + row;
    write_list(keys, count, cut, 0, false, p.topp.kv_num_blocks + at, p.topp.kv_indices + at * count);
  }
};

}  // namespace vdit
