// What the products of the linear and the vq family share on compute capability 9.0: the
// ring of stages, and the kernel for weights that are multiplied out of registers.
//
// Sums are kept as D = weights x activations^T where weights are decoded in registers: wgmma takes only its
// first operand from there. 64 outputs are then the rows of a product and the tokens its columns.
#pragma once
#include "common/device_sm90.h"
#include "common/epilogue.cuh"
#include "common/tile_order.cuh"
#include "common/tma.h"
#include "vdit/epilogue.h"

namespace vdit::sm90 {

constexpr int kStepBytes = 128;  // of k, a stage: the widest swizzle

// Where in a ring one is: a stage, and how often the ring was gone round, modulo 2.
template <int kSize>
struct StageRing {
  int stage = 0, parity = 0;
  VDIT_DEVICE void advance() {
    if (++stage == kSize) stage = 0, parity ^= 1;
  }
};

// By a warp that is through with a stage.
VDIT_DEVICE void release_stage(Barrier* empty) {
  if (lane_idx() == 0) barrier_arrive(empty);
}

constexpr int kGemmConsumers = 2;  // warpgroups
constexpr int kGemmThreads = 128 * (kGemmConsumers + 1);

// The second consumer starts some stages behind the first one and stays there: while one stores its tile, the
// other has stages left to multiply. Both read the same stages, which consumers with tiles of their own would
// read twice.
class Stagger {
 public:
  VDIT_DEVICE Stagger(int group, bool has_tiles) : leads_(group == 0 && has_tiles) {
    if (group == 1 && has_tiles) named_sync(1, 128 * kGemmConsumers);
  }
  // By the first one, once it has started as many stages as the ring holds without the second one's releases.
  VDIT_DEVICE void pass() {
    if (leads_) named_arrive(1, 128 * kGemmConsumers);
    leads_ = false;
  }

 private:
  bool leads_;
};

// What each kernel's threads do: `prepare` all of them, then produce() one, and consume(group) the consumers.
template <int kStages, class Prepare, class Produce, class Consume>
VDIT_DEVICE void run_gemm(Barrier* full, Barrier* empty, Prepare const& prepare, Produce const& produce,
                          Consume const& consume) {
  if (thread_idx() == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kGemmConsumers * 4);
    }
    fence_barrier_init();
  }
  prepare();
  sync_block();
  // Told by lane 0: the compiler then knows that a warp is of one mind.
  int const group = shfl(thread_idx() / 128, 0);
  if (group == kGemmConsumers) {
    set_max_registers_down<24>();
    if (thread_idx() == kGemmConsumers * 128) produce();
  } else {
    set_max_registers_up<240>();
    consume(group);
  }
}

// Activations of kTokens rows and weight codes of 256 outputs, as `Weights` keeps and decodes them:
//
//   Operand                         what wgmma multiplies: int8_t, or uint8_t for codes from 0 on
//   Params                          tensor maps and tables
//   Fixed                           in shared memory, the same for all tiles
//   kStageBytes                     codes of 256 outputs and 128 bytes of k, a multiple of 128
//   fill(params, fixed)             by all threads of the block, before all else
//   load(params, codes, full, strip, step)
//                                   starts a stage's copies, of the 8 strips of 32 outputs from `strip` on
//   Weights(params, fixed, output0) a lane's state for the warp's 32 outputs
//   Raw                             a lane's codes as they lie in memory
//   fetch(codes, warp, sub, raw)    reads those of 32 bytes of k, of strip `warp` (0 to 7) of a stage, or
//                                   does nothing where `raw` holds them already
//   decode(raw, sub, a)             a[0] outputs 0 to 15 of the strip, a[1] 16 to 31, as wgmma takes them
//   finish<product>(sum)            what a sum of a[product] stands for
//
// A producer thread loads; two consumer warpgroups have 128 outputs each. Warp w of a group takes 32-output
// strip w: its first 16 rows go to one product and the others to a second one, since rows may be given to
// products freely. So one 16-byte read a lane feeds both, and a decoded register serves kTokens columns.
template <class Weights, int kTokens_, int kStages_>
struct RegisterWeightsKernel {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kThreads = kGemmThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kOutputs = 128 * kGemmConsumers;
  static constexpr int kSteps = kStepBytes / 32;  // products along k, a stage
  using Operand = typename Weights::Operand;
  using Sum = detail::WgmmaSum<Operand>;
  static constexpr int kActivationBytes = kTokens * kStepBytes;
  static constexpr int kStageBytes = kActivationBytes + Weights::kStageBytes;
  static_assert(kTokens % 16 == 0 && kTokens <= 256 && Weights::kStageBytes % 128 == 0,
                "As wgmma and TMA want it.");

