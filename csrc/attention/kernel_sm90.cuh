// block_sparse_attention on wgmma and TMA, compute capability 9.0.
//
// Thread blocks stay, one an SM, and take items (kernel_sm90_order.cuh) until none is left. An item is up to
// 64 queries for each of the consumer warpgroups, all with one key list, or 64 each with a list of their own.
// The warps of a producer warpgroup walk the lists, some for the keys and some for the values, and fill a
// ring of stages; the consumers multiply.
//
// The listed key blocks are one stream of rows. A stage is its next kBlockN rows wherever block borders fall:
// a window. A run of n rows goes as one TMA box for each 1 in the binary form of n. That works at any row
// because TMA swizzles by the address in shared memory, not by the position in the box. So ragged clusters
// cost no masks (but for the last window of a list), no padding and no address arithmetic for each row.
// Two lists make three streams: what both hold, for all consumers, and what only the one or the other holds,
// in turns.
//
// While a warpgroup's softmax runs, the products of the other one do, and its own of the step before. Scores,
// probabilities and outputs stay in registers: fp32, probabilities rounded to T for the second product.
#pragma once
#include "attention/kernel_sm90_order.cuh"
#include "attention/kernel_sm90_scores.cuh"
#include "attention/tile.h"
#include "common/device_sm90.h"
#include "common/tma.h"
#include "vdit/attention.h"

namespace vdit::sm90 {

// How a run of rows is cut into boxes.
enum class RunBoxes {
  kBinary,   // one for each 1 in the binary form of the length; every row is loaded once
  kOverlap,  // the same above 8 rows; one of 8 rows, which ends with the run, for what is left of it
};

// The key rows of an item in the order in which stages hold them, for one warp. 32 blocks of a stream are
// held at a time, one a lane; positions count from the first row of the window that is filled next.
class KeyWindows {
 public:
  static constexpr int kFirst = 1, kSecond = 2, kBoth = 3;  // bits: the parts of the item that see a window

  // In which part's list a window is, and what follows.
  struct Window {
    int rows, parts;
    bool last;
  };

  VDIT_DEVICE KeyWindows(BlockSparseAttentionParams const& params, ListBits const& list_bits, int32_t batch,
                         int32_t head, WorkItem const& item)
      : p_(params), b_(batch), h_(head), q_block_(item.part[0].q_block) {
    if (item.part[1].rows == 0) {
      end_ = list_length(p_, b_, h_, q_block_, bad_);
      return;
    }
    bits_ = list_bits.row(b_, h_, q_block_);
    other_bits_ = list_bits.row(b_, h_, item.part[1].q_block);
    end_ = static_cast<int32_t>(p_.num_kv_blocks);
    now_ = open(kBoth);
    if (now_.done(end_)) {
      open_single();
      if (now_.done(end_)) now_.parts = kBoth;  // two empty lists: one window without rows
    }
  }

  // This lane has met an index that names no block, or a length that no list has.
  VDIT_DEVICE bool bad() const { return bad_; }

  // Calls load(position, source row, rows) for the runs that make up the next window of kRows rows, each on
  // the lane that holds it.
  template <int kRows, class Load>
  VDIT_DEVICE Window fill(Load const& load) {
    while (true) {
      int32_t const from = now_.begin > 0 ? now_.begin : 0, to = now_.end < kRows ? now_.end : kRows;
      if (from < to) load(from, from + now_.shift, to - from);
      if (now_.held >= kRows || now_.next >= end_) break;
      hold();
    }
    Window window{now_.held < kRows ? now_.held : kRows, now_.parts, false};
    now_.begin -= kRows, now_.end -= kRows, now_.held -= kRows, now_.shift += kRows;
    window.last = !turn();
    return window;
  }

 private:
  struct Stream {
    int32_t begin = 0, end = 0;  // this lane's block covers these positions
    int32_t shift = 0;           // source row - position
    int32_t held = 0;            // positions below this are covered
    int32_t next = 0;            // first entry, or block, that is not held yet
    uint32_t words = 0;          // this lane's of 32 words of bits, that of block `next` among them
    int32_t parts = kBoth;

    VDIT_DEVICE bool done(int32_t end_of_list) const { return next >= end_of_list && held <= 0; }
  };

