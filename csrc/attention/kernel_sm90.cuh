// block_sparse_attention on wgmma and TMA, compute capability 9.0.
//
// Thread blocks stay, one an SM, and take items (kernel_sm90_order.cuh) until none is left. An item is up to
// 64 queries for each of the consumer warpgroups, all with one key list. Two warps of a producer warpgroup
// walk the list, one for the keys and one for the values, and fill a ring of stages; the consumers multiply.
//
// The listed key blocks are one stream of rows. A stage is its next kBlockN rows wherever block borders fall,
// and every row is copied to its place once: a run of n rows goes as one TMA box for each 1 in the binary
// form of n. That works at any row because TMA swizzles by the address in shared memory, not by the position
// in the box. So ragged clusters cost no masks (but for the last stage of a list), no padding and no address
// arithmetic for each row.
//
// While a warpgroup's softmax runs, the products of the other one do, and its own of the step before. Scores,
// probabilities and outputs stay in registers: fp32, probabilities rounded to T for the second product.
#pragma once
#include "attention/kernel_sm90_order.cuh"
#include "common/device_sm90.h"
#include "common/tma.h"
#include "vdit/attention.h"

namespace vdit::sm90 {

// The listed key blocks as one stream of rows, for one warp. 32 list entries are held at a time, one a lane;
// positions count from the first row of the window that is filled next.
struct KeyStream {
  BlockSparseAttentionParams const& p;
  int64_t b, h;
  int32_t q_block;
  int32_t length = 0, next = 0;  // entries of the list, and the first that is not held yet
  int32_t begin = 0, end = 0;    // this lane's entry covers these positions
  int32_t shift = 0;             // source row - position
  int32_t held = 0;              // positions below this are covered
  bool bad = false;  // this lane has met an index that names no block, or a length that no list has

  VDIT_DEVICE KeyStream(BlockSparseAttentionParams const& params, int64_t batch, int64_t head, int32_t block)
      : p(params), b(batch), h(head), q_block(block) {
    length = list_length(p, b, h, block, bad);
  }

  // Holds the 32 entries from `next` on.
  VDIT_DEVICE void hold_entries() {
    int32_t const at = next + lane_idx();
    RowSpan span;
    if (at < length) span = listed_rows(p, b, h, q_block, at, bad);
    end = held + warp_prefix_sum(span.rows);
    begin = end - span.rows;
    shift = span.begin - begin;
    held = shfl(end, 31);
    next += 32;
  }

  // Calls load(position, source row, rows) for the runs that make up the next window of kRows rows, each on
  // the lane that holds it; returns how many rows there are (fewer only at the end). `last`: nothing follows.
  template <int kRows, class Load>
  VDIT_DEVICE int fill(Load const& load, bool& last) {
    while (true) {
      int32_t const from = begin > 0 ? begin : 0, to = end < kRows ? end : kRows;
      if (from < to) load(from, from + shift, to - from);
      if (held >= kRows || next >= length) break;
      hold_entries();
    }
    int const rows = held < kRows ? held : kRows;
    last = next >= length && held <= kRows;
    begin -= kRows, end -= kRows, held -= kRows, shift += kRows;
    return rows;
  }
};

template <class T, int kHeadDim, int kConsumers, int kBlockN>
struct BlockSparseAttentionKernel {
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kMinBlocks = 1;
  static constexpr int kStages = 2;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kConsumers == 2 || kConsumers == 3, "Registers are shared out for two or three consumers.");
  static_assert(kBlockN % 16 == 0 && kBlockN <= 256, "A stage is whole slices of the second product.");

  // Shared memory holds 64 columns side by side (a slab: rows of 128 bytes, the widest swizzle). The columns
  // from 96 to 127 of head size 96 are outside of the tensor, so that TMA fills zeros there.
  static constexpr int kSlabs = (kHeadDim + 63) / 64;
  static constexpr int kRowBytes = 128;
  static constexpr int kQuerySlab = 64 * kRowBytes;  // of one consumer
  static constexpr int kQueryBytes = kSlabs * kQuerySlab;
  static constexpr int kKeySlab = kBlockN * kRowBytes;
  static constexpr int kStageBytes = kSlabs * kKeySlab;  // of keys; values are as many
  static constexpr int kBoxes = 8;                       // of 1, 2, 4 ... 128 rows

