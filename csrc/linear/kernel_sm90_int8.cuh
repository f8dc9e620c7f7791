// The linear of int8 weights on wgmma and TMA, compute capability 9.0: both operands from shared memory.
//
// Tokens are the rows of the products and outputs their columns, so that a thread's sums lie as a row of the
// output does. A producer thread loads stages of 128 channels; each of two consumer warpgroups has kParts x
// 64 tokens and all of the tile's outputs.
#pragma once
#include "common/gemm_sm90.cuh"

namespace vdit::sm90 {

template <int kParts_, int kOutputs_, int kStages_>
struct Int8LinearKernel {
  static constexpr int kParts = kParts_, kOutputs = kOutputs_, kStages = kStages_;
  static constexpr int kThreads = kGemmThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kTokens = 64 * kParts * kGemmConsumers;
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
    bool wide;      // epilogue_is_wide; must be
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
        tma_load(s.x[at.stage], a.x, full, step * kStepBytes, tile.m * kTokens);
        tma_load(s.weight[at.stage], a.weight, full, step * kStepBytes, tile.n * kOutputs);
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

  // All stages of a tile. A stage is given back while the products of the next one run.
  VDIT_DEVICE static void multiply(Params const& a, Shared& s, Place& at, int group, Sums& sums,
                                   Stagger& stagger) {
    Barrier* previous = nullptr;
    fence_sums(sums);
    for (int32_t step = 0; step < a.steps; ++step, at.advance()) {
      barrier_wait(&s.full[at.stage], at.parity);
      start_stage(s, at, group, step == 0, sums);
      wgmma_wait<1>();
      if (step > 0) release_stage(previous);
      previous = &s.empty[at.stage];
      if (step == kStages - 2 || step == a.steps - 1) stagger.pass();
    }
    wgmma_wait<0>();
    fence_sums(sums);
    release_stage(previous);
  }

  // ---- Epilogue ------------------------------------------------------------------------------------------
  // In the registers' own layout: a lane has rows lane / 4 and 8 below of each part, and of every 8 columns
  // the two from 2 (lane % 4) on. What goes to memory in two-byte types is first traded within quads, four
  // tiles of 8 columns at a time, so that a lane moves 8 neighbouring columns of a row.

  static constexpr int kRows = 2;                                // of a lane and part
  static constexpr int kColumnTiles = 4;                         // that are traded: 32 columns
  static constexpr int kGroups = kOutputs / (8 * kColumnTiles);  // of columns
  using Group = int32_t[kColumnTiles * 4];                       // a lane's sums of a part's 32 columns

  // NOTE: registers have no index at run time. Choosing among copies of a few moves keeps the many
  // instructions behind them from being there once for each group.
  template <int kAt = 0>
  VDIT_DEVICE static void pick_group(int at, Sums const& sums, Group& group) {
    if (at == kAt) {
      CUTE_UNROLL
      for (int i = 0; i < kColumnTiles * 4; ++i) {
        group[i] = not_hoisted(sums[kAt / kGroups][kAt % kGroups * kColumnTiles * 4 + i]);
      }
      return;
    }
    if constexpr (kAt + 1 < kParts * kGroups) pick_group<kAt + 1>(at, sums, group);
  }

  // What a lane's rows of a part bring to all columns.
  struct Rows {
    int32_t first, end;  // tokens; the rows are 8 apart
    float x_scale[kRows], x_sum[kRows];

    VDIT_DEVICE Rows(Params const& a, int32_t token) : first(token), end(static_cast<int32_t>(a.m)) {
      LinearEpilogue const& e = a.epilogue;
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        x_scale[i] = there(i) && e.x_scale != nullptr ? e.x_scale[this->token(i)] : 1.f;
        x_sum[i] = there(i) && e.x_sum != nullptr ? static_cast<float>(e.x_sum[this->token(i)]) : 0.f;
      }
    }
    VDIT_DEVICE int64_t token(int i) const { return first + i * 8; }
    VDIT_DEVICE bool there(int i) const { return first + i * 8 < end; }
  };

