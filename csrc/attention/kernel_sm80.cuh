// block_sparse_attention on mma.sync, compute capability 8.0 and up.
//
// A thread block owns up to kBlockM rows of one query block and walks that block's key list. The listed key
// blocks are read as one stream of rows (RowStream): a step takes the stream's next kBlockN rows wherever
// block borders fall, so small and ragged blocks fill the tensor cores as large ones do, and only the last
// step of a list is masked. Each row is fetched by its own cp.async address into swizzled shared memory, keys
// and values of the next step while this one is computed.
//
// Four warps split the query rows; scores, probabilities and outputs stay in registers (fp32, probabilities
// rounded to T for the second product).
#pragma once
#include "attention/kernel_list.cuh"
#include "attention/tile.h"
#include "vdit/attention.h"

namespace vdit {

// The rows of one query tile.
struct QueryTile {
  int64_t block = 0;  // num_q_blocks: rows past the last offset, which no block covers and which see nothing
  int32_t row0 = 0;   // offsets are 32-bit, so rows are
  int32_t rows = 0;   // 0: nothing to do
};

// Tile -> rows. With offsets, block i is given the tiles from offsets[i] / kBlockM + i on. That leaves it
// offsets[i+1] / kBlockM - offsets[i] / kBlockM + 1 of them, never fewer than it needs, so that a binary
// search over the offsets replaces a prefix sum over the blocks; a tile that is not needed ends at once.
template <int kBlockM>
VDIT_DEVICE QueryTile find_query_tile(BlockSparseAttentionParams const& p, int64_t tile, int64_t b,
                                      int64_t h) {
  QueryTile at;
  int64_t row0, end;
  if (p.q_offsets == nullptr) {
    int64_t const tiles = (p.q_block_size + kBlockM - 1) / kBlockM;
    at.block = tile / tiles;
    row0 = at.block * p.q_block_size + tile % tiles * kBlockM;
    end = (at.block + 1) * p.q_block_size;
    end = end < p.seqlen_q ? end : p.seqlen_q;
  } else {
    int32_t const* offsets = p.q_offsets + b * p.stride_q_offsets.b + h * p.stride_q_offsets.h;
    auto offset = [&](int64_t i) { return clamp_to<int64_t>(offsets[i], 0, p.seqlen_q); };
    int64_t low = 0, high = p.num_q_blocks;  // the last i whose first tile is at most `tile`
    while (low < high) {
      int64_t const middle = (low + high + 1) / 2;
      if (offset(middle) / kBlockM + middle <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    at.block = low;
    row0 = offset(low) + (tile - offset(low) / kBlockM - low) * kBlockM;
    end = low < p.num_q_blocks ? offset(low + 1) : p.seqlen_q;
  }
  int64_t const left = end - row0;
  if (row0 < 0 || left <= 0) return at;
  at.row0 = static_cast<int32_t>(row0);
  at.rows = static_cast<int32_t>(left < kBlockM ? left : kBlockM);
  return at;
}

// The listed key blocks as one stream of rows, for one warp; every warp of the block keeps the same one.
// 32 list entries are held at a time, one a lane. Positions count from the first row of the next step.
// Little is kept: what only hold_entries() needs is computed again there, for the outputs want the registers.
struct RowStream {
  BlockSparseAttentionParams const& p;
  int32_t q_block;
  int32_t length, next = 0;  // entries of the list, and the first that is not held yet
  int32_t end = 0;           // this lane's entry covers positions up to here
  int32_t shift = 0;         // source row - position, for this lane's entry
  int32_t held = 0;          // positions below this are covered
  bool bad = false;          // this lane has met an index that names no block, or a length that no list has

  VDIT_DEVICE RowStream(BlockSparseAttentionParams const& params, int64_t block)
      : p(params), q_block(static_cast<int32_t>(block)) {
    length = list_length(p, block_idx_z(), block_idx_y(), block, bad);
  }

  // Holds the 32 entries from `next` on, one a lane.
  VDIT_DEVICE void hold_entries() {
    int32_t const at = next + lane_idx();
    RowSpan span;
    if (at < length) span = listed_rows(p, block_idx_z(), block_idx_y(), q_block, at, bad);
    end = held + warp_prefix_sum(span.rows);
    shift = span.begin - (end - span.rows);
    held = shfl(end, 31);
    next += 32;
  }

  // Takes the next kRows rows. Returns how many there are (fewer only at the end), and for this lane's
  // `position` in [0, kRows) the source row, or -1 past the end.
  template <int kRows>
  VDIT_DEVICE int take(int position, int32_t& source) {
    source = -1;
    while (true) {
      int entry = 0;  // how many held entries end at or before the position
      CUTE_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        if (shfl(end, entry + step - 1) <= position) entry += step;
      }
      int32_t const row = position + shfl(shift, entry);
      if (source < 0 && position < held) source = row;
      if (held >= kRows || next >= length) break;
      hold_entries();
    }
    int const rows = clamp_to<int>(held, 0, kRows);
    end -= kRows, held -= kRows, shift += kRows;
    return rows;
  }
};

// Grid: x query tiles (max_query_tiles), y heads, z batch.
template <class T, int kHeadDim, int kBlockMRows>
struct BlockSparseAttentionKernel {
  using Params = BlockSparseAttentionParams;
  static constexpr AttentionTile kTile = attention_tile(kHeadDim, kBlockMRows);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kMinBlocks = kTile.blocks_sm;
  static_assert(kTile.warps == 4 && kBlockM % 64 == 0,
                "The tiled mma below is of 4 warps with 16 rows each.");

  static constexpr int kWarpRowsN = kBlockN / 4;                // key rows of a step that one warp fetches
  static constexpr int kChunks = kHeadDim / 8;                  // of 16 bytes, a row
  static constexpr int kLanesRow = kHeadDim % 64 == 0 ? 8 : 4;  // lanes that fetch a row together
  static constexpr int kPasses = kWarpRowsN * kLanesRow / 32;
  static_assert(kPasses * 32 == kWarpRowsN * kLanesRow && kChunks % kLanesRow == 0, "Whole warps fetch.");

  using SmemQ = typename SwizzledRows<kHeadDim>::template Tile<kBlockM>;
  using SmemK = typename SwizzledRows<kHeadDim>::template Tile<kBlockN>;
  // The same bytes seen as [head_dim, keys]: the second product's B operand.
  using TransposedShape = cute::Shape<cute::Int<kHeadDim>, cute::Int<kBlockN>>;
  using SmemVt = decltype(cute::composition(
      SmemK{}, cute::Layout<TransposedShape, cute::Stride<cute::Int<kBlockN>, cute::_1>>{}));
  using TiledMma = decltype(cute::make_tiled_mma(MmaAtom_m16n8k16<T>{},
                                                 cute::Layout<cute::Shape<cute::_4, cute::_1, cute::_1>>{},
                                                 cute::Tile<cute::_64, cute::_16, cute::_16>{}));

  static constexpr int kQElements = kBlockM * kHeadDim;
  static constexpr int kKElements = kBlockN * kHeadDim;  // of keys, and as many of values, a stage

  // The accumulators' view of a thread: rows (m, half), columns (n, pair).
  static constexpr int kM = kBlockM / 64;
  static constexpr int kRows = 2 * kM;  // query rows this thread has a part of
  static constexpr int kN = kBlockN / 8;
  static constexpr int kD = kHeadDim / 8;
  using Scores = decltype(cute::partition_fragment_C(
      TiledMma{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kBlockN>>{}));  // ((2, 2), kM, kN)
  using Output = decltype(cute::partition_fragment_C(
      TiledMma{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kHeadDim>>{}));  // ((2, 2), kM, kD)

  // Where registers are left for the query fragments they stay there; else they are read again each step.
  // NOTE: 64 x 128 tiles would spill 12 bytes at the 168 registers that three blocks an SM allow.
  static constexpr bool kQueriesInRegisters = kBlockM == 64 && kHeadDim < 128;

  // A row's maximum is raised only when a score exceeds it by 2^8 (in the exponent's unit): probabilities
  // then stay below 256, well within fp16, and the pass over the outputs that a raise costs becomes rare. The
  // result is the same up to rounding, because the same maximum divides out at the end.
  static constexpr float kRaise = 8.f;

  struct RowStats {
    float max[kRows];  // of raw scores, perhaps kRaise behind
    float sum[kRows];  // this thread's columns only, until finish()
  };

  VDIT_DEVICE static int row_of(int m, int half) {
    return m * 64 + warp_idx() * 16 + half * 8 + lane_idx() / 4;
  }

  VDIT_DEVICE static void fetch_queries(T const* q, int64_t stride, QueryRows const& rows, T* smem_q) {
    auto sQ = cute::make_tensor(cute::make_smem_ptr(smem_q), SmemQ{});
    CUTE_UNROLL
    for (int i = 0; i < kBlockM * kChunks / kThreads; ++i) {
      int const item = thread_idx() + i * kThreads;
      int const r = item / kChunks, col = item % kChunks * 8;
      int64_t const row = rows.at(r);
      cp_async_16(&sQ(r, col), q + (row >= 0 ? row * stride : 0) + col, row >= 0);
    }
  }

  // The stream's next kBlockN rows of k and v into one stage. Each warp fetches its quarter; rows past the
  // stream's end become zero, so that a probability of 0 times them is 0. Returns the number of rows.
  VDIT_DEVICE static int fetch_keys(RowStream& stream, T const* k, int64_t stride_k, T const* v,
                                    int64_t stride_v, T* smem_stage) {
    int const thread = not_hoisted(thread_idx());  // the outputs want the registers
    int const lane = thread % 32, warp_row = thread / 32 * kWarpRowsN;
    int32_t source;
    int const rows = stream.take<kBlockN>(warp_row + lane % kWarpRowsN, source);
    if (rows == 0) return 0;
    auto sK = cute::make_tensor(cute::make_smem_ptr(smem_stage), SmemK{});
    auto sV = cute::make_tensor(cute::make_smem_ptr(smem_stage + kKElements), SmemK{});
    CUTE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      int const r = pass * (32 / kLanesRow) + lane / kLanesRow;
      int64_t const row = shfl(source, r);
      bool const valid = row >= 0;
      T const* k_row = k + (valid ? row * stride_k : 0);
      T const* v_row = v + (valid ? row * stride_v : 0);
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks / kLanesRow; ++chunk) {
        int const col = (chunk * kLanesRow + lane % kLanesRow) * 8;
        cp_async_16(&sK(warp_row + r, col), k_row + col, valid);
        cp_async_16(&sV(warp_row + r, col), v_row + col, valid);
      }
    }
    return rows;
  }

  // What keeps the maximum rule simple: scores are turned so that a larger one weighs more. Rare, so not
  // fast.
  VDIT_DEVICE static void turn_scores(Scores& s, float scale) {
    if (scale > 0.f) return;
    float const sign = scale < 0.f ? -1.f : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < size(s); ++i) s(i) *= sign;
  }

  VDIT_DEVICE static void mask_scores(Scores& s, int keys) {
    if (keys == kBlockN) return;
    CUTE_UNROLL
    for (int n = 0; n < kN; ++n) {
      CUTE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        if (n * 8 + lane_idx() % 4 * 2 + pair < keys) continue;
        CUTE_UNROLL
        for (int i = 0; i < kRows; ++i) s(cute::make_coord(pair, i % 2), i / 2, n) = -INFINITY;
      }
    }
  }