  struct Params {
    BlockSparseAttentionParams attention;
    TensorMap q;  // boxes of 64 columns x 64 rows
    TensorMap k[kBoxes], v[kBoxes];
    WorkItem const* items;
    int32_t* next_item;
    int64_t items_head, num_items;
  };

  struct Item {
    int32_t row0, rows, q_block, head, batch;  // rows 0: the end
  };

  // What a consumer is told with a stage of keys.
  struct Step {
    int32_t rows;
    int32_t last, bad;
  };

  struct Shared {
    alignas(1024) char queries[kConsumers * kQueryBytes];
    char keys[kStages][kStageBytes];
    char values[kStages][kStageBytes];
    char outputs[kConsumers * kQueryBytes];
    Barrier q_full, q_empty;
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    Item item;
    Step steps[kStages];
  };
  static constexpr int smem_bytes() { return sizeof(Shared); }

  // Where in the ring one is: a stage, and how often the ring was gone round, modulo 2.
  struct Place {
    int stage = 0, parity = 0;
    VDIT_DEVICE void advance() {
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  };

  // ---- Producers -----------------------------------------------------------------------------------------

  // `rows` rows from `source` on into the slots from `slot` on.
  VDIT_DEVICE static void load_rows(TensorMap const* boxes, char* stage, Barrier* full, Item const& item,
                                    int slot, int source, int rows) {
    CUTE_UNROLL
    for (int i = kBoxes - 1; i >= 0; --i) {
      if ((rows >> i & 1) == 0) continue;
      CUTE_UNROLL
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(stage + slab * kKeySlab + slot * kRowBytes, boxes[i], full, slab * 64, source, item.head,
                 item.batch);
      }
      slot += 1 << i, source += 1 << i;
    }
  }

  // One window of the stream into a stage. What the list does not fill becomes zero (rows past the sequence's
  // end are), so that a probability of 0 times it is 0.
  VDIT_DEVICE static Step load_stage(Params const& a, KeyStream& stream, TensorMap const* boxes, char* stage,
                                     Barrier* full, Item const& item) {
    bool last;
    auto const load = [&](int slot, int source, int rows) {
      load_rows(boxes, stage, full, item, slot, source, rows);
    };
    int const rows = stream.template fill<kBlockN>(load, last);
    if (rows < kBlockN && lane_idx() == 0)
      load(rows, static_cast<int>(a.attention.seqlen_kv), kBlockN - rows);
    return {rows, last, stream.bad};
  }

  // The next item; rows 0 when there is none.
  VDIT_DEVICE static Item take_item(Params const& a) {
    while (true) {
      int64_t const at = atomic_add(a.next_item, 1);
      if (at >= a.num_items) return {};
      WorkItem const work = a.items[at];
      if (work.rows == 0) continue;
      int64_t const map = at / a.items_head;
      return {work.row0, work.rows, work.q_block, static_cast<int32_t>(map % a.attention.heads),
              static_cast<int32_t>(map / a.attention.heads)};
    }
  }

  // Warp 0: items, queries and keys.
  VDIT_DEVICE static void produce_keys(Params const& a, Shared& s) {
    Place at;
    for (int parity = 0;; parity ^= 1) {
      if (lane_idx() == 0) {
        Item const item = take_item(a);
        barrier_wait(&s.q_empty, parity ^ 1);
        s.item = item;
        load_queries(a, s, item);
      }
      sync_warp();
      Item const item = s.item;
      if (item.rows == 0) return;
      KeyStream stream(a.attention, item.batch, item.head, item.q_block);
      for (Step step{}; !step.last; at.advance()) {
        barrier_wait(&s.k_empty[at.stage], at.parity ^ 1);
        step = load_stage(a, stream, a.k, s.keys[at.stage], &s.k_full[at.stage], item);
        step.bad = warp_any(step.bad);
        if (lane_idx() == 0) {
          s.steps[at.stage] = step;
          barrier_arrive_expect(&s.k_full[at.stage], kStageBytes);
        }
      }
    }
  }