  // The stream of the blocks that only these parts list.
  VDIT_DEVICE Stream open(int32_t parts) {
    Stream stream;
    stream.parts = parts;
    skip_zeros(stream);
    return stream;
  }

  // What both parts list is through, or nothing.
  VDIT_DEVICE void open_single() {
    now_ = open(kFirst);
    waiting_ = open(kSecond);
    if (now_.done(end_)) now_ = waiting_, waiting_.parts = 0;
    if (waiting_.done(end_)) waiting_.parts = 0;
  }

  // Chooses the stream of the next window; false when there is none.
  VDIT_DEVICE bool turn() {
    bool const done = now_.done(end_);
    if (bits_ == nullptr || (!done && now_.parts == kBoth)) return !done;
    if (now_.parts == kBoth) {
      open_single();
      return !now_.done(end_);
    }
    if (waiting_.parts == 0) return !done;
    Stream const before = now_;
    now_ = waiting_;
    waiting_ = before;
    if (done) waiting_.parts = 0;
    return true;
  }

  // Moves `next` to a word of bits that is not 0. Words are fetched 32 at a time.
  VDIT_DEVICE void skip_zeros(Stream& stream) {
    for (; stream.next < end_; stream.next += 32) {
      int32_t const word = stream.next / 32;
      if (word % 32 == 0) {
        int32_t const mine = word + lane_idx();
        uint32_t first = 0, second = 0;
        if (mine * 32 < end_) first = bits_[mine], second = other_bits_[mine];
        stream.words = stream.parts == kBoth    ? first & second
                       : stream.parts == kFirst ? first & ~second
                                                : second & ~first;
      }
      if (shfl(stream.words, word % 32) != 0) return;
    }
  }

  // Holds the 32 blocks from `next` on.
  VDIT_DEVICE void hold() {
    RowSpan span;
    int32_t const at = now_.next + lane_idx();
    if (bits_ == nullptr) {
      if (at < end_) span = listed_rows(p_, b_, h_, q_block_, at, bad_);
      now_.next += 32;
    } else {
      if (shfl(now_.words, now_.next / 32 % 32) >> lane_idx() & 1) span = key_block_rows(p_, b_, h_, at);
      now_.next += 32;
      skip_zeros(now_);
    }
    now_.end = now_.held + warp_prefix_sum(span.rows);
    now_.begin = now_.end - span.rows;
    now_.shift = span.begin - now_.begin;
    now_.held = shfl(now_.end, 31);
  }

  BlockSparseAttentionParams const& p_;
  int32_t const b_, h_, q_block_;
  int32_t end_ = 0;  // of the list, or of the blocks
  uint32_t const* bits_ = nullptr;
  uint32_t const* other_bits_ = nullptr;
  bool bad_ = false;
  Stream now_, waiting_;
};

template <class T, int kHeadDim>
struct BlockSparseAttentionKernel {
  static constexpr AttentionTileSm90 kTile = attention_tile_sm90(kHeadDim);
  static constexpr int kConsumers = kTile.consumers, kBlockM = kTile.block_m(), kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kMinBlocks = 1;
  static_assert(128 * (kConsumers * kTile.consumer_registers + kTile.producer_registers) <= 65536 &&
                    kTile.consumer_registers % 8 == 0 && kTile.producer_registers % 8 == 0,
                "setmaxnreg shares out what an SM has.");
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
  static constexpr int kItems = 2;                       // that are told, by turns
  static constexpr int kNoPart = 2;                      // of an item; the first is 0, the second 1

  struct Params {
    BlockSparseAttentionParams attention;
    TensorMap q;  // boxes of 64 columns x 64 rows
    TensorMap k[kBoxes], v[kBoxes];
    ListBits bits;
    RunBoxes run_boxes;
    WorkItem const* items;
    int32_t* next_item;
    int64_t items_head, num_items;
  };

  struct Map {
    int32_t head, batch;
  };
  struct Item {
    WorkItem work;  // no rows: the end
    Map map;
  };

  // What a consumer is told with a stage of keys.
  struct Step {
    int32_t rows, parts;  // of the item, which see this window
    int32_t last, bad;
  };