  // Raises the rows' maxima where some row of the warp needs it, scaling what was summed so far.
  VDIT_DEVICE static void raise_max(Scores const& s, RowStats& stats, Output& o, float exponent_scale) {
    float top[kRows];
    bool raise = false;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float highest = stats.max[i];
      CUTE_UNROLL
      for (int n = 0; n < kN; ++n) {
        CUTE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          highest = fmaxf(highest, s(cute::make_coord(pair, i % 2), i / 2, n));
        }
      }
      highest = fmaxf(highest, shfl_xor(highest, 1));
      highest = fmaxf(highest, shfl_xor(highest, 2));
      top[i] = highest;
      raise = raise || (highest - stats.max[i]) * exponent_scale > kRaise;  // false for -inf - -inf
    }
    if (!warp_any(raise)) return;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float const factor = top[i] == stats.max[i] ? 1.f : fast_exp2((stats.max[i] - top[i]) * exponent_scale);
      stats.max[i] = top[i];
      stats.sum[i] *= factor;
      CUTE_UNROLL
      for (int d = 0; d < kD; ++d) {
        CUTE_UNROLL
        for (int pair = 0; pair < 2; ++pair) o(cute::make_coord(pair, i % 2), i / 2, d) *= factor;
      }
    }
  }

  // Scores become probabilities relative to the rows' maxima.
  VDIT_DEVICE static void exponentiate(Scores& s, RowStats& stats, float exponent_scale) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float const base = stats.max[i] == -INFINITY ? 0.f : stats.max[i] * exponent_scale;
      CUTE_UNROLL
      for (int n = 0; n < kN; ++n) {
        CUTE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          float& x = s(cute::make_coord(pair, i % 2), i / 2, n);
          x = fast_exp2(x * exponent_scale - base);
          stats.sum[i] += x;
        }
      }
    }
  }

  // Probabilities in T, seen as the second product's A operand: two 8-column accumulators side by side are
  // one 16-column fragment, in the very registers.
  VDIT_DEVICE static auto as_operand(Scores const& s) {
    using namespace cute;
    auto p = make_tensor<T>(Layout<Shape<Shape<_2, _2, _2>, Int<kM>, Int<kN / 2>>>{});
    auto words = recast<uint32_t>(p);  // ((1, 2, 2), kM, kN / 2)
    CUTE_UNROLL
    for (int m = 0; m < kM; ++m) {
      CUTE_UNROLL
      for (int n = 0; n < kN; ++n) {
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          words(make_coord(0, half, n % 2), m, n / 2) =
              pack2<T>(s(make_coord(0, half), m, n), s(make_coord(1, half), m, n));
        }
      }
    }
    return p;
  }

  // acc += A B^T. A's fragments come slice by slice (16 deep) through `load_a`; B is read from shared memory
  // 16 rows of a slice at a time, kAhead reads ahead of the products, so that few of its registers are live.
  template <class A, class LoadA, class CopyB, class From, class To, class B, class Acc>
  VDIT_DEVICE static void multiply(A const& rA, LoadA const& load_a, CopyB const& copy_b, From const& from,
                                   To& to, B const& rB, Acc& acc) {
    using namespace cute;
    constexpr int kAhead = 2;
    constexpr int kPairs = decltype(size<1>(rB))::value / 2;  // of 8-row atoms, a slice
    constexpr int kSteps = decltype(size<2>(rA))::value * kPairs;
    TiledMma mma;
    auto load_b = [&](int step) {
      copy(copy_b, from(_, step % kPairs, step / kPairs), to(_, step % kPairs, step / kPairs));
    };
    load_a(0);
    CUTE_UNROLL
    for (int step = 0; step < kAhead && step < kSteps; ++step) load_b(step);
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      int const slice = step / kPairs;
      if (step % kPairs == 0 && step + kPairs < kSteps) load_a(slice + 1);
      if (step + kAhead < kSteps) load_b(step + kAhead);
      CUTE_UNROLL
      for (int n = step % kPairs * 2; n < step % kPairs * 2 + 2; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < kM; ++m) gemm(mma, rA(_, m, slice), rB(_, n, slice), acc(_, m, n));
      }
    }
  }

  // Adds up the quads' sums, divides, and writes lse. A row that saw nothing gets 0 and -inf; NaN everywhere
  // when the list named a block that does not exist.
  VDIT_DEVICE static void finish(RowStats& stats, Output& o, float exponent_scale, bool bad,
                                 QueryRows const& rows, float* lse) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float sum = stats.sum[i];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      bool const empty = sum == 0.f;
      float const inverse = bad ? NAN : 1.f / sum;
      CUTE_UNROLL
      for (int d = 0; d < kD; ++d) {
        CUTE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          float& x = o(cute::make_coord(pair, i % 2), i / 2, d);
          x = empty && !bad ? 0.f : x * inverse;
        }
      }
      int32_t const row = rows.at(row_of(i / 2, i % 2));
      constexpr float kLn2 = 0.69314718055994531f;
      float const value = bad ? NAN : (empty ? -INFINITY : stats.max[i] * exponent_scale * kLn2 + logf(sum));
      if (lane_idx() % 4 == 0 && row >= 0) lse[row] = value;
    }
  }

  // Through the queries' shared memory, so that global stores are of 16 bytes and whole rows.
  VDIT_DEVICE static void store_out(Output const& o, T* smem_q, T* out, int64_t stride,
                                    QueryRows const& rows) {
    auto sO = cute::make_tensor(cute::make_smem_ptr(smem_q), SmemQ{});
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTE_UNROLL
      for (int d = 0; d < kD; ++d) {
        uint32_t const pair =
            pack2<T>(o(cute::make_coord(0, i % 2), i / 2, d), o(cute::make_coord(1, i % 2), i / 2, d));
        *reinterpret_cast<uint32_t*>(&sO(row_of(i / 2, i % 2), d * 8 + lane_idx() % 4 * 2)) = pair;
      }
    }
    sync_block();
    CUTE_UNROLL
    for (int i = 0; i < kBlockM * kChunks / kThreads; ++i) {
      int const item = thread_idx() + i * kThreads;
      int const r = item / kChunks, col = item % kChunks * 8;
      int64_t const row = rows.at(r);
      if (row >= 0)
        *reinterpret_cast<uint4*>(out + row * stride + col) = *reinterpret_cast<uint4 const*>(&sO(r, col));
    }
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    using namespace cute;
    int64_t const b = block_idx_z(), h = block_idx_y();
    QueryTile const tile = find_query_tile<kBlockM>(p, block_idx_x(), b, h);
    if (tile.rows == 0) return;
    T const* q = static_cast<T const*>(p.q) + b * p.stride_q.b + h * p.stride_q.h;
    T const* k = static_cast<T const*>(p.k) + b * p.stride_k.b + h * p.stride_k.h;
    T const* v = static_cast<T const*>(p.v) + b * p.stride_v.b + h * p.stride_v.h;
    T* smem_q = reinterpret_cast<T*>(smem);  // [kBlockM, kHeadDim]
    T* smem_kv = smem_q + kQElements;        // kStages x (keys, values) [kBlockN, kHeadDim]
    constexpr float kLog2E = 1.44269504088896341f;
    float const exponent_scale = p.scale == 0.f ? 1.f : fabsf(p.scale) * kLog2E;

    TiledMma mma;
    auto thr_mma = mma.get_slice(thread_idx());
    auto sQ = make_tensor(make_smem_ptr(smem_q), SmemQ{});
    auto rQ = thr_mma.partition_fragment_A(sQ);
    auto load_q = make_tiled_copy_A(LdsmAtom<T>{}, mma);
    auto from_q = load_q.get_slice(thread_idx()).partition_S(sQ);
    auto to_q = load_q.get_slice(thread_idx()).retile_D(rQ);
    auto load_k = make_tiled_copy_B(LdsmAtom<T>{}, mma);
    auto load_v = make_tiled_copy_B(LdsmTransAtom<T>{}, mma);
    auto thr_load_k = load_k.get_slice(thread_idx());
    auto thr_load_v = load_v.get_slice(thread_idx());

    Output o;
    clear(o);
    RowStats stats;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) stats.max[i] = -INFINITY, stats.sum[i] = 0.f;

    // Fill all stages but one.
    RowStream stream(p, tile.block);
    int keys[kStages - 1];  // rows of the steps under way
    fetch_queries(q, p.stride_q.s, QueryRows(p, b, h, tile.row0, tile.rows), smem_q);
    CUTE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      keys[i] = fetch_keys(stream, k, p.stride_k.s, v, p.stride_v.s, smem_kv + i * 2 * kKElements);
      cp_async_commit();
    }

    int stage = 0;
    for (int step = 0; keys[0] > 0; ++step) {
      cp_async_wait<kStages - 2>();
      sync_block();  // this step's rows are here, and every warp has left the stage that is filled next
      int const filled = stage == 0 ? kStages - 1 : stage - 1;
      int const later =
          fetch_keys(stream, k, p.stride_k.s, v, p.stride_v.s, smem_kv + filled * 2 * kKElements);
      cp_async_commit();
      if (kQueriesInRegisters && step == 0) copy(load_q, from_q, to_q);

      T* smem_k = smem_kv + stage * 2 * kKElements;
      auto sK = make_tensor(make_smem_ptr(smem_k), SmemK{});
      auto rK = thr_mma.partition_fragment_B(sK);
      auto to_k = thr_load_k.retile_D(rK);
      Scores s;
      clear(s);
      auto load_queries = [&](int slice) {
        if constexpr (!kQueriesInRegisters) copy(load_q, from_q(_, _, slice), to_q(_, _, slice));
      };
      multiply(rQ, load_queries, load_k, thr_load_k.partition_S(sK), to_k, rK, s);

      turn_scores(s, p.scale);
      mask_scores(s, keys[0]);
      raise_max(s, stats, o, exponent_scale);
      exponentiate(s, stats, exponent_scale);

      auto sVt = make_tensor(make_smem_ptr(smem_k + kKElements), SmemVt{});
      auto rV = thr_mma.partition_fragment_B(make_tensor(make_smem_ptr(smem_k), Layout<TransposedShape>{}));
      auto to_v = thr_load_v.retile_D(rV);
      auto rP = as_operand(s);
      multiply(rP, [](int) {}, load_v, thr_load_v.partition_S(sVt), to_v, rV, o);

      CUTE_UNROLL
      for (int i = 0; i + 1 < kStages - 1; ++i) keys[i] = keys[i + 1];
      keys[kStages - 2] = later;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    cp_async_wait<0>();
    sync_block();  // an empty list leaves the queries' copies under way, and the outputs take their place
    T* out = static_cast<T*>(p.out) + b * p.stride_out.b + h * p.stride_out.h;
    float* lse = p.lse + b * p.stride_lse.b + h * p.stride_lse.h;
    QueryRows const rows(p, b, h, tile.row0, tile.rows);  // again: not kept in registers meanwhile
    finish(stats, o, exponent_scale, warp_any(stream.bad), rows, lse);
    store_out(o, smem_q, out, p.stride_out.s, rows);
  }
};

}  // namespace vdit