  struct Params {
    LinearEpilogue epilogue;
    TensorMap x;  // boxes of 128 bytes x kTokens rows
    typename Weights::Params weights;
    TileOrder order;
    int64_t m, n;
    int32_t steps;  // stages a tile
    bool wide;      // epilogue_is_wide
  };

  // A warp's sums on their way from 32 outputs x 16 tokens to rows of outputs. The pitch keeps both the
  // stores (lane 4 g + t to row 2 t, column g) and the 16-byte reads free of bank conflicts.
  static constexpr int kPitch = 36;
  using Staging = Sum[16 * kPitch];

  struct Shared {
    alignas(1024) char x[kStages][kActivationBytes];
    alignas(128) char codes[kStages][Weights::kStageBytes];
    alignas(128) typename Weights::Fixed fixed;
    alignas(16) Staging staging[4 * kGemmConsumers];
    Barrier full[kStages], empty[kStages];
  };
  static constexpr int smem_bytes() { return sizeof(Shared); }
  static_assert(sizeof(Shared) <= 227 * 1024, "The tile must fit the shared memory of an SM.");

  using Place = StageRing<kStages>;
  using Sums = Sum[2][kTokens / 2];
  static constexpr int kParts = kTokens / 16;  // in which they are stored

  // ---- Producer: one thread ------------------------------------------------------------------------------

  VDIT_DEVICE static void produce(Params const& a, Shared& s) {
    Place at;
    for (int32_t i = block_idx_x(); i < a.order.count(); i += grid_dim_x()) {
      auto const tile = a.order.at(i);
      for (int32_t step = 0; step < a.steps; ++step, at.advance()) {
        Barrier* const full = &s.full[at.stage];
        barrier_wait(&s.empty[at.stage], at.parity ^ 1);
        barrier_arrive_expect(full, kStageBytes);
        tma_load(s.x[at.stage], a.x, full, step * (kStepBytes / static_cast<int>(sizeof(Operand))),
                 tile.m * kTokens);
        Weights::load(a.weights, s.codes[at.stage], full, tile.n * (kOutputs / 32), step);
      }
    }
  }

  // ---- Consumers -----------------------------------------------------------------------------------------

  // One stage: codes become operands of one product of 32 bytes of k while the one before runs. `before`
  // gives back the previous stage, once nothing reads it.
  template <class Before>
  VDIT_DEVICE static void multiply_stage(Shared& s, Place const& at, Weights const& weights, int warp,
                                         bool first, Sums& sums, Before const& before) {
    uint64_t const x = wgmma_descriptor(s.x[at.stage], SmemSwizzle::k128, 16, 8 * kStepBytes);
    typename Weights::Raw raw;
    uint32_t a[2][2][4];  // by turns; the two products of a turn
    CUTE_UNROLL
    for (int sub = 0; sub < kSteps; ++sub) {
      Weights::fetch(s.codes[at.stage], warp, sub, raw);
      wgmma_wait<1>();  // what was decoded two turns ago has been multiplied
      if (sub == 1) before();
      auto& mine = a[sub % 2];
      weights.decode(raw, sub, mine);
      wgmma_fence_operand(mine[0]);
      wgmma_fence_operand(mine[1]);
      wgmma_fence();
      wgmma_rs<Operand, kTokens>(sums[0], mine[0], wgmma_advance(x, sub * 32), !first || sub > 0);
      wgmma_rs<Operand, kTokens>(sums[1], mine[1], wgmma_advance(x, sub * 32), !first || sub > 0);
      wgmma_commit();
    }
  }

  // All stages of a tile.
  VDIT_DEVICE static void multiply(Params const& a, Shared& s, Place& at, Weights const& weights, int warp,
                                   Sums& sums, Stagger& stagger) {
    Barrier* previous = nullptr;
    wgmma_fence_operand(sums[0]);
    wgmma_fence_operand(sums[1]);
    for (int32_t step = 0; step < a.steps; ++step, at.advance()) {
      barrier_wait(&s.full[at.stage], at.parity);
      multiply_stage(s, at, weights, warp, step == 0, sums, [&] {
        if (step > 0) release_stage(previous);
      });
      previous = &s.empty[at.stage];
      if (step == kStages - 2 || step == a.steps - 1) stagger.pass();
    }
    wgmma_wait<0>();
    wgmma_fence_operand(sums[0]);
    wgmma_fence_operand(sums[1]);
    release_stage(previous);
  }

