// kmeans_assign on wgmma and TMA, compute capability 9.0.
//
// Thread blocks stay, one an SM, and take every grid-th tile of kBlockM rows. A producer thread loads the
// tile and then streams all centroids past it, kBlockN a stage. Each of two consumer warpgroups holds two
// parts of 64 rows as register operands, so that the tile's shared memory is free for the next one at once.
//
// While the scores of one part are searched for their maximum, the products of the other part, and those of
// the other warpgroup, keep the tensor cores busy. No n x c matrix exists.
#pragma once
#include "attention/kernel_util.cuh"
#include "common/device_sm90.h"
#include "common/tma.h"
#include "vdit/attention.h"

namespace vdit::sm90 {

// Where each centroid's score starts: -|c|^2 / 2, and -inf for those past the last, which then never win.
// Grid: x tiles of kRows centroids, y heads, z batch.
template <class T>
struct KMeansStartsKernel {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = 16;  // 16 lanes a centroid, 8 columns a lane

  struct Params {
    KMeansAssignParams assign;
    float* starts;  // [b, h, padded]
    int64_t padded;
  };

  VDIT_DEVICE void operator()(Params const& a, char*) const {
    KMeansAssignParams const& p = a.assign;
    int64_t const b = block_idx_z(), h = block_idx_y();
    int64_t const row = static_cast<int64_t>(block_idx_x()) * kRows + thread_idx() / 16;
    int const col = thread_idx() % 16 * 8;
    float sum = 0.f;
    if (row < p.num_centroids && col < p.head_dim) {
      float v[8];
      T const* c = static_cast<T const*>(p.centroids) + b * p.stride_centroids.b + h * p.stride_centroids.h;
      load_floats<T, 8>(c + row * p.stride_centroids.s + col, v);
      for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    }
    for (int step = 8; step > 0; step /= 2) sum += shfl_xor(sum, step);
    if (thread_idx() % 16 == 0 && row < a.padded) {
      a.starts[(b * p.heads + h) * a.padded + row] = row < p.num_centroids ? -0.5f * sum : -INFINITY;
    }
  }
};

// Grid: x any number of blocks.
template <class T, int kHeadDim>
struct KMeansAssignKernel {
  static constexpr int kConsumers = 2;
  static constexpr int kParts = 2;  // of 64 rows, a consumer
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kMinBlocks = 1;
  static constexpr int kBlockM = 64 * kParts * kConsumers;
  static constexpr int kBlockN = 128;
  static constexpr int kStages = 4;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  // Shared memory holds 64 columns side by side (a slab: rows of 128 bytes, the widest swizzle).
  static constexpr int kSlabs = (kHeadDim + 63) / 64;
  static constexpr int kSteps = kHeadDim / 16;  // of the product
  static constexpr int kRowBytes = 128;
  static constexpr int kRowSlab = kBlockM * kRowBytes;
  static constexpr int kCentroidSlab = kBlockN * kRowBytes;
  static constexpr int kStageBytes = kSlabs * kCentroidSlab + kBlockN * 4;

  struct Params {
    KMeansAssignParams assign;
    TensorMap x, centroids;  // boxes of 64 columns x kBlockM, kBlockN rows
    float const* starts;     // [b, h, num_tiles * kBlockN]
    int64_t items_head, num_items;
    int32_t num_tiles;
  };

  struct Shared {
    alignas(1024) char rows[kSlabs * kRowSlab];
    char centroids[kStages][kSlabs * kCentroidSlab];
    float starts[kStages][kBlockN];
    Barrier x_full, x_empty;
    Barrier c_full[kStages], c_empty[kStages];
  };
  static constexpr int smem_bytes() { return sizeof(Shared); }

  struct Item {
    int64_t map;  // batch and head
    int32_t head, batch, row0;

    VDIT_DEVICE Item(Params const& a, int64_t at) : map(at / a.items_head) {
      head = static_cast<int32_t>(map % a.assign.heads);
      batch = static_cast<int32_t>(map / a.assign.heads);
      row0 = static_cast<int32_t>(at % a.items_head * kBlockM);
    }
  };

  // Where in the ring one is: a stage, and how often the ring was gone round, modulo 2.
  struct Place {
    int stage = 0, parity = 0;
    VDIT_DEVICE void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  // ---- Producer: one thread ------------------------------------------------------------------------------

