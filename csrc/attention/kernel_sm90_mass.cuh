// block_mass and block_mass_topk on wgmma and TMA, compute capability 9.0.
//
// A thread block owns 256 rows, 64 a consumer warpgroup, so that each read of the keys from L2 serves them
// all. One thread of a producer warpgroup fills a ring of stages with the next 128 keys, two chunks of 64, of
// which each belongs to one key block. While one warpgroup's exponentials run, the products of others do.
//
// A strip is what a warpgroup's 64 rows have for every key block; strips lie in shared memory, and a query
// block's masses are the sum of its strips. All sums have a fixed order.
#pragma once
#include "attention/kernel_mass_lists.cuh"
#include "attention/kernel_sm90_scores.cuh"
#include "common/device_sm90.h"
#include "common/tma.h"
#include "vdit/attention.h"

namespace vdit::sm90 {

// Grid: x tiles of 256 query rows, y heads, z batch.
template <class T, int kHeadDim>
struct BlockMassKernel {
  static constexpr int kConsumers = 4;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = 128;
  static constexpr int kChunk = 64;
  static constexpr int kChunks = kBlockN / kChunk;
  static constexpr int kStages = 3;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 112;

  // As in kernel_sm90.cuh: slabs of 64 columns in rows of 128 bytes; columns past head size 96 are zeros.
  static constexpr int kSlabs = (kHeadDim + 63) / 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kQuerySlab = 64 * kRowBytes;  // of one consumer
  static constexpr int kQueryBytes = kSlabs * kQuerySlab;
  static constexpr int kKeySlab = kBlockN * kRowBytes;
  static constexpr int kStageBytes = kSlabs * kKeySlab;

  struct Params {
    BlockMassTopkParams topk;  // total null: only the masses are wanted, in topk.row.mass
    TensorMap q;               // boxes of 64 columns x 64 rows
    TensorMap k;               // boxes of 64 columns x 128 rows
    int32_t groups;            // query blocks a thread block: 4, 2 or 1
  };

  struct Shared {
    alignas(1024) char queries[kConsumers * kQueryBytes];
    char keys[kStages][kStageBytes];
    float partial[2][kConsumers][kChunks][4];  // a warp's sums of a stage
    Barrier q_full;
    Barrier full[kStages], empty[kStages];
  };
  // The strips follow: [kConsumers, num_kv_blocks].
  static int64_t smem_bytes(int64_t num_kv_blocks) {
    return static_cast<int64_t>(sizeof(Shared)) + kConsumers * num_kv_blocks * 4;
  }

  static constexpr int kScores = kBlockN / 2;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLargestExponent = 30.f * kLog2E;

  // Where in the ring one is.
  struct Place {
    int stage = 0, parity = 0;
    VDIT_DEVICE void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  VDIT_DEVICE static int32_t key_count(BlockMassParams const& p) {
    int32_t const all = static_cast<int32_t>(p.seqlen_kv);
    if (p.kv_lengths == nullptr) return all;
    return clamp_to<int32_t>(p.kv_lengths[block_idx_z() * p.stride_kv_lengths], 0, all);
  }

  // One thread: queries, then keys until there are no more.
  VDIT_DEVICE static void produce(Params const& a, Shared& s) {
    int const b = block_idx_z(), h = block_idx_y(), row0 = block_idx_x() * kBlockM;
    barrier_arrive_expect(&s.q_full, kConsumers * kQueryBytes);
    for (int i = 0; i < kConsumers; ++i) {
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(s.queries + i * kQueryBytes + slab * kQuerySlab, a.q, &s.q_full, slab * 64, row0 + i * 64, h,
                 b);
      }
    }
    int32_t const keys = key_count(a.topk.row);
    Place at;
    for (int32_t first = 0; first < keys; first += kBlockN, at.advance()) {
      barrier_wait(&s.empty[at.stage], at.parity ^ 1);
      barrier_arrive_expect(&s.full[at.stage], kStageBytes);
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(s.keys[at.stage] + slab * kKeySlab, a.k, &s.full[at.stage], slab * 64, first, h, b);
      }
    }
  }

  // Scores of one stage, in flight when this returns.
  VDIT_DEVICE static void multiply(char const* queries, char const* keys, float (&s)[kScores]) {
    wgmma_fence_operand(s);
    wgmma_fence();
    multiply_slabs<T, kHeadDim, kBlockN>(queries, keys, s);
    wgmma_commit();
  }

