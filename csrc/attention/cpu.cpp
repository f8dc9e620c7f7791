// CPU entry points of the attention family: work items, thread hand-out, and the ops that need no vector
// code.
//
// The vector bodies are in cpu_body.h, compiled once per instruction set by cpu_<isa>.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention/cpu_kernels.h"
#include "common/cpu/element.h"
#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"

namespace vdit {
namespace {

AttentionCpuKernels const& kernels() {
#if VDIT_CPU_X86
  switch (cpu_isa_level()) {
    case CpuIsa::kAvx512Bf16: return kAttentionAvx512Bf16;
    case CpuIsa::kAvx512Vnni:
    case CpuIsa::kAvx512: return kAttentionAvx512;
    case CpuIsa::kAvx2: return kAttentionAvx2;
    case CpuIsa::kPortable: break;
  }
#endif
  cpu_isa_level();  // so that a bad VDIT_CPU_ISA is reported everywhere
  return kAttentionPortable;
}

// ---- attention ----

struct AttentionItem {
  CpuItem item;
  int64_t keys;
};

int64_t count_keys(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t block) {
  Strides3 const n = p.stride_num_blocks, l = p.stride_indices;
  int64_t const blocks = p.kv_num_blocks[b * n.b + h * n.h + block * n.s];
  if (p.kv_offsets == nullptr) return blocks * p.kv_block_size;
  int32_t const* const offsets = p.kv_offsets + b * p.stride_kv_offsets.b + h * p.stride_kv_offsets.h;
  int32_t const* const list = p.kv_indices + b * l.b + h * l.h + block * l.s;
  int64_t keys = 0;
  for (int64_t i = 0; i < blocks; ++i) keys += offsets[list[i] + 1] - offsets[list[i]];
  return keys;
}

// A query block becomes as few items as kCpuItemRows allows, equal up to 16 rows.
void append_items(BlockSparseAttentionParams const& p, int64_t b, int64_t h, int64_t block,
                  std::vector<AttentionItem>& items) {
  int64_t begin = block * p.q_block_size, end = std::min(begin + p.q_block_size, p.seqlen_q);
  if (p.q_offsets != nullptr) {
    int32_t const* const offsets = p.q_offsets + b * p.stride_q_offsets.b + h * p.stride_q_offsets.h;
    begin = offsets[block];
    end = offsets[block + 1];
  }
  if (end <= begin) return;
  int64_t const units = (end - begin + 15) / 16, pieces = (units * 16 + kCpuItemRows - 1) / kCpuItemRows;
  int64_t const keys = count_keys(p, b, h, block);
  for (int64_t i = 0; i < pieces; ++i) {
    int64_t const row = begin + units * i / pieces * 16, next = begin + units * (i + 1) / pieces * 16;
    int32_t const rows = static_cast<int32_t>(std::min(next, end) - row);
    items.push_back({{b, h, block, row, rows}, keys});
  }
}

}  // namespace

// Head by head, so that the threads share a head's K and V in cache, and within a head the longest item
// first.
void run_block_sparse_attention_cpu(BlockSparseAttentionParams const& p, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  std::vector<AttentionItem> items;
  items.reserve(p.batch * p.heads * p.num_q_blocks);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      auto const first = items.size();
      for (int64_t block = 0; block < p.num_q_blocks; ++block) append_items(p, b, h, block, items);
      std::stable_sort(items.begin() + first, items.end(),
                       [](AttentionItem const& x, AttentionItem const& y) {
                         return x.keys * x.item.rows > y.keys * y.item.rows;
                       });
    }
  }
  for_each_item(parallel, static_cast<int64_t>(items.size()),
                [&](int64_t i) { kernel.attend(p, items[i].item, thread_scratch(kernel.scratch_bytes)); });
}

void run_merge_attention_cpu(MergeAttentionParams const& p, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  constexpr int64_t kRows = 256;
  int64_t const slices = (p.seqlen + kRows - 1) / kRows;
  for_each_item(parallel, p.batch * p.heads * slices, [&](int64_t i) {
    int64_t const head = i / slices, row = i % slices * kRows;
    int32_t const rows = static_cast<int32_t>(std::min(kRows, p.seqlen - row));
    kernel.merge(p, {head / p.heads, head % p.heads, 0, row, rows});
  });
}