  struct Shared {
    alignas(1024) char queries[kConsumers * kQueryBytes];
    char keys[kStages][kStageBytes];
    char values[kStages][kStageBytes];
    Barrier item_full[kItems], item_empty[kItems], q_full, q_empty;
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    Item items[kItems];
    Step steps[kStages];
  };
  static_assert(sizeof(Shared) <= kTile.smem_bytes(), "What tile.h tells is what is taken.");
  static constexpr int smem_bytes() { return kTile.smem_bytes(); }

  // Where in a ring one is: a stage, and how often the ring was gone round, modulo 2.
  template <int kSize>
  struct Ring {
    int stage = 0, parity = 0;
    VDIT_DEVICE void advance() {
      if (++stage == kSize) stage = 0, parity ^= 1;
    }
  };
  using Place = Ring<kStages>;
  using Turn = Ring<kItems>;

  // ---- Producers -----------------------------------------------------------------------------------------
  // A warp for each slab of keys, and of values: bringing ragged clusters takes a warp as long as multiplying
  // them, if one had to load all of their columns. The first warp of the keys takes the items, the first of
  // the values loads the queries. All walk the lists on their own.

  // What a warp fills: one slab of the keys' stages, or of the values'.
  template <bool kKeys>
  struct Slab {
    Params const& a;
    Shared& s;
    int32_t index;
    VDIT_DEVICE TensorMap const* boxes() const { return kKeys ? a.k : a.v; }
    VDIT_DEVICE char* stage(Place const& at) const {
      return (kKeys ? s.keys : s.values)[at.stage] + index * kKeySlab;
    }
    VDIT_DEVICE Barrier* full(Place const& at) const { return &(kKeys ? s.k_full : s.v_full)[at.stage]; }
    VDIT_DEVICE Barrier* empty(Place const& at) const { return &(kKeys ? s.k_empty : s.v_empty)[at.stage]; }
  };

  // `rows` rows from `source` on into the slots from `slot` on. Returns how many were loaded twice.
  template <bool kKeys>
  VDIT_DEVICE static int load_rows(Slab<kKeys> const& slab, Place const& at, Map const& map,
                                   RunBoxes run_boxes, int slot, int source, int rows) {
    char* stage = slab.stage(at);
    auto const load_box = [&](int i, int to, int from) {
      tma_load(stage + to * kRowBytes, slab.boxes()[i], slab.full(at), slab.index * 64, from, map.head,
               map.batch);
    };
    int const left = rows % 8;
    int again = 0;
    if (run_boxes == RunBoxes::kOverlap && rows > 8 && (left & (left - 1)) != 0) {
      load_box(3, slot + rows - 8, source + rows - 8);
      again = 8 - left;
      rows -= left;
    }
    CUTE_UNROLL
    for (int i = kBoxes - 1; i >= 0; --i) {
      if ((rows >> i & 1) == 0) continue;
      load_box(i, slot, source);
      slot += 1 << i, source += 1 << i;
    }
    return again;
  }

  // The next window into a stage. What the list does not fill becomes zero (rows past the sequence's end
  // are), so that a probability of 0 times it is 0.
  template <bool kKeys>
  VDIT_DEVICE static KeyWindows::Window load_stage(Params const& a, KeyWindows& windows,
                                                   Slab<kKeys> const& slab, Place const& at, Map const& map) {
    int again = 0;
    auto const load = [&](int slot, int source, int rows) {
      again += load_rows(slab, at, map, a.run_boxes, slot, source, rows);
    };
    auto const window = windows.template fill<kBlockN>(load);
    if (window.rows < kBlockN && lane_idx() == 0)
      load(window.rows, static_cast<int>(a.attention.seqlen_kv), kBlockN - window.rows);
    int bytes = kKeySlab;
    if (a.run_boxes == RunBoxes::kOverlap) bytes += shfl(warp_prefix_sum(again), 31) * kRowBytes;
    if (lane_idx() == 0) barrier_expect(slab.full(at), bytes);
    return window;
  }