  VDIT_DEVICE static void load_queries(Params const& a, Shared& s, Item const& item) {
    int const warpgroups = (item.rows + 63) / 64;
    barrier_arrive_expect(&s.q_full, warpgroups * kQueryBytes);
    for (int i = 0; i < warpgroups; ++i) {
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(s.queries + i * kQueryBytes + slab * kQuerySlab, a.q, &s.q_full, slab * 64,
                 item.row0 + i * 64, item.head, item.batch);
      }
    }
  }

  // Warp 1: values. It hears of items as the consumers do.
  VDIT_DEVICE static void produce_values(Params const& a, Shared& s) {
    Place at;
    for (int parity = 0;; parity ^= 1) {
      barrier_wait(&s.q_full, parity);
      Item const item = s.item;
      if (item.rows == 0) return;
      sync_warp();
      release(&s.q_empty);
      KeyStream stream(a.attention, item.batch, item.head, item.q_block);
      for (Step step{}; !step.last; at.advance()) {
        barrier_wait(&s.v_empty[at.stage], at.parity ^ 1);
        step = load_stage(a, stream, a.v, s.values[at.stage], &s.v_full[at.stage], item);
        if (lane_idx() == 0) barrier_arrive_expect(&s.v_full[at.stage], kStageBytes);
      }
    }
  }

  // ---- Consumers -----------------------------------------------------------------------------------------
  // A thread's scores: rows lane / 4 and 8 below (half), columns 8 n + 2 (lane % 4) and the next (pair), at
  // [n * 4 + half * 2 + pair]; outputs likewise.

  static constexpr int kScores = kBlockN / 2;
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr float kRaise = 8.f;  // as in kernel_sm80.cuh: a maximum is raised only by more than 2^8

  struct RowStats {
    float max[2] = {-INFINITY, -INFINITY};  // of raw scores, perhaps kRaise behind
    float sum[2] = {0.f, 0.f};              // this thread's columns only, until finish()
  };

  // Scores of one stage, in flight when this returns.
  VDIT_DEVICE static void multiply_keys(char const* queries, char const* keys, float (&s)[kScores]) {
    CUTE_UNROLL
    for (int i = 0; i < kHeadDim / 16; ++i) {
      int const column = i % 4 * 32;  // in bytes, within the slab
      uint64_t const q =
          wgmma_descriptor(queries + i / 4 * kQuerySlab + column, SmemSwizzle::k128, 16, 8 * kRowBytes);
      uint64_t const k =
          wgmma_descriptor(keys + i / 4 * kKeySlab + column, SmemSwizzle::k128, 16, 8 * kRowBytes);
      wgmma_ss<T, kBlockN, Major::kK>(s, q, k, i > 0);
    }
  }

  // o += probabilities * values, in flight when this returns.
  VDIT_DEVICE static void multiply_values(uint32_t const (&p)[kScores / 2], char const* values,
                                          float (&o)[kOutputs]) {
    CUTE_UNROLL
    for (int i = 0; i < kBlockN / 16; ++i) {
      uint32_t const a[4] = {p[i * 4], p[i * 4 + 1], p[i * 4 + 2], p[i * 4 + 3]};
      char const* rows = values + i * 16 * kRowBytes;
      if constexpr (kHeadDim == 96) {  // one and a half slabs, which one instruction does not take
        multiply_columns<64>(a, rows, *reinterpret_cast<float (*)[32]>(&o[0]));
        multiply_columns<32>(a, rows + kKeySlab, *reinterpret_cast<float (*)[16]>(&o[32]));
      } else {
        multiply_columns<kHeadDim>(a, rows, o);
      }
    }
  }

  template <int kColumns>
  VDIT_DEVICE static void multiply_columns(uint32_t const (&a)[4], char const* rows,
                                           float (&o)[kColumns / 2]) {
    uint64_t const v = wgmma_descriptor(rows, SmemSwizzle::k128, kKeySlab, 8 * kRowBytes);
    wgmma_rs<T, kColumns, Major::kMN>(o, a, v, true);
  }

  // What keeps the maximum rule simple: scores are turned so that a larger one weighs more.
  VDIT_DEVICE static void turn_scores(float (&s)[kScores], float scale) {
    if (scale > 0.f) return;
    float const sign = scale < 0.f ? -1.f : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) s[i] *= sign;
  }

  VDIT_DEVICE static void mask_scores(float (&s)[kScores], int keys) {
    if (keys == kBlockN) return;
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + lane_idx() % 4 * 2 + i % 2 >= keys) s[i] = -INFINITY;
    }
  }

  // Raises the rows' maxima where some row of the warp needs it; what was summed so far is then to be
  // multiplied by `factor`. Returns whether it is.
  VDIT_DEVICE static bool raise_max(float const (&s)[kScores], RowStats& stats, float exponent_scale,
                                    float (&factor)[2]) {
    float top[2] = {stats.max[0], stats.max[1]};
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    bool raise = false;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], shfl_xor(top[half], 1));
      top[half] = fmaxf(top[half], shfl_xor(top[half], 2));
      raise = raise || (top[half] - stats.max[half]) * exponent_scale > kRaise;  // false for -inf - -inf
    }
    if (!warp_any(raise)) return false;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      factor[half] =
          top[half] == stats.max[half] ? 1.f : fast_exp2((stats.max[half] - top[half]) * exponent_scale);
      stats.max[half] = top[half];
      stats.sum[half] *= factor[half];
    }
    return true;
  }

  // Scores become probabilities relative to the rows' maxima.
  VDIT_DEVICE static void exponentiate(float (&s)[kScores], RowStats& stats, float exponent_scale) {
    float base[2];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      base[half] = stats.max[half] == -INFINITY ? 0.f : stats.max[half] * exponent_scale;
    }
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) {
      s[i] = fast_exp2(s[i] * exponent_scale - base[i / 2 % 2]);
      stats.sum[i / 2 % 2] += s[i];
    }
  }

  // Probabilities in T: two 8-column accumulators side by side are one 16-column A operand, in the very
  // registers.
  VDIT_DEVICE static void pack(float const (&s)[kScores], uint32_t (&p)[kScores / 2]) {
    CUTE_UNROLL
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  VDIT_DEVICE static void scale_outputs(float (&o)[kOutputs], float const (&factor)[2]) {
    CUTE_UNROLL
    for (int i = 0; i < kOutputs; ++i) o[i] *= factor[i / 2 % 2];
  }

  // Consumers take turns in issuing products: while one's run, the others' softmax does. Groups below
  // `groups` take part. Each turn ends with the turn at the group after it, and each item with the turn at
  // group 0.
  VDIT_DEVICE static void take_turn(int group, int groups) {
    if (groups > 1) named_sync(1 + group, 256);
  }
  VDIT_DEVICE static void pass_turn(int group, int groups) {
    if (groups > 1) named_arrive(1 + (group + 1 < groups ? group + 1 : 0), 256);
  }

  VDIT_DEVICE static void release(Barrier* empty) {
    if (lane_idx() == 0) barrier_arrive(empty);
  }

  // Scores of the next stage of keys, in flight when this returns; they are free to be written over. Returns
  // what is told with the stage. `issue` starts further products within the same turn.
  template <class Issue>
  VDIT_DEVICE static Step start_scores(Shared& s, char const* queries, Place const& at, int group, int groups,
                                       float (&scores)[kScores], Issue const& issue) {
    barrier_wait(&s.k_full[at.stage], at.parity);
    Step const step = s.steps[at.stage];
    take_turn(group, groups);
    wgmma_fence();
    multiply_keys(queries, s.keys[at.stage], scores);
    wgmma_commit();
    issue();
    pass_turn(group, groups);
    return step;
  }

  // Waits for the scores, behind which kLater products may still be under way, and gives their keys back.
  template <int kLater>
  VDIT_DEVICE static void finish_scores(Shared& s, Place& at, float (&scores)[kScores]) {
    wgmma_wait<kLater>();
    wgmma_fence_operand(scores);
    release(&s.k_empty[at.stage]);
    at.advance();
  }

  // Scores become probabilities. Returns whether the maxima were raised, and with them `factor` is wanted.
  VDIT_DEVICE static bool weigh_scores(float (&scores)[kScores], int keys, RowStats& stats, float scale,
                                       float exponent_scale, float (&factor)[2]) {
    turn_scores(scores, scale);
    mask_scores(scores, keys);
    bool const raised = raise_max(scores, stats, exponent_scale, factor);
    exponentiate(scores, stats, exponent_scale);
    return raised;
  }

  // The next stage of values, weighed and added to the outputs; in flight when this returns.
  VDIT_DEVICE static void start_outputs(Shared& s, Place const& at, uint32_t (&probabilities)[kScores / 2],
                                        float (&o)[kOutputs]) {
    barrier_wait(&s.v_full[at.stage], at.parity);
    wgmma_fence_operand(o);
    wgmma_fence_operand(probabilities);
    wgmma_fence();
    multiply_values(probabilities, s.values[at.stage], o);
    wgmma_commit();
  }

  VDIT_DEVICE static void finish_outputs(Shared& s, Place& at, float (&o)[kOutputs]) {
    wgmma_wait<0>();
    wgmma_fence_operand(o);
    release(&s.v_empty[at.stage]);
    at.advance();
  }

  // One item's 64 rows of this warpgroup.
  VDIT_DEVICE static void attend(Params const& a, Shared& s, Item const& item, int group, Place& k_at,
                                 Place& v_at) {
    BlockSparseAttentionParams const& p = a.attention;
    constexpr float kLog2E = 1.44269504088896341f;
    float const exponent_scale = p.scale == 0.f ? 1.f : fabsf(p.scale) * kLog2E;
    char const* queries = s.queries + group * kQueryBytes;
    int const groups = (item.rows + 63) / 64;

    float scores[kScores], o[kOutputs];
    uint32_t probabilities[kScores / 2];
    CUTE_UNROLL
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.f;
    RowStats stats;
    float factor[2];

    Step step = start_scores(s, queries, k_at, group, groups, scores, [] {});
    finish_scores<0>(s, k_at, scores);
    weigh_scores(scores, step.rows, stats, p.scale, exponent_scale, factor);
    pack(scores, probabilities);

    while (!step.last) {  // this step's scores and the last one's outputs
      wgmma_fence_operand(scores);
      step = start_scores(s, queries, k_at, group, groups, scores,
                          [&] { start_outputs(s, v_at, probabilities, o); });
      finish_scores<1>(s, k_at, scores);
      bool const raised = weigh_scores(scores, step.rows, stats, p.scale, exponent_scale, factor);
      finish_outputs(s, v_at, o);
      if (raised) scale_outputs(o, factor);
      pack(scores, probabilities);
    }

    release(&s.q_empty);
    start_outputs(s, v_at, probabilities, o);
    finish_outputs(s, v_at, o);

    int const rows = item.rows - group * 64;
    int64_t const row0 = item.row0 + group * 64;
    finish(stats, o, exponent_scale, step.bad, rows,
           p.lse + item.batch * p.stride_lse.b + item.head * p.stride_lse.h + row0);
    T* out = static_cast<T*>(p.out) + item.batch * p.stride_out.b + item.head * p.stride_out.h +
             row0 * p.stride_out.s;
    store_out(o, s.outputs + group * kQueryBytes, out, p.stride_out.s, rows);
  }

  // A warpgroup without rows lets an item's stages pass.
  VDIT_DEVICE static void skip(Shared& s, Place& k_at, Place& v_at) {
    release(&s.q_empty);
    for (Step step{}; !step.last;) {
      barrier_wait(&s.k_full[k_at.stage], k_at.parity);
      step = s.steps[k_at.stage];
      sync_warp();
      release(&s.k_empty[k_at.stage]);
      k_at.advance();
      barrier_wait(&s.v_full[v_at.stage], v_at.parity);
      release(&s.v_empty[v_at.stage]);
      v_at.advance();
    }
  }

  // Adds up the quads' sums, divides, and writes lse. A row that saw nothing gets 0 and -inf; NaN everywhere
  // when the list named a block that does not exist.
  VDIT_DEVICE static void finish(RowStats& stats, float (&o)[kOutputs], float exponent_scale, bool bad,
                                 int rows, float* lse) {
    constexpr float kLn2 = 0.69314718055994531f;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = stats.sum[half];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      bool const empty = sum == 0.f;
      float const inverse = bad ? NAN : 1.f / sum;
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) {
        if (i / 2 % 2 == half) o[i] = empty && !bad ? 0.f : o[i] * inverse;
      }
      int const row = warp_idx() % 4 * 16 + half * 8 + lane_idx() / 4;
      float const value =
          bad ? NAN : (empty ? -INFINITY : stats.max[half] * exponent_scale * kLn2 + logf(sum));
      if (lane_idx() % 4 == 0 && row < rows) lse[row] = value;
    }
  }

  // Through shared memory, so that global stores are of 16 bytes and whole rows. A warp's 16 rows are its
  // own.
  VDIT_DEVICE static void store_out(float const (&o)[kOutputs], char* staged, T* out, int64_t stride,
                                    int rows) {
    int const warp_row = warp_idx() % 4 * 16, lane = lane_idx();
    auto const place = [&](int row, int chunk) {  // of 8 columns; chunks swizzled against bank conflicts
      return staged + chunk / 8 * kQuerySlab + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
    };
    CUTE_UNROLL
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t const words[4] = {pack2<T>(o[n * 4], o[n * 4 + 1]), pack2<T>(o[n * 4 + 2], o[n * 4 + 3]),
                                 pack2<T>(o[n * 4 + 4], o[n * 4 + 5]), pack2<T>(o[n * 4 + 6], o[n * 4 + 7])};
      stmatrix_x4(place(warp_row + lane % 16, n + lane / 16), words);
    }
    sync_warp();
    constexpr int kChunks = kHeadDim / 8;
    CUTE_UNROLL
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
      int const at = i * 32 + lane, row = warp_row + at / kChunks, chunk = at % kChunks;
      if (row < rows) {
        *reinterpret_cast<uint4*>(out + row * stride + chunk * 8) =
            *reinterpret_cast<uint4 const*>(place(row, chunk));
      }
    }
    sync_warp();  // the next item's rows go to the same place
  }

  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    Place k_at, v_at;
    if (group == kConsumers - 1) named_arrive(1, 256);  // the first turn is group 0's
    for (int parity = 0;; parity ^= 1) {
      barrier_wait(&s.q_full, parity);
      Item const item = s.item;
      if (item.rows == 0) break;
      sync_warp();
      if (item.rows > group * 64) {
        attend(a, s, item, group, k_at, v_at);
      } else {
        skip(s, k_at, v_at);
      }
    }
    if (group == 0) named_sync(1, 256);
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    if (thread_idx() == 0) {
      barrier_init(&s.q_full, 1);
      barrier_init(&s.q_empty, kConsumers * 4 + 1);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&s.k_full[i], 1);
        barrier_init(&s.v_full[i], 1);
        barrier_init(&s.k_empty[i], kConsumers * 4);
        barrier_init(&s.v_empty[i], kConsumers * 4);
      }
      fence_barrier_init();
    }
    sync_block();
    // Told by lane 0: the compiler then knows that a warp is of one mind.
    int const group = shfl(thread_idx() / 128, 0);
    if (group == kConsumers) {
      set_max_registers_down<kProducerRegisters>();
      if (warp_idx() == kConsumers * 4) produce_keys(a, s);
      if (warp_idx() == kConsumers * 4 + 1) produce_values(a, s);
    } else {
      set_max_registers_up<kConsumerRegisters>();
      consume(a, s, group);
    }
  }
};

}  // namespace vdit::sm90