void run_permute_rows_cpu(PermuteRowsParams const& p, ParallelFor const& parallel) {
  constexpr int64_t kRows = 256;
  int64_t const slices = (p.num_index + kRows - 1) / kRows;
  size_t const bytes = static_cast<size_t>(p.row_bytes);
  for_each_item(parallel, p.batch * p.heads * slices, [&](int64_t i) {
    int64_t const b = i / slices / p.heads, h = i / slices % p.heads, begin = i % slices * kRows;
    char const* const x = static_cast<char const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h;
    char* const out = static_cast<char*>(p.out) + b * p.stride_out.b + h * p.stride_out.h;
    int32_t const* const index = p.index + b * p.stride_index.b + h * p.stride_index.h;
    for (int64_t row = begin; row < std::min(begin + kRows, p.num_index); ++row) {
      int64_t const from = p.inverse ? row : index[row], to = p.inverse ? index[row] : row;
      std::memcpy(out + to * p.stride_out.s, x + from * p.stride_x.s, bytes);
    }
  });
}

void run_mean_pool_blocks_cpu(MeanPoolBlocksParams const& p, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  for_each_item(parallel, p.batch * p.heads * p.num_blocks, [&](int64_t i) {
    int64_t const head = i / p.num_blocks;
    kernel.mean_pool(p, {head / p.heads, head % p.heads, i % p.num_blocks, 0, 0});
  });
}

void run_segment_mean_cpu(SegmentMeanParams const& p, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  for_each_item(parallel, p.batch * p.heads * p.num_segments, [&](int64_t i) {
    int64_t const head = i / p.num_segments;
    kernel.segment_mean(p, {head / p.heads, head % p.heads, i % p.num_segments, 0, 0});
  });
}

void run_kmeans_assign_cpu(KMeansAssignParams const& p, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  int64_t const slices = (p.num_rows + kCpuItemRows - 1) / kCpuItemRows;
  for_each_item(parallel, p.batch * p.heads * slices, [&](int64_t i) {
    int64_t const head = i / slices, row = i % slices * kCpuItemRows;
    int32_t const rows = static_cast<int32_t>(std::min<int64_t>(kCpuItemRows, p.num_rows - row));
    kernel.assign(p, {head / p.heads, head % p.heads, 0, row, rows}, thread_scratch(kernel.scratch_bytes));
  });
}

void run_label_sort_cpu(LabelSortParams const& p, ParallelFor const& parallel) {
  for_each_item(parallel, p.batch * p.heads, [&](int64_t head) {
    int32_t const* const labels = p.labels + head * p.num_rows;
    int32_t* const sorted = p.sorted_idx + head * p.num_rows;
    int32_t* const offsets = p.offsets + head * (p.num_labels + 1);
    std::fill(offsets, offsets + p.num_labels + 1, 0);
    for (int64_t i = 0; i < p.num_rows; ++i) ++offsets[labels[i] + 1];
    for (int32_t c = 0; c < p.num_labels; ++c) offsets[c + 1] += offsets[c];
    std::vector<int32_t> next(offsets, offsets + p.num_labels);
    for (int64_t i = 0; i < p.num_rows; ++i) sorted[next[labels[i]]++] = static_cast<int32_t>(i);
  });
}

// ---- norm and rotary embedding ----

namespace {

template <class T>
std::vector<float> to_floats(T const* x, int64_t n) {
  std::vector<float> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
  return out;
}

// inverse[b|1, h, index[b|1, h, i]] = i
std::vector<int32_t> invert_index(RmsNormRopeParams const& p, ParallelFor const& parallel) {
  int64_t const maps = (p.stride_index.b != 0 ? p.batch : 1) * p.heads;
  std::vector<int32_t> inverse(maps * p.seqlen);
  for_each_item(parallel, maps, [&](int64_t map) {
    int32_t const* const index =
        p.index + map / p.heads * p.stride_index.b + map % p.heads * p.stride_index.h;
    for (int64_t i = 0; i < p.seqlen; ++i) inverse[map * p.seqlen + index[i]] = static_cast<int32_t>(i);
  });
  return inverse;
}

}  // namespace

void run_rms_norm_rope_cpu(RmsNormRopeParams const& given, ParallelFor const& parallel) {
  AttentionCpuKernels const& kernel = kernels();
  RmsNormRopeParams p = given;
  std::vector<float> weight;
  if (p.weight != nullptr && p.weight_dtype != DType::kFloat32) {
    int64_t const n = p.stride_weight_h == 0 ? p.head_dim : p.heads * p.head_dim;
    weight = p.weight_dtype == DType::kFloat16 ? to_floats(static_cast<Float16 const*>(p.weight), n)
                                               : to_floats(static_cast<BFloat16 const*>(p.weight), n);
    p.weight = weight.data();
    p.weight_dtype = DType::kFloat32;
  }
  std::vector<int32_t> inverse;
  if (p.index != nullptr && p.stride_index.h != 0) inverse = invert_index(p, parallel);
  constexpr int64_t kTokens = 16;
  int64_t const slices = (p.seqlen + kTokens - 1) / kTokens;
  for_each_item(parallel, p.batch * slices, [&](int64_t i) {
    int64_t const row = i % slices * kTokens;
    int32_t const rows = static_cast<int32_t>(std::min(kTokens, p.seqlen - row));
    kernel.norm_rope(p, inverse.empty() ? nullptr : inverse.data(), {i / slices, 0, 0, row, rows});
  });
}