  // The next item; without rows when there is none. Behind the items of a head nothing comes but the next
  // head.
  VDIT_DEVICE static Item take_item(Params const& a) {
    while (true) {
      int64_t const at = atomic_add(a.next_item, 1);
      if (at >= a.num_items) return {};
      WorkItem const work = a.items[at];
      int64_t const map = at / a.items_head;
      if (work.part[0].rows == 0) {
        atomic_max(a.next_item, static_cast<int32_t>((map + 1) * a.items_head));
        continue;
      }
      return {work,
              {static_cast<int32_t>(map % a.attention.heads), static_cast<int32_t>(map / a.attention.heads)}};
    }
  }

  // One slab of all items. The first warp of the keys takes them and tells the consumers of windows.
  template <bool kKeys>
  VDIT_DEVICE static void produce(Params const& a, Shared& s, int index) {
    Slab<kKeys> const slab{a, s, index};
    bool const leads = kKeys && index == 0;
    Place at;
    Turn turn;
    for (int parity = 0;; parity ^= 1, turn.advance()) {
      Item const& item = s.items[turn.stage];
      if (leads) {
        pass_item(a, s, turn);
      } else {
        barrier_wait(&s.item_full[turn.stage], turn.parity);
      }
      if (item.work.part[0].rows == 0) return;
      if (!kKeys && index == 0 && a.attention.q_index == nullptr) load_queries(a, s, item, parity);
      Map const map = item.map;
      KeyWindows windows(a.attention, a.bits, map.batch, map.head, item.work);
      sync_warp();
      if (!leads) release(&s.item_empty[turn.stage]);
      for (bool more = true; more; at.advance()) {
        barrier_wait(slab.empty(at), at.parity ^ 1);
        sync_warp();  // a lane that fell behind by the whole ring would miss its phase
        auto const window = load_stage(a, windows, slab, at, map);
        bool const bad = kKeys && warp_any(windows.bad());
        if (lane_idx() == 0) {
          if (leads) s.steps[at.stage] = {window.rows, window.parts, window.last, bad};
          barrier_arrive(slab.full(at));
        }
        more = !window.last;
      }
    }
  }

  VDIT_DEVICE static void pass_item(Params const& a, Shared& s, Turn const& turn) {
    if (lane_idx() == 0) {
      Item const item = take_item(a);
      barrier_wait(&s.item_empty[turn.stage], turn.parity ^ 1);
      s.items[turn.stage] = item;
      barrier_arrive(&s.item_full[turn.stage]);
    }
    sync_warp();
  }

  // A box of 64 rows a consumer. Where q_index says which rows, consumers gather them: a box a row would keep
  // one warp busy for longer than many stages take.
  VDIT_DEVICE static void load_queries(Params const& a, Shared& s, Item const& item, int parity) {
    if (lane_idx() != 0) return;
    barrier_wait(&s.q_empty, parity ^ 1);
    WorkPart const* parts = item.work.part;
    barrier_arrive_expect(&s.q_full, (groups_of(parts[0]) + groups_of(parts[1])) * kQueryBytes);
    char* queries = s.queries;
    for (int i = 0; i < 2; ++i) {
      for (int row = 0; row < parts[i].rows; row += 64, queries += kQueryBytes) {
        CUTE_UNROLL
        for (int slab = 0; slab < kSlabs; ++slab) {
          tma_load(queries + slab * kQuerySlab, a.q, &s.q_full, slab * 64, parts[i].row0 + row, item.map.head,
                   item.map.batch);
        }
      }
    }
  }

  // Consumers that a part keeps busy.
  VDIT_DEVICE static int groups_of(WorkPart const& part) { return (part.rows + 63) / 64; }

  // ---- Consumers -----------------------------------------------------------------------------------------
  // A thread's scores: rows lane / 4 and 8 below (half), columns 8 n + 2 (lane % 4) and the next (pair), at
  // [n * 4 + half * 2 + pair]; outputs likewise.

  static constexpr int kScores = kBlockN / 2;
  static constexpr int kOutputs = kHeadDim / 2;
  // Head size 64 has as many cycles of exponentials as of products. The FMA lanes take those of this many
  // tiles of 8 columns a stage; each costs ten instructions, and with more of them their issue would be what
  // binds.
  static constexpr int kFmaTiles = kHeadDim == 64 ? 1 : 0;
  static constexpr float kRaise = 8.f;  // as in kernel_sm80.cuh: a maximum is raised only by more than 2^8

