// Kernels that move or average whole rows: merge_attention, permute_rows, mean_pool_blocks, segment_mean.
// All are bound by memory: 16 bytes a thread and several rows in flight is what matters.
#pragma once
#include "attention/kernel_util.cuh"
#include "vdit/attention.h"

namespace vdit {

// out = w1 out1 + w2 out2 with w = exp(lse_part - lse).
// Grid: x tiles of kRows rows, y heads, z batch.
template <class T, int kVec>
struct MergeAttentionKernel {
  using Params = MergeAttentionParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = 64;  // rows a block

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const first = static_cast<int64_t>(block_idx_x()) * kRows;
    int64_t const last = first + kRows < p.seqlen ? first + kRows : p.seqlen;
    RowLanes const at(p.head_dim / kVec, kThreads);
    if (!at.active()) return;
    T const* out1 = static_cast<T const*>(p.out1) + b * p.stride_out1.b + h * p.stride_out1.h;
    T const* out2 = static_cast<T const*>(p.out2) + b * p.stride_out2.b + h * p.stride_out2.h;
    T* out = static_cast<T*>(p.out) + b * p.stride_out.b + h * p.stride_out.h;
    float const* lse1 = p.lse1 + b * p.stride_lse1.b + h * p.stride_lse1.h;
    float const* lse2 = p.lse2 + b * p.stride_lse2.b + h * p.stride_lse2.h;
    float* lse = p.lse + b * p.stride_lse.b + h * p.stride_lse.h;

    for (int64_t row = first + at.group; row < last; row += at.groups) {
      float const l1 = lse1[row * p.stride_lse1.s], l2 = lse2[row * p.stride_lse2.s];
      float const top = l1 > l2 ? l1 : l2;
      float const safe = top == -INFINITY ? 0.f : top;  // both parts empty: weights 0, not NaN
      float const e1 = expf(l1 - safe), e2 = expf(l2 - safe);
      float const sum = e1 + e2;
      float const scale = sum == 0.f ? 0.f : 1.f / sum;
      for (int col = at.lane * kVec; col < p.head_dim; col += at.lanes * kVec) {
        float a[kVec], c[kVec];
        load_floats<T, kVec>(out1 + row * p.stride_out1.s + col, a);
        load_floats<T, kVec>(out2 + row * p.stride_out2.s + col, c);
        for (int i = 0; i < kVec; ++i) {
          // A part of weight 0 has seen nothing: whatever stands in its row must not leak.
          a[i] = (e1 == 0.f ? 0.f : a[i] * (e1 * scale)) + (e2 == 0.f ? 0.f : c[i] * (e2 * scale));
        }
        store_floats<T, kVec>(out + row * p.stride_out.s + col, a);
      }
      if (at.lane == 0) lse[row * p.stride_lse.s] = sum == 0.f ? -INFINITY : safe + logf(sum);
    }
  }
};

// Moves rows of bytes, Word at a time. A gathered index out of range gives 0xff bytes, which is NaN in every
// float format; a scattered one is dropped. (CUDA cannot raise without waiting for the device.)
// Grid: x tiles of kRows rows, y heads, z batch.
template <class Word>
struct PermuteRowsKernel {
  using Params = PermuteRowsParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = 64;   // rows a block
  static constexpr int kUnroll = 4;  // rows a thread keeps in flight

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const first = static_cast<int64_t>(block_idx_x()) * kRows;
    int64_t const last = first + kRows < p.num_index ? first + kRows : p.num_index;
    int64_t const words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
    RowLanes const at(words, kThreads);
    if (!at.active()) return;
    char const* x = static_cast<char const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h;
    char* out = static_cast<char*>(p.out) + b * p.stride_out.b + h * p.stride_out.h;
    int32_t const* index = p.index + b * p.stride_index.b + h * p.stride_index.h;

    for (int64_t row0 = first + at.group; row0 < last; row0 += kUnroll * at.groups) {
      int64_t source[kUnroll], target[kUnroll];  // -1: nothing to read, nothing to write
      for (int u = 0; u < kUnroll; ++u) {
        int64_t const i = row0 + static_cast<int64_t>(u) * at.groups;
        int64_t const j = i < last ? index[i] : -1;
        source[u] = i < last && !p.inverse ? (j >= 0 && j < p.rows_in ? j : -1) : (i < last ? i : -1);
        target[u] = i < last && p.inverse ? (j >= 0 && j < p.rows_out ? j : -1) : (i < last ? i : -1);
      }
      for (int64_t w = at.lane; w < words; w += at.lanes) {
        Word v[kUnroll];
        memset(v, 0xff, sizeof(v));
        for (int u = 0; u < kUnroll; ++u) {
          if (source[u] >= 0) v[u] = reinterpret_cast<Word const*>(x + source[u] * p.stride_x.s)[w];
        }
        for (int u = 0; u < kUnroll; ++u) {
          if (target[u] >= 0) reinterpret_cast<Word*>(out + target[u] * p.stride_out.s)[w] = v[u];
        }
      }
    }
  }
};

// The mean of a list of rows, by one block: each group of threads sums every groups-th row, then the groups'
// sums are added in order. The order is fixed, so equal inputs give equal bits.
template <class T, int kVec>
struct RowMean {
  static constexpr int kThreads = 256;
  static constexpr int kUnroll = 4;
  static constexpr int kSmemBytes = kThreads * kVec * static_cast<int>(sizeof(float));