// ---- block selection ----

namespace {

// Unsigned integers that order as scores do: NaN below -inf, and -0 equal to 0.
uint32_t score_key(float score) {
  if (std::isnan(score)) return 0;
  score += 0.f;
  uint32_t u;
  std::memcpy(&u, &score, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The k-th largest key and how many keys equal to it belong to the k largest. 0 < k <= n.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

Threshold kth_largest(std::vector<uint32_t> const& keys, int64_t k) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {  // one byte per pass, from the top
    int64_t histogram[256] = {};
    uint64_t const decided = ~uint64_t{0} << (shift + 8);
    for (uint32_t const key : keys)
      if (((key ^ prefix) & decided) == 0) ++histogram[key >> shift & 255];
    int digit = 255;
    for (; histogram[digit] < k; --digit) k -= histogram[digit];
    prefix |= static_cast<uint32_t>(digit) << shift;
  }
  return {prefix, k};
}

// keep[i] = 1 for the k largest, ties to the lowest i.
void mark_largest(std::vector<uint32_t> const& keys, int64_t k, std::vector<uint8_t>& keep) {
  int64_t const n = static_cast<int64_t>(keys.size());
  std::fill(keep.begin(), keep.end(), static_cast<uint8_t>(k >= n));
  if (k <= 0 || k >= n) return;
  Threshold t = kth_largest(keys, k);
  for (int64_t i = 0; i < n; ++i) keep[i] = keys[i] > t.key || (keys[i] == t.key && t.ties-- > 0);
}

// Kept positions in ascending order, zeros behind them.
void write_list(uint8_t const* keep, int64_t n, int32_t* num_blocks, int32_t* indices) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j)
    if (keep[j]) indices[count++] = static_cast<int32_t>(j);
  *num_blocks = count;
  std::fill(indices + count, indices + n, 0);
}

// Rows [begin, end) of a head, ranked together.
void topk_rows(TopkBlocksParams const& p, int64_t head, int64_t begin, int64_t end) {
  int64_t const n = p.num_kv_blocks;
  if (n == 0) {
    for (int64_t row = begin; row < end; ++row) p.kv_num_blocks[head * p.num_q_blocks + row] = 0;
    return;
  }
  float const* const scores =
      p.scores + head / p.heads * p.stride_scores.b + head % p.heads * p.stride_scores.h;
  std::vector<uint32_t> keys((end - begin) * n);
  std::vector<uint8_t> keep(keys.size());
  for (int64_t row = begin; row < end; ++row)
    std::transform(scores + row * p.stride_scores.s, scores + row * p.stride_scores.s + n,
                   keys.begin() + (row - begin) * n, score_key);
  mark_largest(keys, p.k, keep);
  for (int64_t row = begin; row < end; ++row) {
    int64_t const at = (row - begin) * n, out = head * p.num_q_blocks + row;
    if (p.keep_row_max) keep[std::max_element(keys.begin() + at, keys.begin() + at + n) - keys.begin()] = 1;
    write_list(keep.data() + at, n, p.kv_num_blocks + out, p.kv_indices + out * n);
  }
}

// Blocks that pop from a heap come by falling rank, then by rising index. NaN ranks below every other block.
struct Candidate {
  float rank;
  int32_t index;
  bool operator<(Candidate const& other) const {
    return rank != other.rank ? rank < other.rank : index > other.index;
  }
};

// log of a block's mass, but for the row's common factor: it still tells blocks apart whose mass is too small
// for a float. A NaN score must not reach the heap, whose order it would break.
float block_rank(float score, int32_t weight) {
  if (std::isnan(score)) return -std::numeric_limits<float>::infinity();
  return weight > 0 ? score + std::log(static_cast<float>(weight)) : -std::numeric_limits<float>::infinity();
}

float block_mass(float score, float max, int32_t weight) {
  if (weight <= 0 || std::isnan(score) || score == -std::numeric_limits<float>::infinity()) return 0.f;
  return static_cast<float>(weight) * (score == max ? 1.f : std::exp(score - max));
}