  VDIT_DEVICE static float2 load_pair(float const* p, int64_t n, float without) {
    return p == nullptr ? float2{without, without} : *reinterpret_cast<float2 const*>(p + n);
  }

  // Two columns of a gate or a residual.
  VDIT_DEVICE static float2 load_pair(void const* base, DType dtype, int64_t at) {
    if (dtype == DType::kFloat32)
      return *reinterpret_cast<float2 const*>(static_cast<float const*>(base) + at);
    return unpack_pair(*reinterpret_cast<uint32_t const*>(static_cast<uint16_t const*>(base) + at), dtype);
  }
  VDIT_DEVICE static float2 unpack_pair(uint32_t pair, DType dtype) {
    return dtype == DType::kFloat16 ? unpack2<cute::half_t>(pair) : unpack2<cute::bfloat16_t>(pair);
  }
  VDIT_DEVICE static uint32_t pack_pair(float2 v, DType dtype) {
    return dtype == DType::kFloat16 ? pack2<cute::half_t>(v.x, v.y) : pack2<cute::bfloat16_t>(v.x, v.y);
  }

  // As finish_outputs (common/epilogue.cuh) rounds, so that every kernel gives the same bits.
  VDIT_DEVICE static float finish(int32_t sum, float zero, float x_sum, float scale, float bias) {
    return add_rn(mul_rn(fmaf(zero, x_sum, static_cast<float>(sum)), scale), bias);
  }

  // Two columns of a row, without the residual.
  VDIT_DEVICE static float2 finish_pair(LinearEpilogue const& e, Rows const& rows, int i, int64_t n,
                                        float2 scale, float2 zero, float2 bias, int32_t sum0, int32_t sum1) {
    float2 y;
    y.x = finish(sum0, zero.x, rows.x_sum[i], rows.x_scale[i] * scale.x, bias.x);
    y.y = finish(sum1, zero.y, rows.x_sum[i], rows.x_scale[i] * scale.y, bias.y);
    if (e.gate != nullptr && rows.there(i)) {
      float2 const gate =
          load_pair(e.gate, e.gate_dtype, epilogue_offset(e, e.stride_gate, rows.token(i)) + n);
      y.x = mul_rn(y.x, gate.x), y.y = mul_rn(y.y, gate.y);
    }
    return y;
  }