  VDIT_DEVICE static void produce(Params const& a, Shared& s) {
    Place at;
    int parity = 1;
    for (int64_t i = block_idx_x(); i < a.num_items; i += grid_dim_x(), parity ^= 1) {
      Item const item(a, i);
      barrier_wait(&s.x_empty, parity);
      barrier_arrive_expect(&s.x_full, kSlabs * kRowSlab);
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(s.rows + slab * kRowSlab, a.x, &s.x_full, slab * 64, item.row0, item.head, item.batch,
                 CacheHint::kEvictFirst);
      }
      float const* starts = a.starts + item.map * a.num_tiles * kBlockN;
      for (int tile = 0; tile < a.num_tiles; ++tile, at.advance()) {
        Barrier* const full = &s.c_full[at.stage];
        barrier_wait(&s.c_empty[at.stage], at.parity ^ 1);
        barrier_arrive_expect(full, kStageBytes);
        for (int slab = 0; slab < kSlabs; ++slab) {
          tma_load(s.centroids[at.stage] + slab * kCentroidSlab, a.centroids, full, slab * 64, tile * kBlockN,
                   item.head, item.batch);
        }
        bulk_load(s.starts[at.stage], starts + tile * kBlockN, kBlockN * 4, full);
      }
    }
  }

  // ---- Consumers -----------------------------------------------------------------------------------------
  // A thread's scores: rows lane / 4 and 8 below (half), columns 8 n + 2 (lane % 4) and the next (pair), at
  // [n * 4 + half * 2 + pair]. So it has kOwn of a row's kBlockN scores.

  static constexpr int kScores = kBlockN / 2;
  static constexpr int kOwn = kBlockN / 4;

  // The best score of each of a thread's two rows. `place` counts the thread's own scores, from tile to tile.
  struct Best {
    float score[2] = {-INFINITY, -INFINITY};
    int32_t place[2] = {0, 0};
  };

  // 64 rows from shared memory as the first operand.
  VDIT_DEVICE static void load_rows(char const* rows, uint32_t (&x)[kSteps][4]) {
    int const thread = not_hoisted(thread_idx());  // the scores want the registers
    int const row = thread / 32 % 4 * 16 + thread % 16;
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      int const chunk = i % 4 * 2 + thread % 32 / 16;  // of 8 columns, within the slab
      ldmatrix_x4(x[i], rows + i / 4 * kRowSlab + row * kRowBytes + ((chunk ^ (row % 8)) * 16));
    }
  }