void topp_row(ToppBlocksParams const& p, float const* scores, int32_t const* weights, int32_t* num_blocks,
              int32_t* indices) {
  int64_t const n = p.num_kv_blocks;
  auto const weight = [&](int64_t j) { return weights == nullptr ? 1 : weights[j]; };
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < n; ++j)
    if (weight(j) > 0 && scores[j] > max) max = scores[j];

  std::vector<Candidate> heap(n);
  double total = 0;
  for (int64_t j = 0; j < n; ++j) {
    total += block_mass(scores[j], max, weight(j));
    heap[j] = {block_rank(scores[j], weight(j)), static_cast<int32_t>(j)};
  }
  std::make_heap(heap.begin(), heap.end());

  // Doubles add these fp32 masses nearly exactly, so the cut does not depend on the order of the sum.
  double const enough = p.p * total;
  std::vector<uint8_t> keep(n, static_cast<uint8_t>(p.p >= 1.f));
  double sum = 0;
  for (int64_t kept = 0; p.p < 1.f && kept < n && (kept < p.min_blocks || (sum <= enough && total > 0));
       ++kept) {
    std::pop_heap(heap.begin(), heap.end() - kept);
    Candidate const top = heap[n - 1 - kept];
    keep[top.index] = 1;
    sum += block_mass(scores[top.index], max, weight(top.index));
  }
  write_list(keep.data(), n, num_blocks, indices);
}

}  // namespace

void run_topk_blocks_cpu(TopkBlocksParams const& p, ParallelFor const& parallel) {
  int64_t const heads = p.batch * p.heads, rows = p.num_q_blocks;
  if (p.per_head) return for_each_item(parallel, heads, [&](int64_t head) { topk_rows(p, head, 0, rows); });
  for_each_slice(parallel, heads * rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) topk_rows(p, i / rows, i % rows, i % rows + 1);
  });
}

void run_topp_blocks_cpu(ToppBlocksParams const& p, ParallelFor const& parallel) {
  int64_t const rows = p.num_q_blocks;
  for_each_slice(parallel, p.batch * p.heads * rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t const b = i / rows / p.heads, h = i / rows % p.heads;
      Strides3 const s = p.stride_scores;
      int32_t const* const weights =
          p.weights ? p.weights + b * p.stride_weights.b + h * p.stride_weights.h : nullptr;
      topp_row(p, p.scores + b * s.b + h * s.h + i % rows * s.s, weights, p.kv_num_blocks + i,
               p.kv_indices + i * p.num_kv_blocks);
    }
  });
}

// ---- block mass ----

namespace {

// Calls row_of(i, compute) for the i-th query block over batch and heads; compute(row) writes its masses.
template <class RowOf>
void for_each_mass_row(BlockMassParams const& p, ParallelFor const& parallel, RowOf const& row_of) {
  AttentionCpuKernels const& kernel = kernels();
  int64_t const blocks = p.num_q_blocks;
  for_each_item(parallel, p.batch * p.heads * blocks, [&](int64_t i) {
    int64_t const head = i / blocks;
    row_of(i, [&](float* row) {
      kernel.mass(p, {head / p.heads, head % p.heads, i % blocks, 0, 0}, row, thread_scratch(kernel.scratch_bytes));
    });
  });
}

// The first k of a row: forced blocks in rising order, then by falling mass.
void list_heaviest(float const* row, bool const* forced, int64_t n, int64_t k, int32_t* indices, float* mass) {
  std::vector<int32_t> order(n);
  for (int64_t j = 0; j < n; ++j) order[j] = static_cast<int32_t>(j);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
    bool const first = forced != nullptr && forced[a], second = forced != nullptr && forced[b];
    if (first || second) return first && second ? a < b : first;
    uint32_t const x = score_key(row[a]), y = score_key(row[b]);
    return x != y ? x > y : a < b;
  });
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = order[i];
    mass[i] = row[order[i]];
  }
}

}  // namespace

void run_block_mass_cpu(BlockMassParams const& p, ParallelFor const& parallel) {
  for_each_mass_row(p, parallel, [&](int64_t i, auto const& compute) { compute(p.mass + i * p.num_kv_blocks); });
}

void run_block_mass_topk_cpu(BlockMassTopkParams const& p, ParallelFor const& parallel) {
  int64_t const n = p.row.num_kv_blocks;
  for_each_mass_row(p.row, parallel, [&](int64_t i, auto const& compute) {
    std::vector<float> row(n);
    compute(row.data());
    double total = 0;  // nearly exact over fp32 masses
    for (float const mass : row) total += mass;
    p.total[i] = static_cast<float>(total);
    int64_t const head = i / p.row.num_q_blocks, b = head / p.row.heads, h = head % p.row.heads;
    bool const* const forced = p.forced ? p.forced + b * p.stride_forced.b + h * p.stride_forced.h : nullptr;
    list_heaviest(row.data(), forced, n, p.k_max, p.indices + i * p.k_max, p.mass + i * p.k_max);
  });
}

}  // namespace vdit
