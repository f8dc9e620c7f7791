// block_mass and block_mass_topk: q k^T without values, whose exponentials are summed over blocks of rows and
// keys.
//
// A thread block owns 128 rows, whose fragments stay in registers, and streams the keys past them, 64 at a
// time, double buffered. Rows come in units of 16, what a warp's mma has, and a unit belongs to one query
// block: two blocks of 64 share each read of the keys, as eight of up to 16 do. A query block of more than
// 128 rows takes several passes.
//
// A key block's sum is formed in registers over its steps, across a warp by shuffles, across warps through
// shared memory in the order of the units: equal inputs give equal bits. For block_mass_topk the rows of
// masses stay in shared memory and are sorted there.
#pragma once
#include "attention/kernel_mass_lists.cuh"
#include "vdit/attention.h"

namespace vdit {

struct BlockMassLaunch {
  BlockMassTopkParams topk;  // total null: only the masses are wanted, in topk.row.mass
  int32_t units;             // of 16 rows, a query block in one pass
  int32_t groups;            // query blocks a thread block
  int32_t passes;            // over the keys, each with up to 128 rows of the query block
  int32_t rows_at;           // where in shared memory the rows of masses begin
};

// Grid: x tiles of `groups` query blocks, y heads, z batch. Rows of q and k must be 16-byte aligned.
template <class T, int kHeadDim>
struct BlockMassKernel {
  using Params = BlockMassLaunch;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kMinBlocks = 3;
  static constexpr int kBlockM = 128;
  static constexpr int kBlockN = 64;
  static constexpr int kUnits = kBlockM / 16;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, a row

  using SmemQ = typename SwizzledRows<kHeadDim>::template Tile<kBlockM>;
  using SmemK = typename SwizzledRows<kHeadDim>::template Tile<kBlockN>;
  using TiledMma = decltype(cute::make_tiled_mma(MmaAtom_m16n8k16<T>{},
                                                 cute::Layout<cute::Shape<cute::_4, cute::_1, cute::_1>>{},
                                                 cute::Tile<cute::_64, cute::_16, cute::_16>{}));

  // Shared memory: two stages of keys, where the queries lie before them and the sorted lists after them; the
  // units' sums of a key block, twice; the rows of masses.
  static constexpr int kStageElements = kBlockN * kHeadDim;
  static constexpr int kStagesBytes = 2 * kStageElements * 2;
  static constexpr int kPartialBytes = 2 * kUnits * 4;
  static_assert(kBlockM * kHeadDim * 2 == kStagesBytes, "The queries take the place of the stages.");

  // Scores are formed for kPartN of a step's keys at a time, so that their registers are few. The
  // accumulators' view of a thread: rows (m, half), columns (n, pair).
  static constexpr int kPartN = 32;
  static constexpr int kM = kBlockM / 64;
  static constexpr int kN = kPartN / 8;
  using Scores = decltype(cute::partition_fragment_C(
      TiledMma{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kPartN>>{}));  // ((2, 2), kM, kN)

  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLargestExponent = 30.f * kLog2E;

  // Which keys a step covers: 64 of one key block, or what is left of it. Rows are 32-bit, as offsets are
  // elsewhere.
  struct KeySteps {
    int32_t block_size, length;
    int32_t block = 0, in_block = 0;  // the key block, and the step's first key in it

    VDIT_DEVICE KeySteps(BlockMassParams const& p, int32_t keys)
        : block_size(p.kv_block_size), length(keys) {}
    VDIT_DEVICE int32_t first() const { return block * block_size + in_block; }
    VDIT_DEVICE int32_t keys() const {
      int32_t const in_sequence = length - first(), left = block_size - in_block;
      return clamp_to<int32_t>(left < in_sequence ? left : in_sequence, 0, kBlockN);
    }
    VDIT_DEVICE bool ends_block() const { return in_block + kBlockN >= block_size; }
    VDIT_DEVICE void advance() {
      bool const ends = ends_block();
      block += ends;
      in_block = ends ? 0 : in_block + kBlockN;
    }
  };

  // A thread's rows: -lse in units of log 2; +inf where there is no row, or one that has seen no key.
  struct Rows {
    float neg_lse[kM][2];

    VDIT_DEVICE float counted(int m, int half, float sum) const {
      return neg_lse[m][half] == INFINITY ? 0.f : sum;
    }
  };

  VDIT_DEVICE static int64_t first_block(Params const& p) {
    return static_cast<int64_t>(block_idx_x()) * p.groups;
  }

  // How many query blocks the thread block has.
  VDIT_DEVICE static int count_groups(Params const& p) {
    return static_cast<int>(clamp_to<int64_t>(p.topk.row.num_q_blocks - first_block(p), 0, p.groups));
  }

  // The masses of the first of them for every key block; the others' follow.
  VDIT_DEVICE static float* mass_rows(Params const& p, char* smem) {
    BlockMassParams const& a = p.topk.row;
    if (p.topk.total != nullptr) return reinterpret_cast<float*>(smem + p.rows_at);
    return a.mass + (map_index() * a.num_q_blocks + first_block(p)) * a.num_kv_blocks;
  }

  // The query row in a slot of the tile, or -1.
  VDIT_DEVICE static int64_t row_in_slot(Params const& p, int pass, int slot) {
    int const unit = slot / 16, group = unit / p.units;
    int64_t const block = first_block(p) + group,
                  in_block = (pass * kUnits + unit % p.units) * 16 + slot % 16;
    int64_t const row = block * p.topk.row.q_block_size + in_block;
    bool const valid = group < p.groups && block < p.topk.row.num_q_blocks &&
                       in_block < p.topk.row.q_block_size && row < p.topk.row.seqlen_q;
    return valid ? row : -1;
  }

  VDIT_DEVICE static void fetch_queries(Params const& p, T const* q, int pass, T* smem) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(smem), SmemQ{});
    CUTE_NO_UNROLL
    for (int i = 0; i < kBlockM * kChunks / kThreads; ++i) {
      int const item = thread_idx() + i * kThreads;
      int const slot = item / kChunks, col = item % kChunks * 8;
      int64_t const row = row_in_slot(p, pass, slot);
      cp_async_16(&tile(slot, col), q + (row >= 0 ? row * p.topk.row.stride_q.s : 0) + col, row >= 0);
    }
  }