  // `row(i)` is the address of the i-th row or null; `store(col, mean)` takes kVec columns.
  template <class Row, class Store>
  VDIT_DEVICE static void run(int64_t count, int head_dim, char* smem, Row const& row, Store const& store) {
    float* partial = reinterpret_cast<float*>(smem);  // [groups, lanes, kVec]
    RowLanes const at(head_dim / kVec, kThreads);
    float const scale = 1.f / static_cast<float>(count);
    for (int col0 = 0; col0 < head_dim; col0 += at.lanes * kVec) {
      int const col = col0 + at.lane * kVec;
      bool const mine = at.active() && col < head_dim;
      float sum[kVec] = {};
      if (mine) sum_rows(count, at, col, row, sum);
      for (int i = 0; i < kVec; ++i) partial[thread_idx() * kVec + i] = sum[i];
      sync_block();
      if (mine && at.group == 0) {
        for (int g = 1; g < at.groups; ++g) {
          for (int i = 0; i < kVec; ++i) sum[i] += partial[(g * at.lanes + at.lane) * kVec + i];
        }
        for (int i = 0; i < kVec; ++i) sum[i] *= scale;
        store(col, sum);
      }
      sync_block();
    }
  }

  template <class Row>
  VDIT_DEVICE static void sum_rows(int64_t count, RowLanes const& at, int col, Row const& row,
                                   float (&sum)[kVec]) {
    for (int64_t i0 = at.group; i0 < count; i0 += kUnroll * at.groups) {
      float v[kUnroll][kVec];
      for (int u = 0; u < kUnroll; ++u) {
        int64_t const i = i0 + static_cast<int64_t>(u) * at.groups;
        T const* source = i < count ? row(i) : nullptr;
        if (source != nullptr) {
          load_floats<T, kVec>(source + col, v[u]);
        } else {
          for (int j = 0; j < kVec; ++j) v[u][j] = 0.f;
        }
      }
      for (int u = 0; u < kUnroll; ++u) {
        for (int j = 0; j < kVec; ++j) sum[j] += v[u][j];
      }
    }
  }
};

// Grid: x blocks of the sequence, y heads, z batch.
template <class T, int kVec>
struct MeanPoolBlocksKernel {
  using Params = MeanPoolBlocksParams;
  using Mean = RowMean<T, kVec>;
  static constexpr int kThreads = Mean::kThreads;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const b = block_idx_z(), h = block_idx_y(), n = block_idx_x();
    int32_t const* offsets = p.offsets;
    if (offsets != nullptr) offsets += b * p.stride_offsets.b + h * p.stride_offsets.h;
    RowSpan const span = block_span(offsets, n, p.block_size, p.seqlen);
    float* out = p.out + ((b * p.heads + h) * p.num_blocks + n) * p.head_dim;
    if (span.rows == 0) {
      for (int col = thread_idx(); col < p.head_dim; col += kThreads) out[col] = 0.f;
      return;
    }
    T const* x = static_cast<T const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h + span.begin * p.stride_x.s;
    Mean::run(
        span.rows, p.head_dim, smem, [&](int64_t i) { return x + i * p.stride_x.s; },
        [&](int col, float const(&mean)[kVec]) {
          for (int i = 0; i < kVec; ++i) out[col + i] = mean[i];
        });
  }
};

// Grid: x segments, y heads, z batch.
template <class T, int kVec>
struct SegmentMeanKernel {
  using Params = SegmentMeanParams;
  using Mean = RowMean<T, kVec>;
  static constexpr int kThreads = Mean::kThreads;
  static constexpr int kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    int64_t const b = block_idx_z(), h = block_idx_y(), c = block_idx_x();
    int64_t const bh = b * p.heads + h;
    int32_t const* offsets = p.offsets + bh * (p.num_segments + 1);
    int64_t const begin = clamp_to<int64_t>(offsets[c], 0, p.num_rows);
    int64_t const end = clamp_to<int64_t>(offsets[c + 1], 0, p.num_rows);
    T* out = static_cast<T*>(p.out) + (bh * p.num_segments + c) * p.head_dim;
    T const* x = static_cast<T const*>(p.x) + b * p.stride_x.b + h * p.stride_x.h;
    int32_t const* list = p.sorted_idx + bh * p.num_rows + begin;
    auto row = [&](int64_t i) -> T const* {
      int64_t const r = list[i];
      return r >= 0 && r < p.num_rows ? x + r * p.stride_x.s : nullptr;
    };
    bool fall_back = begin >= end;
    if (!fall_back) {
      Mean::run(end - begin, p.head_dim, smem, row, [&](int col, float const(&mean)[kVec]) {
        store_floats<T, kVec>(out + col, mean);
        for (int i = 0; i < kVec; ++i) fall_back |= !is_finite(static_cast<float>(static_cast<T>(mean[i])));
      });
    }
    if (sync_block_or(fall_back)) {
      T const* fallback = static_cast<T const*>(p.fallback) + b * p.stride_fallback.b +
                          h * p.stride_fallback.h + c * p.stride_fallback.s;
      for (int col = thread_idx(); col < p.head_dim; col += kThreads) out[col] = fallback[col];
    }
  }

  VDIT_DEVICE static bool is_finite(float x) { return fabsf(x) < INFINITY; }  // NaN is not
};

}  // namespace vdit
