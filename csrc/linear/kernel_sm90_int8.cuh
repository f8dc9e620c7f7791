// The linear of int8 weights on wgmma and TMA, compute capability 9.0: both operands from shared memory.
//
// Tokens are the rows of the products and outputs their columns, so that a thread's sums lie as a row of the output
// does. A producer thread loads stages of 128 channels; each of two consumer warpgroups has kParts x 64 tokens and all
// of the tile's outputs. The second group starts some stages behind the first and stays there: while one stores its
// tile, the other multiplies what the ring still holds.
#pragma once
#include "common/gemm_sm90.cuh"

namespace vdit::sm90 {

template <int kParts_, int kOutputs_, int kStages_>
struct Int8LinearKernel {
  static constexpr int kParts = kParts_, kOutputs = kOutputs_, kStages = kStages_;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kMinBlocks = 1;
  static constexpr int kTokens = 64 * kParts * kConsumers;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kSteps = kStepBytes / 32;  // products along k, a stage
  static constexpr int kActivationBytes = kTokens * kStepBytes;
  static constexpr int kWeightBytes = kOutputs * kStepBytes;
  static_assert(kOutputs % 32 == 0 && kOutputs <= 256 && kTokens <= 256, "Boxes and quads of column tiles.");

  struct Params {
    LinearEpilogue epilogue;
    TensorMap x, weight;  // boxes of 128 bytes x kTokens, kOutputs rows
    TileOrder order;
    int64_t m, n;
    int32_t steps;  // stages a tile
    bool wide;      // epilogue_is_wide
  };

  struct Shared {
    alignas(1024) char x[kStages][kActivationBytes];
    char weight[kStages][kWeightBytes];
    Barrier full[kStages], empty[kStages];
  };
  static constexpr int smem_bytes() { return sizeof(Shared); }
  static_assert(sizeof(Shared) <= 227 * 1024, "The tile must fit the shared memory of an SM.");

  using Place = StageRing<kStages>;
  using Sums = int32_t[kParts][kOutputs / 2];

  // ---- Producer: one thread ------------------------------------------------------------------------------

  VDIT_DEVICE static void produce(Params const& a, Shared& s) {
    Place at;
    for (int32_t i = block_idx_x(); i < a.order.count(); i += grid_dim_x()) {
      auto const tile = a.order.at(i);
      for (int32_t step = 0; step < a.steps; ++step, at.advance()) {
        Barrier* const full = &s.full[at.stage];
        barrier_wait(&s.empty[at.stage], at.parity ^ 1);
        barrier_arrive_expect(full, kActivationBytes + kWeightBytes);
        tma_load(s.x[at.stage], a.x, full, step * kStepBytes, tile.token * kTokens);
        tma_load(s.weight[at.stage], a.weight, full, step * kStepBytes, tile.output * kOutputs);
      }
    }
  }

  // ---- Consumers -----------------------------------------------------------------------------------------

  // The products of a stage, in flight when this returns.
  VDIT_DEVICE static void start_stage(Shared& s, Place const& at, int group, bool first, Sums& sums) {
    char const* rows = s.x[at.stage] + group * (kParts * 64 * kStepBytes);
    uint64_t const x = wgmma_descriptor(rows, SmemSwizzle::k128, 16, 8 * kStepBytes);
    uint64_t const weight = wgmma_descriptor(s.weight[at.stage], SmemSwizzle::k128, 16, 8 * kStepBytes);
    wgmma_fence();
    CUTE_UNROLL
    for (int sub = 0; sub < kSteps; ++sub) {
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        wgmma_ss<int8_t, kOutputs>(sums[part], wgmma_advance(x, part * 64 * kStepBytes + sub * 32),
                                   wgmma_advance(weight, sub * 32), !first || sub > 0);
      }
    }
    wgmma_commit();
  }

  VDIT_DEVICE static void fence_sums(Sums& sums) {
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) wgmma_fence_operand(sums[part]);
  }

  // All stages of a tile. A stage is given back while the products of the next one run. `lead` is called after the
  // last stage that the ring holds without a release by the other group.
  template <class Lead>
  VDIT_DEVICE static void multiply(Params const& a, Shared& s, Place& at, int group, Sums& sums, Lead const& lead) {
    Barrier* previous = nullptr;
    fence_sums(sums);
    for (int32_t step = 0; step < a.steps; ++step, at.advance()) {
      barrier_wait(&s.full[at.stage], at.parity);
      start_stage(s, at, group, step == 0, sums);
      wgmma_wait<1>();
      if (step > 0) release_stage(previous);
      previous = &s.empty[at.stage];
      if (step == kStages - 2 || step == a.steps - 1) lead();
    }
    wgmma_wait<0>();
    fence_sums(sums);
    release_stage(previous);
  }

  // Four tiles of 8 columns, of one row: a lane has two columns of each, and gets all of one.
  VDIT_DEVICE static void gather_columns(int32_t const* sums, int half, int32_t (&row)[8]) {
    CUTE_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      int32_t v[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = sums[i * 4 + half * 2 + pair];
      quad_transpose(v);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) row[i * 2 + pair] = v[i];
    }
  }

  // NOTE: each row reads its columns' scales again (from L1): with 192 sums a thread there are no registers to keep
  // them in.
  VDIT_DEVICE static void store(Params const& a, int64_t token0, int64_t output0, Sums const& sums) {
    CUTE_UNROLL
    for (int j = 0; j < kOutputs / 32; ++j) {
      int64_t const n0 = output0 + j * 32 + lane_idx() % 4 * 8;
      int const count = static_cast<int>(clamp_to(a.n - n0, int64_t{0}, int64_t{8}));
      CUTE_UNROLL
      for (int i = 0; i < kParts * 2; ++i) {
        int32_t row[8];
        gather_columns(&sums[i / 2][j * 16], i % 2, row);
        int64_t const token = token0 + i * 8 + i / 2 * 48;
        if (token >= a.m || count <= 0) continue;
        EpilogueColumns const columns(a.epilogue, n0, count, a.wide);
        store_outputs(a.epilogue, columns, token, a.n, n0, count, a.wide, row);
      }
    }
  }

  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    Place at;
    bool leads = group == 0 && block_idx_x() < a.order.count();
    if (group == 1 && block_idx_x() < a.order.count()) named_sync(1, 128 * kConsumers);
    for (int32_t i = block_idx_x(); i < a.order.count(); i += grid_dim_x()) {
      Sums sums;
      multiply(a, s, at, group, sums, [&] {
        if (leads) named_arrive(1, 128 * kConsumers);
        leads = false;
      });
      auto const tile = a.order.at(i);
      int const thread = not_hoisted(thread_idx());
      int64_t const token0 = static_cast<int64_t>(tile.token) * kTokens + group * (kParts * 64) +
                             thread / 32 % 4 * 16 + thread % 32 / 4;
      store(a, token0, static_cast<int64_t>(tile.output) * kOutputs, sums);
    }
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    if (thread_idx() == 0) {
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
      if (thread_idx() == kConsumers * 128) produce(a, s);
    } else {
      set_max_registers_up<kConsumerRegisters>();
      consume(a, s, group);
    }
  }
};

}  // namespace vdit::sm90