  VDIT_DEVICE static Rows load_rows(Params const& p, float const* lse, int pass) {
    Rows rows;
    CUTE_UNROLL
    for (int m = 0; m < kM; ++m) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        int const slot = m * 64 + warp_idx() * 16 + half * 8 + lane_idx() / 4;
        int64_t const row = row_in_slot(p, pass, slot);
        float const value = row >= 0 ? lse[row * p.topk.row.stride_lse.s] : -INFINITY;
        rows.neg_lse[m][half] = -value * kLog2E;
      }
    }
    return rows;
  }

  // The step's keys into a stage; past them zeros.
  VDIT_DEVICE static void fetch_keys(KeySteps const& at, T const* k, int64_t stride, T* smem) {
    auto tile = cute::make_tensor(cute::make_smem_ptr(smem), SmemK{});
    int const keys = at.keys(), thread = not_hoisted(thread_idx());  // registers are scarce
    T const* first = k + at.first() * stride;
    CUTE_UNROLL
    for (int i = 0; i < kBlockN * kChunks / kThreads; ++i) {
      int const item = thread + i * kThreads;
      int const r = item / kChunks, col = item % kChunks * 8;
      cp_async_16(&tile(r, col), r < keys ? first + r * stride + col : k, r < keys);
    }
  }

  // s = q k^T for the kPartN keys from `first` on. Keys are read 16 at a time, kAhead reads ahead of the
  // products, so that few of their registers are live.
  template <class Queries>
  VDIT_DEVICE static void multiply(Queries const& rQ, T* smem_k, int first, Scores& s) {
    using namespace cute;
    constexpr int kAhead = 2;
    constexpr int kPairs = kN / 2;  // of 8 keys
    constexpr int kSteps = kHeadDim / 16 * kPairs;
    TiledMma mma;
    auto load = make_tiled_copy_B(LdsmAtom<T>{}, mma);
    auto thr_load = load.get_slice(not_hoisted(thread_idx()));  // registers are scarce
    auto sK = make_tensor(make_smem_ptr(smem_k), SmemK{});
    auto rK = mma.get_slice(thread_idx())
                  .partition_fragment_B(
                      local_tile(sK, Shape<Int<kPartN>, Int<kHeadDim>>{}, make_coord(_0{}, _0{})));
    auto from = thr_load.partition_S(sK);
    auto to = thr_load.retile_D(rK);
    auto load_keys = [&](int step) {
      copy(load, from(_, first / 16 + step % kPairs, step / kPairs), to(_, step % kPairs, step / kPairs));
    };
    clear(s);
    CUTE_UNROLL
    for (int step = 0; step < kAhead; ++step) load_keys(step);
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (step + kAhead < kSteps) load_keys(step + kAhead);
      CUTE_UNROLL
      for (int n = step % kPairs * 2; n < step % kPairs * 2 + 2; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < kM; ++m) {
          gemm(mma, rQ(_, m, step / kPairs), rK(_, n, step / kPairs), s(_, m, n));
        }
      }
    }
  }

  // Adds the terms of kPartN keys to the rows' sums. Terms past the last key are left out whatever they
  // are.
  template <bool kWhole>
  VDIT_DEVICE static void add_terms(Scores const& s, Rows const& rows, float scale, int keys,
                                    float (&sums)[kM][2]) {
    CUTE_UNROLL
    for (int n = 0; n < kN; ++n) {
      CUTE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        bool const counts = kWhole || n * 8 + lane_idx() % 4 * 2 + pair < keys;
        CUTE_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
          int const m = i / 2, half = i % 2;
          float const exponent = s(cute::make_coord(pair, half), m, n) * scale + rows.neg_lse[m][half];
          float const term = fast_exp2(min_or_nan(exponent, kLargestExponent));
          sums[m][half] += counts ? term : 0.f;
        }
      }
    }
  }

  // The sums of this warp's units into partial[kUnits]; starts the next key block.
  VDIT_DEVICE static void store_partial(Rows const& rows, float (&sums)[kM][2], float* partial) {
    CUTE_UNROLL
    for (int m = 0; m < kM; ++m) {
      float const mine = rows.counted(m, 0, sums[m][0]) + rows.counted(m, 1, sums[m][1]);
      float const sum = warp_sum(mine);
      if (lane_idx() == 0) partial[m * kWarps + warp_idx()] = sum;
      sums[m][0] = sums[m][1] = 0.f;
    }
  }

  // A key block's mass for every query block, from all units. One warp does it, each in its turn.
  VDIT_DEVICE static void finish_block(Params const& p, char* smem, float const* partial, int32_t block,
                                       int pass) {
    int const group = lane_idx();
    if (warp_idx() != block % kWarps || group >= count_groups(p)) return;
    partial += block % 2 * kUnits;
    float sum = 0.f;
    for (int unit = group * p.units; unit < (group + 1) * p.units; ++unit) sum += partial[unit];
    float& mass = mass_rows(p, smem)[group * p.topk.row.num_kv_blocks + block];
    mass = pass == 0 ? sum : mass + sum;
  }

  // All masses of the thread block's query blocks. What is behind the last key has none.
  VDIT_DEVICE static void sum_masses(Params const& p, char* smem) {
    using namespace cute;
    BlockMassParams const& a = p.topk.row;
    int64_t const b = block_idx_z(), h = block_idx_y();
    T const* q = static_cast<T const*>(a.q) + b * a.stride_q.b + h * a.stride_q.h;
    T const* k = static_cast<T const*>(a.k) + b * a.stride_k.b + h * a.stride_k.h;
    float const* lse = a.lse + b * a.stride_lse.b + h * a.stride_lse.h;
    int32_t length = static_cast<int32_t>(a.seqlen_kv);
    if (a.kv_lengths != nullptr) length = clamp_to<int32_t>(a.kv_lengths[b * a.stride_kv_lengths], 0, length);
    int32_t const live = static_cast<int32_t>((int64_t{length} + a.kv_block_size - 1) / a.kv_block_size);
    T* stages = reinterpret_cast<T*>(smem);
    float* partial = reinterpret_cast<float*>(smem + p.rows_at - kPartialBytes);  // [2, kUnits]
    float const scale = a.scale * kLog2E;

    TiledMma mma;
    auto sQ = make_tensor(make_smem_ptr(stages), SmemQ{});
    auto rQ = mma.get_slice(thread_idx()).partition_fragment_A(sQ);
    auto load_q = make_tiled_copy_A(LdsmAtom<T>{}, mma);
    auto thr_load_q = load_q.get_slice(thread_idx());

    for (int group = 0; group < count_groups(p); ++group) {
      float* row = mass_rows(p, smem) + group * a.num_kv_blocks;
      for (int64_t j = live + thread_idx(); j < a.num_kv_blocks; j += kThreads) row[j] = 0.f;
    }
    for (int pass = 0; pass < p.passes; ++pass) {
      Rows const rows = load_rows(p, lse, pass);
      fetch_queries(p, q, pass, stages);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      copy(load_q, thr_load_q.partition_S(sQ), thr_load_q.retile_D(rQ));
      sync_block();  // the keys take the queries' place

      KeySteps now(a, length);
      fetch_keys(now, k, a.stride_k.s, stages);
      cp_async_commit();
      float sums[kM][2] = {};
      for (int stage = 0; now.block < live; stage ^= 1) {
        cp_async_wait<0>();
        sync_block();  // the keys are here, and every warp has left the step before
        KeySteps next = now;
        next.advance();
        if (next.block < live) fetch_keys(next, k, a.stride_k.s, stages + (stage ^ 1) * kStageElements);
        cp_async_commit();
        if (now.in_block == 0 && now.block > 0) finish_block(p, smem, partial, now.block - 1, pass);

        T* smem_k = stages + stage * kStageElements;
        int const keys = now.keys();
        CUTE_NO_UNROLL
        for (int first = 0; first < kBlockN; first += kPartN) {
          Scores s;
          multiply(rQ, smem_k, first, s);
          if (keys - first >= kPartN) {
            add_terms<true>(s, rows, scale, keys - first, sums);
          } else {
            add_terms<false>(s, rows, scale, keys - first, sums);
          }
        }
        if (now.ends_block()) store_partial(rows, sums, partial + now.block % 2 * kUnits);
        now = next;
      }
      cp_async_wait<0>();
      sync_block();
      if (live > 0) finish_block(p, smem, partial, live - 1, pass);
    }
    sync_block();  // every mass is in its place
  }

  VDIT_DEVICE void operator()(Params const& p, char* smem) const {
    sum_masses(p, smem);
    if (p.topk.total == nullptr) return;
    list_heaviest<kThreads>(p.topk, first_block(p), count_groups(p), mass_rows(p, smem),
                            reinterpret_cast<uint16_t*>(smem), [] { sync_block(); });
  }
};

}  // namespace vdit