  // -lse of this thread's two rows in units of log 2; +inf where there is no row, or one that has seen no
  // key.
  VDIT_DEVICE static void load_rows(BlockMassParams const& p, float (&neg_lse)[2]) {
    float const* lse = p.lse + block_idx_z() * p.stride_lse.b + block_idx_y() * p.stride_lse.h;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int64_t const row =
          static_cast<int64_t>(block_idx_x()) * kBlockM + warp_idx() * 16 + half * 8 + lane_idx() / 4;
      neg_lse[half] = (row < p.seqlen_q ? -lse[row * p.stride_lse.s] : INFINITY) * kLog2E;
    }
  }

  // Exponentials take as long as the products for D = 128, and twice as long for D = 64: of a chunk's 8 tiles
  // of 8 columns so many have theirs on the FMA lanes, about where those and the exponential unit take the
  // same time.
  static constexpr int kFmaTiles = kHeadDim == 64 ? 2 : 1;

  // The sum over a chunk's keys and this warp's 16 rows. Terms past the last key are left out whatever they
  // are.
  template <bool kWhole>
  VDIT_DEVICE static float sum_chunk(float const (&s)[kScores], int chunk, float const (&neg_lse)[2],
                                     float scale, int keys) {
    float sums[2] = {};
    CUTE_UNROLL
    for (int i = 0; i < kScores / kChunks; ++i) {
      int const half = i / 2 % 2;
      float const exponent = s[chunk * (kScores / kChunks) + i] * scale + neg_lse[half];
      float const clamped = min_or_nan(exponent, kLargestExponent);
      float const term = i / 4 < kFmaTiles ? fma_exp2(clamped) : fast_exp2(clamped);
      bool const counts = kWhole || chunk * kChunk + i / 4 * 8 + lane_idx() % 4 * 2 + i % 2 < keys;
      sums[half] += counts ? term : 0.f;
    }
    return warp_sum((neg_lse[0] == INFINITY ? 0.f : sums[0]) + (neg_lse[1] == INFINITY ? 0.f : sums[1]));
  }

  // A stage's chunks from all warps of a warpgroup into its strip. One thread does it; the warps take turns.
  VDIT_DEVICE static void finish_stage(Params const& a, Shared const& s, int group, int stage, int32_t chunks,
                                       float* strip) {
    if (warp_idx() % 4 != stage % 4 || lane_idx() != 0) return;
    int32_t const chunks_block = a.topk.row.kv_block_size / kChunk;
    CUTE_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      int32_t const chunk = stage * kChunks + i;
      if (chunk >= chunks) return;
      float const(&warps)[4] = s.partial[stage % 2][group][i];
      float const sum = (warps[0] + warps[1]) + (warps[2] + warps[3]);
      float& mass = strip[chunk / chunks_block];
      mass = chunk % chunks_block == 0 ? sum : mass + sum;
    }
  }

  // The strip of this warpgroup's 64 rows.
  VDIT_DEVICE static void sum_strip(Params const& a, Shared& s, int group, float* strip) {
    BlockMassParams const& p = a.topk.row;
    int32_t const keys = key_count(p), chunks = (keys + kChunk - 1) / kChunk;
    int32_t const live = static_cast<int32_t>((int64_t{keys} + p.kv_block_size - 1) / p.kv_block_size);
    float const scale = p.scale * kLog2E;
    float neg_lse[2];
    load_rows(p, neg_lse);
    for (int64_t j = live + thread_idx() % 128; j < p.num_kv_blocks; j += 128) strip[j] = 0.f;

    barrier_wait(&s.q_full, 0);
    float scores[kScores];
    Place at;
    int stage = 0;
    for (int32_t first = 0; first < keys; first += kBlockN, at.advance(), ++stage) {
      barrier_wait(&s.full[at.stage], at.parity);
      multiply(s.queries + group * kQueryBytes, s.keys[at.stage], scores);
      named_sync(1 + group, 128);  // the warps' sums of the stage before are here
      if (stage > 0) finish_stage(a, s, group, stage - 1, chunks, strip);
      wgmma_wait<0>();
      wgmma_fence_operand(scores);
      if (lane_idx() == 0) barrier_arrive(&s.empty[at.stage]);
      CUTE_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        float const sum = keys - first >= kBlockN ? sum_chunk<true>(scores, i, neg_lse, scale, kBlockN)
                                                  : sum_chunk<false>(scores, i, neg_lse, scale, keys - first);
        if (lane_idx() == 0) s.partial[stage % 2][group][i][warp_idx() % 4] = sum;
      }
    }
    named_sync(1 + group, 128);
    if (stage > 0) finish_stage(a, s, group, stage - 1, chunks, strip);
  }

  VDIT_DEVICE static void sync_consumers() { named_sync(1 + kConsumers, kConsumerThreads); }

  // Strips become rows of query blocks, which take the place of the first strips; then they are written or
  // listed.
  VDIT_DEVICE static void finish(Params const& a, Shared& s, float* strips) {
    BlockMassParams const& p = a.topk.row;
    int64_t const first_block = static_cast<int64_t>(block_idx_x()) * a.groups;
    int const groups = static_cast<int>(clamp_to<int64_t>(p.num_q_blocks - first_block, 0, a.groups));
    int const strips_group = kConsumers / a.groups, n = static_cast<int>(p.num_kv_blocks);
    sync_consumers();
    float* out =
        a.topk.total != nullptr ? nullptr : p.mass + (map_index() * p.num_q_blocks + first_block) * n;
    for (int j = thread_idx(); j < n; j += kConsumerThreads) {
      for (int group = 0; group < groups; ++group) {
        float sum = strips[group * strips_group * n + j];
        for (int i = 1; i < strips_group; ++i) sum += strips[(group * strips_group + i) * n + j];
        strips[group * n + j] = sum;
        if (out != nullptr) out[static_cast<int64_t>(group) * n + j] = sum;
      }
    }
    if (out != nullptr) return;
    sync_consumers();
    list_heaviest<kConsumerThreads>(a.topk, first_block, groups, strips,
                                    reinterpret_cast<uint16_t*>(s.queries), [] { sync_consumers(); });
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    float* strips = reinterpret_cast<float*>(smem + sizeof(Shared));
    if (thread_idx() == 0) {
      barrier_init(&s.q_full, 1);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&s.full[i], 1);
        barrier_init(&s.empty[i], kConsumers * 4);
      }
      fence_barrier_init();
    }
    sync_block();
    // Told by lane 0: the compiler then knows that a warp is of one mind.
    int const group = shfl(thread_idx() / 128, 0);
    if (group == kConsumers) {
      set_max_registers_down<kProducerRegisters>();
      if (thread_idx() == kConsumerThreads) produce(a, s);
    } else {
      set_max_registers_up<kConsumerRegisters>();
      sum_strip(a, s, group, strips + group * a.topk.row.num_kv_blocks);
      finish(a, s, strips);
    }
  }
};

}  // namespace vdit::sm90