  // 32 columns of the rows in a two-byte type.
  VDIT_DEVICE static void store_halves(Params const& a, Rows const& rows, int64_t n0, Group const& sums) {
    LinearEpilogue const& e = a.epilogue;
    int64_t const own = n0 + lane_idx() % 4 * 8;  // the columns that this lane moves
    uint32_t out[kRows][kColumnTiles] = {};       // first the residual's, two columns a word
    if (e.residual != nullptr) {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (!rows.there(i) || own >= a.n) continue;
        int64_t const at = epilogue_offset(e, e.stride_residual, rows.token(i)) + own;
        uint4 const v = *reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(e.residual) + at);
        out[i][0] = v.x, out[i][1] = v.y, out[i][2] = v.z, out[i][3] = v.w;
      }
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) quad_transpose(out[i]);
    }
    CUTE_UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      int64_t const n = n0 + tile * 8 + lane_idx() % 4 * 2;
      if (n0 + tile * 8 >= a.n) continue;
      float2 const scale = load_pair(e.weight_scale, n, 1.f), zero = load_pair(e.weight_zero, n, 0.f),
                   bias = load_pair(e.bias, n, 0.f);
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        int32_t const* const pair = &sums[tile * 4 + i * 2];
        float2 y = finish_pair(e, rows, i, n, scale, zero, bias, pair[0], pair[1]);
        if (e.residual != nullptr) {
          float2 const residual = unpack_pair(out[i][tile], e.out_dtype);
          y.x = add_rn(y.x, residual.x), y.y = add_rn(y.y, residual.y);
        }
        out[i][tile] = pack_pair(y, e.out_dtype);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      quad_transpose(out[i]);
      if (!rows.there(i) || own >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(e.out) + rows.token(i) * a.n + own) =
          uint4{out[i][0], out[i][1], out[i][2], out[i][3]};
    }
  }

  // The same in fp32, or the sums themselves: a quad's pairs are whole sectors of 32 bytes.
  VDIT_DEVICE static void store_words(Params const& a, Rows const& rows, int64_t n0, Group const& sums) {
    LinearEpilogue const& e = a.epilogue;
    CUTE_UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      int64_t const n = n0 + tile * 8 + lane_idx() % 4 * 2;
      if (n0 + tile * 8 >= a.n) continue;
      float2 const scale = load_pair(e.weight_scale, n, 1.f), zero = load_pair(e.weight_zero, n, 0.f),
                   bias = load_pair(e.bias, n, 0.f);
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (!rows.there(i)) continue;
        int32_t const* const pair = &sums[tile * 4 + i * 2];
        int64_t const at = rows.token(i) * a.n + n;
        if (e.raw_sums) {
          *reinterpret_cast<int2*>(static_cast<int32_t*>(e.out) + at) = int2{pair[0], pair[1]};
          continue;
        }
        float2 y = finish_pair(e, rows, i, n, scale, zero, bias, pair[0], pair[1]);
        if (e.residual != nullptr) {
          float2 const residual = load_pair(e.residual, DType::kFloat32,
                                            epilogue_offset(e, e.stride_residual, rows.token(i)) + n);
          y.x = add_rn(y.x, residual.x), y.y = add_rn(y.y, residual.y);
        }
        *reinterpret_cast<float2*>(static_cast<float*>(e.out) + at) = y;
      }
    }
  }

  VDIT_DEVICE static void store(Params const& a, int64_t token0, int64_t output0, Sums const& sums) {
    bool const words = a.epilogue.raw_sums || a.epilogue.out_dtype == DType::kFloat32;
    CUTE_NO_UNROLL
    for (int at = 0; at < kParts * kGroups; ++at) {
      Group group;
      pick_group(at, sums, group);
      Rows const rows(a, static_cast<int32_t>(token0) + at / kGroups * 64);
      int64_t const n0 = output0 + at % kGroups * (8 * kColumnTiles);
      if (words) {
        store_words(a, rows, n0, group);
      } else {
        store_halves(a, rows, n0, group);
      }
    }
  }

  // The residual's rows of a tile come to L2 while it is multiplied: a thread a token.
  VDIT_DEVICE static void prefetch_residual(Params const& a, int64_t token0, int64_t output0) {
    LinearEpilogue const& e = a.epilogue;
    if (e.residual == nullptr) return;
    int64_t const bytes = e.out_dtype == DType::kFloat32 ? 4 : 2;
    int64_t const token = token0 + thread_idx() % (64 * kParts);
    if (token >= a.m) return;
    char const* const row =
        static_cast<char const*>(e.residual) + epilogue_offset(e, e.stride_residual, token) * bytes;
    int64_t const end = (output0 + kOutputs < a.n ? output0 + kOutputs : a.n) * bytes;
    for (int64_t at = output0 * bytes; at < end; at += 128) prefetch_l2(row + at);
  }

  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    Place at;
    Stagger stagger(group, block_idx_x() < a.order.count());
    for (int32_t i = block_idx_x(); i < a.order.count(); i += grid_dim_x()) {
      auto const tile = a.order.at(i);
      int64_t const token0 = static_cast<int64_t>(tile.m) * kTokens + group * (kParts * 64);
      int64_t const output0 = static_cast<int64_t>(tile.n) * kOutputs;
      prefetch_residual(a, token0, output0);
      Sums sums;
      multiply(a, s, at, group, sums, stagger);
      int const thread = not_hoisted(thread_idx());
      store(a, token0 + thread / 32 % 4 * 16 + thread % 32 / 4, output0, sums);
    }
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    run_gemm<kStages>(
        s.full, s.empty, [] {}, [&] { produce(a, s); }, [&](int group) { consume(a, s, group); });
  }
};

}  // namespace vdit::sm90
