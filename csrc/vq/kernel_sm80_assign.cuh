// The nearest codewords of each vector.
#pragma once
#include "common/device.h"
#include "vdit/vq.h"

namespace vdit {

// A thread takes kVecs vectors and passes all codewords, which come through shared memory a chunk at a time:
// every lane reads the same word. kDim is p.dim rounded up to 2, 4, 8 or 16, kCount p.count to 1, 2 or 8.
template <int kDim, int kCount>
struct VqAssignKernel {
  using Params = VqAssignParams;
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr int kVecs = kDim <= 4 && kCount == 1 ? 4 : kDim * kCount <= 16 ? 2 : 1;
  static constexpr int kRows = kThreads * kVecs;  // vectors of a block
  static constexpr int kChunk = 4096 / kDim;      // codewords in shared memory
  static constexpr int kSmemBytes = kChunk * (kDim + 1) * 4;

  // The nearest so far: scores v . c - |c|^2 / 2 falling, ties by rising index.
  struct Best {
    float score[kCount];
    int32_t index[kCount];

    VDIT_DEVICE void insert(float x, int32_t i) {
      if (!(x > score[kCount - 1])) return;
      CUTE_UNROLL
      for (int j = kCount - 1; j > 0; --j) {
        bool const above = x > score[j - 1], here = x > score[j];
        score[j] = above ? score[j - 1] : (here ? x : score[j]);
        index[j] = above ? index[j - 1] : (here ? i : index[j]);
      }
      if (x > score[0]) score[0] = x, index[0] = i;
    }
  };

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    float* const words = reinterpret_cast<float*>(smem);
    float* const half_norms = words + kChunk * kDim;
    float v[kVecs][kDim];
    Best best[kVecs];
    CUTE_UNROLL
    for (int i = 0; i < kVecs; ++i) load(p, row(i), v[i], best[i]);
    for (int64_t first = 0; first < p.num_codewords; first += kChunk) {
      int const count = static_cast<int>(p.num_codewords - first < kChunk ? p.num_codewords - first : kChunk);
      sync_block();  // everybody has done with the chunk before
      fetch(p, first, count, words, half_norms);
      sync_block();
      for (int c = 0; c < count; ++c) {
        float word[kDim];
        CUTE_UNROLL
        for (int d = 0; d < kDim; ++d) word[d] = words[c * kDim + d];
        CUTE_UNROLL
        for (int i = 0; i < kVecs; ++i) {
          float score = -half_norms[c];
          CUTE_UNROLL
          for (int d = 0; d < kDim; ++d) score = fmaf(v[i][d], word[d], score);
          best[i].insert(score, static_cast<int32_t>(first + c));
        }
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < kVecs; ++i) store(p, row(i), v[i], best[i]);
  }

  VDIT_DEVICE static int64_t row(int i) {
    return static_cast<int64_t>(block_idx_x()) * kRows + i * kThreads + thread_idx();
  }

  VDIT_DEVICE static void load(Params const& p, int64_t row, float (&v)[kDim], Best& best) {
    CUTE_UNROLL
    for (int d = 0; d < kDim; ++d) v[d] = row < p.num_vectors && d < p.dim ? p.vectors[row * p.dim + d] : 0.f;
    CUTE_UNROLL
    for (int j = 0; j < kCount; ++j) best.score[j] = -INFINITY, best.index[j] = j;
  }

  VDIT_DEVICE static void fetch(Params const& p, int64_t first, int count, float* words, float* half_norms) {
    for (int c = thread_idx(); c < count; c += kThreads) {
      float norm = 0.f;
      CUTE_UNROLL
      for (int d = 0; d < kDim; ++d) {
        float const x = d < p.dim ? p.codebook[(first + c) * p.dim + d] : 0.f;
        words[c * kDim + d] = x;
        norm = fmaf(x, x, norm);
      }
      half_norms[c] = 0.5f * norm;
    }
  }

  VDIT_DEVICE static void store(Params const& p, int64_t row, float const (&v)[kDim], Best const& best) {
    if (row >= p.num_vectors) return;
    float norm = 0.f;
    CUTE_UNROLL
    for (int d = 0; d < kDim; ++d) norm = fmaf(v[d], v[d], norm);
    CUTE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j >= p.count) break;
      float const distance = norm - 2.f * best.score[j];
      p.distances[row * p.count + j] = distance < 0.f ? 0.f : distance;  // a NaN stays
      p.indices[row * p.count + j] = best.index[j];
    }
  }
};

}  // namespace vdit