  // The products of one part with one stage of centroids, in flight when this returns.
  VDIT_DEVICE static void start_scores(uint32_t (&x)[kSteps][4], char const* centroids,
                                       float (&scores)[kScores]) {
    wgmma_fence_operand(scores);
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) wgmma_fence_operand(x[i]);
    wgmma_fence();
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      char const* columns = centroids + i / 4 * kCentroidSlab + i % 4 * 32;
      wgmma_rs<T, kBlockN>(scores, x[i], wgmma_descriptor(columns, SmemSwizzle::k128, 16, 8 * kRowBytes),
                           i > 0);
    }
    wgmma_commit();
  }

  // Waits for a part's products, behind which kLater others may still be under way.
  template <int kLater>
  VDIT_DEVICE static void finish_scores(float (&scores)[kScores]) {
    wgmma_wait<kLater>();
    wgmma_fence_operand(scores);
  }

  // The maximum of v and where it is, the lowest place among equals; NaN only if all are. On the way up each
  // pair's maximum goes to its right end, so that the left end keeps the left one's: then the way down needs
  // no more than a compare a level and selects. 2 instructions a score, where comparing with a running best
  // takes 3.
  VDIT_DEVICE static float find_max(float (&v)[kOwn], int& place) {
    raise_pairs<1>(v);
    float const top = v[kOwn - 1];
    place = 0;
    descend<kOwn / 2>(v, top, place);
    return top;
  }

  // Recursions, because the compiler leaves loops with doubling steps as they are.
  template <int kStep>
  VDIT_DEVICE static void raise_pairs(float (&v)[kOwn]) {
    CUTE_UNROLL
    for (int i = 0; i < kOwn / 2 / kStep; ++i) {
      constexpr int kPair = 2 * kStep;
      v[i * kPair + kPair - 1] = fmaxf(v[i * kPair + kStep - 1], v[i * kPair + kPair - 1]);
    }
    if constexpr (2 * kStep < kOwn) raise_pairs<2 * kStep>(v);
  }

  template <int kStep>
  VDIT_DEVICE static void descend(float (&v)[kOwn], float top, int& place) {
    bool const right = !(v[kStep - 1] == top);
    place += right ? kStep : 0;
    CUTE_UNROLL
    for (int i = 0; i < kStep - 1; ++i) v[i] = right ? v[i + kStep] : v[i];
    if constexpr (kStep > 1) descend<kStep / 2>(v, top, place);
  }

  // Takes one stage's products into account.
  VDIT_DEVICE static void keep_scores(float const (&scores)[kScores], float const* starts, int tile,
                                      Best& best) {
    float v[2][kOwn];
    CUTE_UNROLL
    for (int n = 0; n < kBlockN / 8; ++n) {
      float2 const start = *reinterpret_cast<float2 const*>(starts + n * 8 + lane_idx() % 4 * 2);
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        v[half][n * 2] = scores[n * 4 + half * 2] + start.x;
        v[half][n * 2 + 1] = scores[n * 4 + half * 2 + 1] + start.y;
      }
    }
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int place;
      float const top = find_max(v[half], place);
      if (top > best.score[half]) best.score[half] = top, best.place[half] = tile * kOwn + place;
    }
  }

  VDIT_DEVICE static void release(Barrier* empty) {
    fence_async_proxy();  // what was read as ordinary memory is written by TMA next
    sync_warp();          // all lanes have read
    if (lane_idx() == 0) barrier_arrive(empty);
  }

  // The four lanes of a quad hold different columns of the same rows.
  VDIT_DEVICE static void store_labels(Best const& best, int32_t* labels, int64_t rows) {
    int const thread = not_hoisted(thread_idx());
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float score = best.score[half];
      int const place = best.place[half], own = place % kOwn;
      int label = place / kOwn * kBlockN + own / 2 * 8 + thread % 4 * 2 + own % 2;
      if (score == -INFINITY) label = 0;  // nothing has won
      CUTE_UNROLL
      for (int step = 1; step < 4; step *= 2) {
        float const other = shfl_xor(score, step);
        int const other_label = shfl_xor(label, step);
        keep_best(score, label, other, other_label);
      }
      int const row = thread / 32 % 4 * 16 + half * 8 + thread % 32 / 4;
      if (thread % 4 == 0 && row < rows) labels[row] = label;
    }
  }

  // The two warpgroups take turns, lest both search at once while no products run: one begins its products
  // when the other has half of its own left.
  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    if (group == 1) named_arrive(1, 256);  // the first turn is group 0's
    KMeansAssignParams const& p = a.assign;
    Place at;
    for (int round = 0;; ++round) {
      int64_t const i = block_idx_x() + static_cast<int64_t>(round) * grid_dim_x();
      if (i >= a.num_items) break;
      uint32_t x0[kSteps][4], x1[kSteps][4];
      float scores0[kScores], scores1[kScores];
      Best best0, best1;
      char const* const rows = s.rows + group * (kParts * 64 * kRowBytes);
      barrier_wait(&s.x_full, round & 1);
      load_rows(rows, x0);
      load_rows(rows + 64 * kRowBytes, x1);
      release(&s.x_empty);

      for (int tile = 0; tile < a.num_tiles; ++tile, at.advance()) {
        barrier_wait(&s.c_full[at.stage], at.parity);
        named_sync(1 + group, 256);
        start_scores(x0, s.centroids[at.stage], scores0);
        start_scores(x1, s.centroids[at.stage], scores1);
        finish_scores<1>(scores0);
        named_arrive(2 - group, 256);
        keep_scores(scores0, s.starts[at.stage], tile, best0);
        finish_scores<0>(scores1);
        keep_scores(scores1, s.starts[at.stage], tile, best1);
        release(&s.c_empty[at.stage]);
      }

      Item const item(a, i);
      int64_t const row0 = item.row0 + group * kParts * 64;
      int32_t* const labels = p.labels + item.map * p.num_rows + row0;
      store_labels(best0, labels, p.num_rows - row0);
      store_labels(best1, labels + 64, p.num_rows - row0 - 64);
    }
    if (group == 0) named_sync(1, 256);
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    if (thread_idx() == 0) {
      barrier_init(&s.x_full, 1);
      barrier_init(&s.x_empty, kConsumers * 4);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&s.c_full[i], 1);
        barrier_init(&s.c_empty[i], kConsumers * 4);
      }
      fence_barrier_init();
    }
    sync_block();
    // Told by lane 0: the compiler then knows that a warp is of one mind.
    int const group = shfl(thread_idx() / 128, 0);
    if (group == kConsumers) {
      set_max_registers_down<kProducerRegisters>();
      if (thread_idx() == kConsumers * 128) produce(a, s);
    } else {
      set_max_registers_up<kConsumerRegisters>();
      consume(a, s, group);
    }
  }
};

}  // namespace vdit::sm90