  // Sums of 16 tokens, as registers hold them (device_sm90.h), to rows of 32 outputs.
  template <int kPart>
  VDIT_DEVICE static void stage_sums(Sums const& sums, Sum* staging) {
    int const lane = lane_idx();
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      int const tile = i / 8, half = i / 4 % 2, pair = i / 2 % 2;
      int const register_ = (kPart * 2 + tile) * 4 + half * 2 + pair;
      int const at = (tile * 8 + lane % 4 * 2 + pair) * kPitch + half * 8 + lane / 4;
      if (i % 2 == 0) {
        staging[at] = Weights::template finish<0>(sums[0][register_]);
      } else {
        staging[at + 16] = Weights::template finish<1>(sums[1][register_]);
      }
    }
  }

  // NOTE: registers have no index at run time. Choosing among copies of the few instructions that stage them
  // keeps the many behind it from being there once for each part.
  template <int kPart = 0>
  VDIT_DEVICE static void stage_part(int part, Sums const& sums, Sum* staging) {
    if (part == kPart) return stage_sums<kPart>(sums, staging);
    if constexpr (kPart + 1 < kParts) stage_part<kPart + 1>(part, sums, staging);
  }

  // Of this lane's eight outputs: how many there are in row `token`.
  VDIT_DEVICE static int count_of(Params const& a, int64_t token, int64_t n0) {
    return token < a.m ? static_cast<int>(clamp_to(a.n - n0, int64_t{0}, int64_t{8})) : 0;
  }

  // A warp's 32 outputs of all tokens, 16 tokens at a time: a lane has eight outputs of two of them.
  VDIT_DEVICE static void store(Params const& a, int64_t token0, int64_t output0, Sums const& sums,
                                Sum* staging) {
    int64_t const n0 = output0 + lane_idx() % 4 * 8;
    int64_t token = token0 + lane_idx() / 4;
    LinearEpilogue const& e = a.epilogue;
    EpilogueColumns const columns(e, n0, count_of(a, 0, n0), a.wide);
    CUTE_NO_UNROLL
    for (int part = 0; part < kParts; ++part, token += 16) {
      int const count0 = count_of(a, token, n0), count1 = count_of(a, token + 8, n0);
      EpilogueRow const row0(e, token, n0, count0, a.wide), row1(e, token + 8, n0, count1, a.wide);
      sync_warp();  // the last part's rows have been read
      stage_part(part, sums, staging);
      sync_warp();
      Sum const* const mine = staging + lane_idx() / 4 * kPitch + lane_idx() % 4 * 8;
      finish_row(a, columns, row0, token, n0, count0, mine);
      finish_row(a, columns, row1, token + 8, n0, count1, mine + 8 * kPitch);
    }
  }
  VDIT_DEVICE static void finish_row(Params const& a, EpilogueColumns const& columns, EpilogueRow const& row,
                                     int64_t token, int64_t n0, int count, Sum const* staged) {
    Sum values[8];
    memcpy(values, __builtin_assume_aligned(staged, 16), sizeof(values));
    finish_outputs(a.epilogue, columns, row, token, a.n, n0, count, a.wide, values);
  }

  // The residual's rows of a tile come to L2 while it is multiplied.
  VDIT_DEVICE static void prefetch_residual(Params const& a, int64_t token0, int64_t output0) {
    LinearEpilogue const& e = a.epilogue;
    if (e.residual == nullptr || output0 >= a.n) return;
    int64_t const bytes = e.out_dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t token = token0 + lane_idx(); token < token0 + kTokens && token < a.m; token += 32) {
      prefetch_l2(static_cast<char const*>(e.residual) +
                  (epilogue_offset(e, e.stride_residual, token) + output0) * bytes);
    }
  }

  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    int const warp = shfl(thread_idx() / 32, 0);
    Place at;
    Stagger stagger(group, block_idx_x() < a.order.count());
    for (int32_t i = block_idx_x(); i < a.order.count(); i += grid_dim_x()) {
      auto const tile = a.order.at(i);
      int64_t const output0 = static_cast<int64_t>(tile.n) * kOutputs + warp * 32;
      Weights const weights(a.weights, s.fixed, output0);
      prefetch_residual(a, static_cast<int64_t>(tile.m) * kTokens, output0);
      Sums sums;
      multiply(a, s, at, weights, warp, sums, stagger);
      store(a, static_cast<int64_t>(tile.m) * kTokens, output0, sums, s.staging[warp]);
    }
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    run_gemm<kStages>(
        s.full, s.empty, [&] { Weights::fill(a.weights, s.fixed); }, [&] { produce(a, s); },
        [&](int group) { consume(a, s, group); });
  }
};

}  // namespace vdit::sm90