  struct RowStats {
    float max[2] = {-INFINITY, -INFINITY};  // of raw scores, perhaps kRaise behind
    float sum[2] = {0.f, 0.f};              // this thread's columns only, until finish()
  };

  // o += probabilities * values, in flight when this returns.
  VDIT_DEVICE static void multiply_values(uint32_t const (&p)[kScores / 2], char const* values,
                                          float (&o)[kOutputs]) {
    uint64_t const first = wgmma_descriptor(values, SmemSwizzle::k128, kKeySlab, 8 * kRowBytes);
    CUTE_UNROLL
    for (int i = 0; i < kBlockN / 16; ++i) {
      uint32_t const a[4] = {p[i * 4], p[i * 4 + 1], p[i * 4 + 2], p[i * 4 + 3]};
      uint64_t const v = wgmma_advance(first, i * 16 * kRowBytes);
      if constexpr (kHeadDim == 96) {  // one and a half slabs, which one instruction does not take
        wgmma_rs<T, 64, Major::kMN>(*reinterpret_cast<float (*)[32]>(&o[0]), a, v, true);
        wgmma_rs<T, 32, Major::kMN>(*reinterpret_cast<float (*)[16]>(&o[32]), a, wgmma_advance(v, kKeySlab),
                                    true);
      } else {
        wgmma_rs<T, kHeadDim, Major::kMN>(o, a, v, true);
      }
    }
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
      float const exponent = s[i] * exponent_scale - base[i / 2 % 2];
      s[i] = i / 4 < kFmaTiles ? fma_exp2(exponent) : fast_exp2(exponent);
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

  // Waits for the next stage of keys, and says whether `part` of the item sees it; then `step` is what is
  // told with it.
  VDIT_DEVICE static bool sees_next(Shared& s, Place const& at, int part, Step& step) {
    barrier_wait(&s.k_full[at.stage], at.parity);
    Step const next = s.steps[at.stage];
    bool const mine = (next.parts >> part & 1) != 0;
    if (mine) step = next;
    return mine;
  }

  // Finds the next stage that `part` sees, lets those before pass, and says whether there is one. Nothing of
  // earlier stages may be left to do: the other part might wait for their room.
  VDIT_DEVICE static bool find_next(Shared& s, Place& k_at, Place& v_at, int part, Step& step) {
    while (!sees_next(s, k_at, part, step)) {
      bool const last = s.steps[k_at.stage].last;
      sync_warp();
      release(&s.k_empty[k_at.stage]);
      k_at.advance();
      barrier_wait(&s.v_full[v_at.stage], v_at.parity);  // or it would count as given back twice
      sync_warp();
      release(&s.v_empty[v_at.stage]);
      v_at.advance();
      if (last) return false;
    }
    return true;
  }

  // Scores of a stage of keys that is there, in flight when this returns. `issue` starts further products
  // within the same turn.
  template <class Issue>
  VDIT_DEVICE static void start_scores(Shared& s, char const* queries, Place const& at, int group, int groups,
                                       float (&scores)[kScores], Issue const& issue) {
    take_turn(group, groups);
    wgmma_fence();
    multiply_slabs<T, kHeadDim, kBlockN>(queries, s.keys[at.stage], scores);
    wgmma_commit();
    issue();
    pass_turn(group, groups);
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

  // Gathered queries are the warpgroup's own.
  VDIT_DEVICE static void give_back_queries(Params const& a, Shared& s) {
    if (a.attention.q_index == nullptr) release(&s.q_empty);
  }

  // A consumer's share of an item.
  struct Share {
    Map map;
    int32_t row0, rows;  // of the queries; no rows: none
    int32_t part;        // of the item
    int32_t groups;      // consumers that take turns
  };

  VDIT_DEVICE static Share share_of(Item const& item, int group) {
    int const first = groups_of(item.work.part[0]);
    int const part = group < first ? 0 : 1, row = (group - part * first) * 64;
    int32_t const row0 = item.work.part[part].row0, rows = item.work.part[part].rows;
    // The parts of a pair have different numbers of windows, and no turns.
    return {item.map, row0 + row, rows - row, part, item.work.part[1].rows > 0 ? 1 : first};
  }

  // One item's 64 rows of this warpgroup.
  VDIT_DEVICE static void attend(Params const& a, Shared& s, Share const& share, int group, Place& k_at,
                                 Place& v_at) {
    BlockSparseAttentionParams const& p = a.attention;
    constexpr float kLog2E = 1.44269504088896341f;
    float const exponent_scale = p.scale == 0.f ? 1.f : fabsf(p.scale) * kLog2E;
    char const* queries = s.queries + group * kQueryBytes;

    float scores[kScores], o[kOutputs];
    uint32_t probabilities[kScores / 2];
    CUTE_UNROLL
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.f;
    RowStats stats;
    float factor[2];
    Step step{};

    while (!step.last && find_next(s, k_at, v_at, share.part, step)) {
      start_scores(s, queries, k_at, group, share.groups, scores, [] {});
      finish_scores<0>(s, k_at, scores);
      if (weigh_scores(scores, step.rows, stats, p.scale, exponent_scale, factor)) scale_outputs(o, factor);
      pack(scores, probabilities);

      // This step's scores and the last one's outputs.
      while (!step.last && sees_next(s, k_at, share.part, step)) {
        wgmma_fence_operand(scores);
        start_scores(s, queries, k_at, group, share.groups, scores,
                     [&] { start_outputs(s, v_at, probabilities, o); });
        finish_scores<1>(s, k_at, scores);
        bool const raised = weigh_scores(scores, step.rows, stats, p.scale, exponent_scale, factor);
        // NOTE: never true. It ends a basic block: without it ptxas moves the exponentials behind the wait,
        // and then nothing is done while the outputs' product runs. bench/loop_cost.py shows where they are.
        if (warp_any(stats.sum[0] + stats.sum[1] < 0.f)) trap("a sum of powers of two is negative");
        finish_outputs(s, v_at, o);
        if (raised) scale_outputs(o, factor);
        pack(scores, probabilities);
      }
      if (step.last) give_back_queries(a, s);  // the next item's queries and keys come meanwhile
      start_outputs(s, v_at, probabilities, o);
      finish_outputs(s, v_at, o);
    }
    if (!step.last) give_back_queries(a, s);

    Map const& map = share.map;
    QueryRows const rows(p, map.batch, map.head, share.row0, share.rows);
    finish(stats, o, exponent_scale, step.bad, rows,
           p.lse + map.batch * p.stride_lse.b + map.head * p.stride_lse.h);
    T* out = static_cast<T*>(p.out) + map.batch * p.stride_out.b + map.head * p.stride_out.h;
    store_out(o, out, p.stride_out.s, rows);
  }

  // A warpgroup without rows lets an item's stages pass.
  VDIT_DEVICE static void skip(Params const& a, Shared& s, Place& k_at, Place& v_at) {
    give_back_queries(a, s);
    Step step;
    find_next(s, k_at, v_at, kNoPart, step);
  }

  // Adds up the quads' sums, divides, and writes lse. A row that saw nothing gets 0 and -inf; NaN everywhere
  // when the list named a block that does not exist.
  VDIT_DEVICE static void finish(RowStats& stats, float (&o)[kOutputs], float exponent_scale, bool bad,
                                 QueryRows const& rows, float* lse) {
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
      int32_t const row = rows.at(warp_idx() % 4 * 16 + half * 8 + lane_idx() / 4);
      float const value =
          bad ? NAN : (empty ? -INFINITY : stats.max[half] * exponent_scale * kLn2 + logf(sum));
      if (lane_idx() % 4 == 0 && row >= 0) lse[row] = value;
    }
  }

  // Word i of lane j of a quad becomes word j of lane i.
  VDIT_DEVICE static void transpose_quads(uint32_t (&w)[4]) {
    CUTE_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
      bool const upper = (lane_idx() & bit) != 0;
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if ((i & bit) != 0) continue;
        uint32_t const got = shfl_xor(upper ? w[i] : w[i + bit], bit);
        (upper ? w[i] : w[i + bit]) = got;
      }
    }
  }

