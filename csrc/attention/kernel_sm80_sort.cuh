// label_sort: stable counting sort in three steps. The rows are cut into chunks; each chunk counts its labels
// (LabelCountKernel), the counts are turned into the place where each chunk's first row of each label goes
// (LabelScanKernel), and each chunk, walked in order by one warp, sends its rows there (LabelScatterKernel).
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

struct LabelSortLaunch {
  LabelSortParams sort;
  uint32_t* counts;  // [b * h, chunks, num_labels]: counts, then places
  int64_t chunk_rows, num_chunks;
  bool counters_in_smem;  // else each chunk counts in its own row of `counts`
};

// Labels are trusted to be in range; one that is not is moved to the nearest that is, which keeps the result
// a permutation and the writes in bounds.
VDIT_DEVICE int label_of(LabelSortParams const& p, int64_t bh, int64_t row) {
  return clamp_to<int>(p.labels[bh * p.num_rows + row], 0, p.num_labels - 1);
}

// Grid: x chunks, y batch * heads.
struct LabelCountKernel {
  using Params = LabelSortLaunch;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = map_index(), chunk = block_idx_x();
    int const num_labels = p.sort.num_labels;
    int64_t const first = chunk * p.chunk_rows;
    int64_t const last = first + p.chunk_rows < p.sort.num_rows ? first + p.chunk_rows : p.sort.num_rows;
    uint32_t* mine = p.counts + (bh * p.num_chunks + chunk) * num_labels;
    uint32_t* counters = p.counters_in_smem ? reinterpret_cast<uint32_t*>(smem) : mine;
    for (int l = thread_idx(); l < num_labels; l += kThreads) counters[l] = 0;
    sync_block();
    for (int64_t row = first + thread_idx(); row < last; row += kThreads) {
      atomic_add(counters + label_of(p.sort, bh, row), 1u);
    }
    if (!p.counters_in_smem) return;
    sync_block();
    for (int l = thread_idx(); l < num_labels; l += kThreads) mine[l] = counters[l];
  }
};

// Grid: x batch * heads. A block takes kThreads labels at a time: each thread sums its label over the chunks,
// a scan over the block gives where the label begins, and a second walk turns counts into places.
struct LabelScanKernel {
  using Params = LabelSortLaunch;
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = 1;
  static constexpr int kUnroll = 8;
  static constexpr int kSmemBytes = kThreads / 32 * 4;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = block_idx_x();
    int const num_labels = p.sort.num_labels;
    uint32_t* counts = p.counts + bh * p.num_chunks * num_labels;
    int32_t* offsets = p.sort.offsets + bh * (num_labels + 1);
    uint32_t* warp_sums = reinterpret_cast<uint32_t*>(smem);
    uint32_t begin = 0;  // rows of all labels before this round's
    for (int l0 = 0; l0 < num_labels; l0 += kThreads) {
      int const l = l0 + thread_idx();
      bool const mine = l < num_labels;
      uint32_t total = 0;
      if (mine) {
        for (int64_t chunk = 0; chunk < p.num_chunks; ++chunk) total += counts[chunk * num_labels + l];
      }
      uint32_t const upto = warp_prefix_sum(total);
      if (lane_idx() == 31) warp_sums[warp_idx()] = upto;
      sync_block();
      uint32_t place = begin + upto - total;
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp_idx()) place += warp_sums[w];
        begin += warp_sums[w];
      }
      sync_block();
      if (mine) {
        offsets[l] = static_cast<int32_t>(place);
        write_places(counts + l, num_labels, p.num_chunks, place);
      }
    }
    if (thread_idx() == 0) offsets[num_labels] = static_cast<int32_t>(p.sort.num_rows);
  }

  // Counts of one label become running places. Read in groups: the stores would otherwise hold up each load.
  VDIT_DEVICE static void write_places(uint32_t* at, int64_t stride, int64_t num_chunks, uint32_t place) {
    for (int64_t chunk = 0; chunk < num_chunks; chunk += kUnroll) {
      uint32_t count[kUnroll];
      for (int u = 0; u < kUnroll; ++u) count[u] = chunk + u < num_chunks ? at[(chunk + u) * stride] : 0;
      for (int u = 0; u < kUnroll; ++u) {
        if (chunk + u < num_chunks) at[(chunk + u) * stride] = place;
        place += count[u];
      }
    }
  }
};

// Grid: x chunks, y batch * heads. One warp walks its chunk 32 rows at a time.
struct LabelScatterKernel {
  using Params = LabelSortLaunch;
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;

  // The lanes that hold the same label as this one, by one vote a bit.
  VDIT_DEVICE static uint32_t lanes_with(int label, int bits) {
    uint32_t peers = 0xffffffffu;
    for (int bit = 0; bit < bits; ++bit) {
      bool const mine = (label >> bit & 1) != 0;
      uint32_t const votes = ballot(mine);
      peers &= mine ? votes : ~votes;
    }
    return peers;
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const bh = map_index(), chunk = block_idx_x();
    int const num_labels = p.sort.num_labels;
    int64_t const first = chunk * p.chunk_rows;
    int64_t const last = first + p.chunk_rows < p.sort.num_rows ? first + p.chunk_rows : p.sort.num_rows;
    uint32_t* mine = p.counts + (bh * p.num_chunks + chunk) * num_labels;
    uint32_t* places = p.counters_in_smem ? reinterpret_cast<uint32_t*>(smem) : mine;
    if (p.counters_in_smem) {
      for (int l = lane_idx(); l < num_labels; l += 32) places[l] = mine[l];
    }
    sync_warp();
    int const bits = cute::bit_width(static_cast<uint32_t>(num_labels));  // num_labels marks an idle lane
    int32_t* sorted = p.sort.sorted_idx + bh * p.sort.num_rows;
    for (int64_t row0 = first; row0 < last; row0 += 32) {
      int64_t const row = row0 + lane_idx();
      bool const valid = row < last;
      int const label = valid ? label_of(p.sort, bh, row) : num_labels;
      uint32_t const peers = lanes_with(label, bits);
      int const rank = popcount(peers & lanes_below());
      uint32_t const place = valid ? places[label] : 0;
      sync_warp();
      if (valid && rank == 0) places[label] = place + static_cast<uint32_t>(popcount(peers));
      sync_warp();
      if (valid) sorted[place + rank] = static_cast<int32_t>(row);
    }
  }
};

}  // namespace vdit