  // A thread has two columns of each 8. The four of a quad exchange them for 8 columns of one 8 each, so that
  // global stores are of 16 bytes, and 64 of a row side by side.
  VDIT_DEVICE static void store_out(float const (&o)[kOutputs], T* out, int64_t stride,
                                    QueryRows const& rows) {
    int const quad = lane_idx() % 4;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int64_t const row = rows.at(warp_idx() % 4 * 16 + half * 8 + lane_idx() / 4);
      CUTE_UNROLL
      for (int n = 0; n < kHeadDim / 8; n += 4) {
        uint32_t words[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          words[i] = pack2<T>(o[(n + i) * 4 + half * 2], o[(n + i) * 4 + half * 2 + 1]);
        }
        transpose_quads(words);
        if (row >= 0) {
          *reinterpret_cast<uint4*>(out + row * stride + (n + quad) * 8) =
              uint4{words[0], words[1], words[2], words[3]};
        }
      }
    }
  }

  // This warpgroup's rows into its part of the queries, as TMA would have laid them.
  VDIT_DEVICE static void gather_queries(Params const& a, Shared& s, Share const& share, int group) {
    BlockSparseAttentionParams const& p = a.attention;
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, a row
    T const* q = static_cast<T const*>(p.q) + share.map.batch * p.stride_q.b + share.map.head * p.stride_q.h;
    QueryRows const rows(p, share.map.batch, share.map.head, share.row0, share.rows);
    CUTE_UNROLL
    for (int i = 0; i < 64 * kChunks / 128; ++i) {
      int const at = thread_idx() % 128 + i * 128, row = at / kChunks, chunk = at % kChunks;
      int64_t const source = rows.at(row);
      char* to = s.queries + group * kQueryBytes + chunk / 8 * kQuerySlab + row * kRowBytes;
      cp_async_16(to + ((chunk % 8) ^ (row % 8)) * 16,
                  q + (source >= 0 ? source * p.stride_q.s : 0) + chunk * 8, source >= 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_async_proxy();  // wgmma reads them
    named_sync(1 + kConsumers + group, 128);
  }

  VDIT_DEVICE static void consume(Params const& a, Shared& s, int group) {
    Place k_at, v_at;
    Turn turn;
    bool const gathers = a.attention.q_index != nullptr;
    if (group == kConsumers - 1) named_arrive(1, 256);  // the first turn is group 0's
    for (int parity = 0;; parity ^= 1, turn.advance()) {
      barrier_wait(&s.item_full[turn.stage], turn.parity);
      if (s.items[turn.stage].work.part[0].rows == 0) break;
      Share const share = share_of(s.items[turn.stage], group);
      sync_warp();
      release(&s.item_empty[turn.stage]);
      // Also without rows: queries that were given back before they came would count as given back twice.
      if (!gathers) barrier_wait(&s.q_full, parity);
      sync_warp();  // lane 0 gives them back for all, who must have seen this phase
      if (share.rows > 0) {
        if (gathers) gather_queries(a, s, share, group);
        attend(a, s, share, group, k_at, v_at);
      } else {
        skip(a, s, k_at, v_at);
      }
    }
    if (group == 0) named_sync(1, 256);
  }

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    Shared& s = *reinterpret_cast<Shared*>(smem);
    constexpr int kProducers = 2 * kSlabs;
    if (thread_idx() == 0) {
      for (int i = 0; i < kItems; ++i) {
        barrier_init(&s.item_full[i], 1);
        barrier_init(&s.item_empty[i], kConsumers * 4 + kProducers - 1);
      }
      barrier_init(&s.q_full, 1);
      barrier_init(&s.q_empty, kConsumers * 4);
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&s.k_full[i], kSlabs);
        barrier_init(&s.v_full[i], kSlabs);
        barrier_init(&s.k_empty[i], kConsumers * 4);
        barrier_init(&s.v_empty[i], kConsumers * 4);
      }
      fence_barrier_init();
    }
    sync_block();
    // Told by lane 0: the compiler then knows that a warp is of one mind.
    int const group = shfl(thread_idx() / 128, 0);
    if (group == kConsumers) {
      set_max_registers_down<kTile.producer_registers>();
      int const warp = warp_idx() - kConsumers * 4;
      if (warp < kSlabs) produce<true>(a, s, warp);
      if (warp >= 2 && warp < 2 + kSlabs) produce<false>(a, s, warp - 2);
    } else {
      set_max_registers_up<kTile.consumer_registers>();
      consume(a, s, group);
    }
  }
};

}  // namespace vdit::sm90
