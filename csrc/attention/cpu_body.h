// Bodies of the attention family's CPU kernels, compiled once per instruction set: the unit that includes
// this file has included one simd_*.h before. Everything is internal to the unit, and nothing of the standard
// library that leaves an inline symbol is used (see element.h for why).
//
// Layout of the attention kernel. Query rows lie in the lanes of a vector, keys and head dimensions in its
// time: a tile of scores is S^T [keys, rows] and the accumulator is O^T [d, rows]. Then
//   - K and V are read as broadcasts, row by row as they are stored: no packing beyond a dense copy, and
//     a tile can be filled with rows from any mixture of ragged blocks,
//   - maxima, sums and rescaling of the softmax are lane by lane, with no reduction across a vector,
//   - padding exists only in the lanes behind the last query row, so nothing of it can reach a result.
// The cost is one transpose of Q and of O per item.
//
// Numbers are kept in 32-bit words. With kDot (bf16 and hardware for it) a word holds two bf16 neighbours of
// the contracted dimension; otherwise it is one fp32 value.
#pragma once
#include "attention/cpu_kernels.h"

#define VDIT_UNROLL _Pragma("GCC unroll 16")

namespace vdit {
namespace {

using Vec = Simd::Vec;
constexpr int kLanes = Simd::kLanes;
constexpr int kRows = Simd::kRows;

// Keys per tile. GFLOP/s of one busy AMD EPYC core, 128-row blocks, density 0.1, noise about 10 %:
//   keys    fp32 d 64   fp32 d 128   bf16 d 64   bf16 d 128
//     32       160         156          295         299
//     64     148-158     166-173      260-299     288-341
//    128       156         161          268         305
//    192       155         148          271         293
// A register block of 8 rows by 2 vectors (AVX-512) instead of 3: 167, 169, 257, 328.
constexpr int kTileKeys = 64;
// Words between the rows of a tile: an odd number of cache lines, so that rows do not share cache sets.
constexpr int kTilePitch = kCpuMaxHeadDim + 16;

struct alignas(64) Scratch {
  float q[kCpuMaxHeadDim * kCpuItemRows];    // per group of vectors: [words of d, rows]
  float out[kCpuMaxHeadDim * kCpuItemRows];  // per group: [d, rows]
  float k[kTileKeys * kTilePitch];           // [keys, words of d]
  float v[kTileKeys * kTilePitch];           // [keys, d], or [key pairs, d]
  float s[kTileKeys * Simd::kMaxVecs * kLanes];
  float max[kCpuItemRows], sum[kCpuItemRows];  // max is that of the scaled scores, in units of log 2
  char const* key_row[kTileKeys];
  char const* value_row[kTileKeys];
};

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- register block ----

// The bf16 functions of Simd exist in one unit only; S makes their names depend on a template argument.
template <bool kDot, class S = Simd>
inline Vec multiply_add(Vec a, Vec b, Vec acc) {
  if constexpr (kDot) {
    return S::dot(acc, a, b);
  } else {
    return S::fma(a, b, acc);
  }
}

// acc[r][v] += sum over t < depth of lanes[t][v] * rows[r * kRowStride + t * kDepthStride]
template <bool kDot, int kVecs, int kRowStride, int kDepthStride>
inline void multiply(Vec (&acc)[kRows][kVecs], float const* lanes, float const* rows, int depth) {
  for (int t = 0; t < depth; ++t) {
    Vec lane[kVecs];
    VDIT_UNROLL
    for (int v = 0; v < kVecs; ++v) lane[v] = Simd::load(lanes + v * kLanes);
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Vec const row = Simd::set1(rows[r * kRowStride]);
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[r][v] = multiply_add<kDot>(lane[v], row, acc[r][v]);
    }
    lanes += kVecs * kLanes;
    rows += kDepthStride;
  }
}

// ---- rows in and out ----

// Words of one row of head_dim elements.
template <bool kDot>
inline int words_of(int head_dim) {
  return kDot ? (head_dim + 1) / 2 : head_dim;
}

template <bool kDot, class T>
inline void copy_row(T const* x, float* words, int head_dim) {
  int d = 0;
  if constexpr (kDot) {
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
      Simd::store(words + d / 2, Simd::load(reinterpret_cast<float const*>(x + d)));
    for (; d < head_dim; d += 2)
      words[d / 2] =
          float_from_bits(x[d].bits | (d + 1 < head_dim ? static_cast<uint32_t>(x[d + 1].bits) << 16 : 0u));
  } else {
    for (; d + kLanes <= head_dim; d += kLanes) Simd::store(words + d, Simd::load(x + d));
    for (; d < head_dim; ++d) words[d] = to_float(x[d]);
  }
}

// words[d] = (even[d], odd[d])
template <class T, class S = Simd>
inline void copy_row_pair(T const* even, T const* odd, float* words, int head_dim) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Simd::store(words + d, S::load_pairs(even + d, odd + d));
  for (; d < head_dim; ++d)
    words[d] = float_from_bits(even[d].bits | static_cast<uint32_t>(odd[d].bits) << 16);
}

template <class T>
inline void store_row(float const* x, T* out, int head_dim) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Simd::store(out + d, Simd::load(x + d));
  for (; d < head_dim; ++d) out[d] = from_float<T>(x[d]);
}

inline void transpose_block(float const* in, int in_pitch, float* out, int out_pitch, int out_rows) {
  Vec r[kLanes];
  VDIT_UNROLL
  for (int i = 0; i < kLanes; ++i) r[i] = Simd::load(in + i * in_pitch);
  Simd::transpose(r);
  VDIT_UNROLL
  for (int i = 0; i < kLanes; ++i)
    if (i < out_rows) Simd::store(out + i * out_pitch, r[i]);
}

// A group is kVecs vectors of rows that pass through the register block together.
struct Group {
  int first_vec, vecs;
};

// Group `i` of as few, and as equal, groups as kMaxVecs allows.
inline Group group_of(int i, int groups, int vecs) {
  int const begin = i * vecs / groups, end = (i + 1) * vecs / groups;
  return {begin, end - begin};
}

inline int vecs_of(int rows) { return (rows + kLanes - 1) / kLanes; }
inline int groups_of(int vecs) { return (vecs + Simd::kMaxVecs - 1) / Simd::kMaxVecs; }

// q: `rows` rows into lanes, zeros behind the last. `negate` flips the sign, which is exact.
template <bool kDot, class T>
void pack_rows(T const* x, int64_t stride, int32_t const* index, int rows, int head_dim, bool negate,
               Scratch& t) {
  int const words = words_of<kDot>(head_dim), vecs = vecs_of(rows), groups = groups_of(vecs);
  float* const stage = t.k;  // [kLanes, kTilePitch]
  for (int g = 0; g < groups; ++g) {
    Group const group = group_of(g, groups, vecs);
    float* const base = t.q + group.first_vec * kLanes * words;
    for (int v = 0; v < group.vecs; ++v) {
      int const first = (group.first_vec + v) * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        float* const row = stage + i * kTilePitch;
        if (first + i < rows) {
          int64_t const source = index ? index[first + i] : first + i;
          copy_row<kDot>(x + source * stride, row, head_dim);
        } else {
          std::memset(row, 0, sizeof(float) * words);
        }
        if (!negate) continue;
        uint32_t const sign = kDot ? 0x80008000u : 0x80000000u;
        for (int d = 0; d < words; ++d) row[d] = float_from_bits(float_bits(row[d]) ^ sign);
      }
      for (int d = 0; d < words; d += kLanes) {
        transpose_block(stage + d, kTilePitch, base + (d * group.vecs + v) * kLanes, group.vecs * kLanes,
                        words - d);
      }
    }
  }
}

template <class T>
inline float sum_squares(T const* x, int head_dim) {
  Vec acc = Simd::set1(0.f);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) acc = Simd::fma(Simd::load(x + d), Simd::load(x + d), acc);
  float lane[kLanes], sum = 0.f;
  Simd::store(lane, acc);
  for (int i = 0; i < kLanes; ++i) sum += lane[i];
  for (; d < head_dim; ++d) sum += to_float(x[d]) * to_float(x[d]);
  return sum;
}

// ---- attention ----

// The keys of one query block, as one list of rows across the borders of the listed blocks.
class KeyStream {
 public:
  KeyStream(BlockSparseAttentionParams const& p, CpuItem const& item) : p_(p) {
    Strides3 const n = p.stride_num_blocks, l = p.stride_indices;
    count_ = p.kv_num_blocks[item.b * n.b + item.h * n.h + item.block * n.s];
    list_ = p.kv_indices + item.b * l.b + item.h * l.h + item.block * l.s;
    if (p.kv_offsets != nullptr)
      offsets_ = p.kv_offsets + item.b * p.stride_kv_offsets.b + item.h * p.stride_kv_offsets.h;
  }

  // Rows of the next range, or false. The range is cut at `limit` rows; the rest comes next.
  bool next(int64_t limit, int64_t& row, int64_t& rows) {
    while (row_ >= end_) {
      if (next_ >= count_) return false;
      int64_t const block = list_[next_++], size = p_.kv_block_size;
      row_ = offsets_ ? offsets_[block] : block * size;
      end_ = offsets_ ? offsets_[block + 1] : min64(row_ + size, p_.seqlen_kv);
    }
    row = row_;
    rows = min64(limit, end_ - row_);
    row_ += rows;
    return true;
  }

 private:
  BlockSparseAttentionParams const& p_;
  int32_t const* list_;
  int32_t const* offsets_ = nullptr;
  int64_t count_, next_ = 0, row_ = 0, end_ = 0;
};

template <bool kDot, class T>
int load_tile(KeyStream& keys, T const* k, int64_t stride_k, T const* v, int64_t stride_v, int head_dim,
              Scratch& t) {
  int count = 0;
  for (int64_t row, rows; count < kTileKeys && keys.next(kTileKeys - count, row, rows);) {
    for (int64_t i = 0; i < rows; ++i, ++count) {
      t.key_row[count] = reinterpret_cast<char const*>(k + (row + i) * stride_k);
      t.value_row[count] = reinterpret_cast<char const*>(v + (row + i) * stride_v);
    }
  }
  auto const key = [&](int n) { return reinterpret_cast<T const*>(t.key_row[n]); };
  auto const value = [&](int n) { return reinterpret_cast<T const*>(t.value_row[n]); };
  for (int n = 0; n < count; ++n) copy_row<kDot>(key(n), t.k + n * kTilePitch, head_dim);
  if constexpr (kDot) {
    int n = 0;
    for (; n + 1 < count; n += 2) copy_row_pair(value(n), value(n + 1), t.v + n / 2 * kTilePitch, head_dim);
    if (n < count)
      for (int d = 0; d < head_dim; ++d) t.v[n / 2 * kTilePitch + d] = float_from_bits(value(n)[d].bits);
  } else {
    for (int n = 0; n < count; ++n) copy_row<false>(value(n), t.v + n * kTilePitch, head_dim);
  }
  return count;
}

// s = K Q^T for one tile and one group; raises max to the largest score of each row. Behind the last key
// the register block reads stale rows of the tile: their scores are stored and never looked at.
template <bool kDot, int kVecs>
inline void score_tile(float const* q, float const* k, int words, int count, float* s, Vec (&max)[kVecs]) {
  for (int n = 0; n < count; n += kRows) {
    Vec acc[kRows][kVecs];
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Simd::set1(0.f);
    }
    multiply<kDot, kVecs, kTilePitch, 1>(acc, q, k + n * kTilePitch, words);
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        Simd::store(s + ((n + r) * kVecs + v) * kLanes, acc[r][v]);
        if (n + r < count) max[v] = Simd::max(max[v], acc[r][v]);
      }
    }
  }
}

// s = exp2(s * scale - max), sum += its rows. With kDot the result is in bf16 pairs of keys.
template <bool kDot, int kVecs, class S = Simd>
inline void exp_tile(float* s, int count, Vec scale, Vec const (&neg_max)[kVecs], Vec (&sum)[kVecs]) {
  constexpr int kWidth = kVecs * kLanes;
  auto const weight = [&](int n, int v) {
    Vec const x = Simd::fma(Simd::load(s + n * kWidth + v * kLanes), scale, neg_max[v]);
    Vec const p = Simd::exp2<!kDot>(x);
    sum[v] = Simd::add(sum[v], p);
    return p;
  };
  if constexpr (!kDot) {
    for (int n = 0; n < count; ++n) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v) Simd::store(s + n * kWidth + v * kLanes, weight(n, v));
    }
  } else {
    for (int n = 0; n < count; n += 2) {
      VDIT_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        Vec const even = weight(n, v), odd = n + 1 < count ? weight(n + 1, v) : Simd::set1(0.f);
        Simd::store(s + n / 2 * kWidth + v * kLanes, S::pack_bf16(even, odd));
      }
    }
  }
}

// out = out * factor + V^T P
template <bool kDot, int kVecs>
inline void accumulate_tile(float const* s, float const* v, int depth, int head_dim,
                            Vec const (&factor)[kVecs], float* out) {
  for (int d = 0; d < head_dim; d += kRows) {
    Vec acc[kRows][kVecs];
    float* const rows = out + d * kVecs * kLanes;
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VDIT_UNROLL
      for (int i = 0; i < kVecs; ++i)
        acc[r][i] = Simd::mul(Simd::load(rows + (r * kVecs + i) * kLanes), factor[i]);
    }
    multiply<kDot, kVecs, 1, kTilePitch>(acc, s, v + d, depth);
    VDIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VDIT_UNROLL
      for (int i = 0; i < kVecs; ++i) Simd::store(rows + (r * kVecs + i) * kLanes, acc[r][i]);
    }
  }
}

// One tile of keys against one group of rows: scores, online softmax, values.
template <bool kDot, int kVecs>
void attend_tile(Scratch& t, int first_vec, int count, int head_dim, float scale) {
  int const words = words_of<kDot>(head_dim), first = first_vec * kLanes;
  Vec const scale_vec = Simd::set1(scale);
  Vec max[kVecs], neg_max[kVecs], factor[kVecs], sum[kVecs];
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) max[v] = Simd::set1(-__builtin_inff());
  score_tile<kDot, kVecs>(t.q + first * words, t.k, words, count, t.s, max);
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    float* const old_max = t.max + first + v * kLanes;
    Vec const before = Simd::load(old_max), now = Simd::max(before, Simd::mul(max[v], scale_vec));
    Simd::store(old_max, now);
    // A row whose scores are all -inf so far has weights exp(-inf - 0) = 0 and no NaN.
    neg_max[v] = Simd::mul(Simd::zero_if_neg_inf(now), Simd::set1(-1.f));
    factor[v] = Simd::exp2<true>(Simd::add(before, neg_max[v]));
    sum[v] = Simd::mul(Simd::load(t.sum + first + v * kLanes), factor[v]);
  }
  exp_tile<kDot, kVecs>(t.s, count, scale_vec, neg_max, sum);
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) Simd::store(t.sum + first + v * kLanes, sum[v]);
  accumulate_tile<kDot, kVecs>(t.s, t.v, kDot ? (count + 1) / 2 : count, head_dim, factor,
                               t.out + first * head_dim);
}

template <bool kDot>
void attend_tile(Scratch& t, Group group, int count, int head_dim, float scale) {
  if (group.vecs == 1) return attend_tile<kDot, 1>(t, group.first_vec, count, head_dim, scale);
  if (group.vecs == 2) return attend_tile<kDot, 2>(t, group.first_vec, count, head_dim, scale);
  if constexpr (Simd::kMaxVecs >= 3) attend_tile<kDot, 3>(t, group.first_vec, count, head_dim, scale);
}

// Where an item's query rows are in q, out and lse; null: at item.row and on.
inline int32_t const* query_index(BlockSparseAttentionParams const& p, CpuItem const& item) {
  if (p.q_index == nullptr) return nullptr;
  return p.q_index + item.b * p.stride_q_index.b + item.h * p.stride_q_index.h + item.row;
}

// out / sum back to rows, and lse. A row with sum 0 has no key, or none above -inf: out 0, lse -inf.
template <class T>
void store_item(BlockSparseAttentionParams const& p, CpuItem const& item, Scratch& t) {
  int const head_dim = p.head_dim, vecs = vecs_of(item.rows), groups = groups_of(vecs);
  T* const out = static_cast<T*>(p.out) + item.b * p.stride_out.b + item.h * p.stride_out.h;
  float* const lse = p.lse ? p.lse + item.b * p.stride_lse.b + item.h * p.stride_lse.h : nullptr;
  int32_t const* const index = query_index(p, item);
  float* const stage = t.k;  // [kLanes, kTilePitch]
  for (int g = 0; g < groups; ++g) {
    Group const group = group_of(g, groups, vecs);
    for (int v = 0; v < group.vecs; ++v) {
      int const first = (group.first_vec + v) * kLanes, width = group.vecs * kLanes;
      float const* const base = t.out + group.first_vec * kLanes * head_dim + v * kLanes;
      for (int d = 0; d < head_dim; d += kLanes) {
        // The last block may read behind head_dim: other groups' words, or unused ones, cut off below.
        transpose_block(base + d * width, width, stage + d, kTilePitch, kLanes);
      }
      for (int i = 0; i < kLanes && first + i < item.rows; ++i) {
        float const sum = t.sum[first + i];
        float* const row = stage + i * kTilePitch;
        Vec const inverse = Simd::set1(1.f / sum);
        if (sum == 0.f) {
          std::memset(row, 0, sizeof(float) * head_dim);
        } else {
          for (int d = 0; d < head_dim; d += kLanes)
            Simd::store(row + d, Simd::mul(Simd::load(row + d), inverse));
        }
        int64_t const to = index ? index[first + i] : item.row + first + i;
        store_row(row, out + to * p.stride_out.s, head_dim);
        if (lse == nullptr) continue;
        float const log_max = t.max[first + i] * 0.69314718056f;
        lse[to] = sum == 0.f ? -__builtin_inff() : log_max + __builtin_logf(sum);
      }
    }
  }
}

template <bool kDot, class T>
void attend_item(BlockSparseAttentionParams const& p, CpuItem const& item, Scratch& t) {
  T const* const q = static_cast<T const*>(p.q) + item.b * p.stride_q.b + item.h * p.stride_q.h;
  T const* const k = static_cast<T const*>(p.k) + item.b * p.stride_k.b + item.h * p.stride_k.h;
  T const* const v = static_cast<T const*>(p.v) + item.b * p.stride_v.b + item.h * p.stride_v.h;
  int const vecs = vecs_of(item.rows), groups = groups_of(vecs);

  // The largest score is found before scaling, hence a positive scale; its sign goes into q.
  float const scale = (p.scale < 0.f ? -p.scale : p.scale) * 1.44269504089f;
  int32_t const* const index = query_index(p, item);
  T const* const first = index ? q : q + item.row * p.stride_q.s;
  pack_rows<kDot>(first, p.stride_q.s, index, item.rows, p.head_dim, p.scale < 0.f, t);
  std::memset(t.out, 0, sizeof(float) * p.head_dim * vecs * kLanes);
  for (int i = 0; i < vecs * kLanes; ++i) {
    t.max[i] = -__builtin_inff();
    t.sum[i] = 0.f;
  }

  KeyStream keys(p, item);
  while (int const count = load_tile<kDot>(keys, k, p.stride_k.s, v, p.stride_v.s, p.head_dim, t)) {
    for (int g = 0; g < groups; ++g)
      attend_tile<kDot>(t, group_of(g, groups, vecs), count, p.head_dim, scale);
  }
  store_item<T>(p, item, t);
}

void attend(BlockSparseAttentionParams const& p, CpuItem const& item, void* scratch) {
  Scratch& t = *static_cast<Scratch*>(scratch);
  switch (p.dtype) {
    case DType::kFloat32: return attend_item<false, float>(p, item, t);
    case DType::kFloat16: return attend_item<false, Float16>(p, item, t);
    case DType::kBFloat16: return attend_item<Simd::kDotBf16, BFloat16>(p, item, t);
  }
}

// ---- k-means ----

// The attention kernel's score tile with centroids for keys, and a running argmax for the softmax.
template <bool kDot, int kVecs>
void assign_group(Scratch& t, int first_vec, int first_centroid, int count, int words, float* best_score,
                  int32_t* best_label) {
  constexpr int kWidth = kVecs * kLanes;
  Vec unused[kVecs], best[kVecs];
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) unused[v] = Simd::set1(0.f);
  score_tile<kDot, kVecs>(t.q + first_vec * kLanes * words, t.k, words, count, t.s, unused);
  for (int v = 0; v < kVecs; ++v) {
    int const lane = (first_vec + v) * kLanes;
    Simd::IntVec label;
    std::memcpy(&label, best_label + lane, sizeof label);
    best[v] = Simd::load(best_score + lane);
    for (int n = 0; n < count; ++n) {
      Vec const score = Simd::add(Simd::load(t.s + n * kWidth + v * kLanes), Simd::set1(-t.sum[n]));
      Simd::keep_larger(best[v], label, score, first_centroid + n);
    }
    Simd::store(best_score + lane, best[v]);
    Simd::store(best_label + lane, label);
  }
}

template <bool kDot, class T>
void assign_item(KMeansAssignParams const& p, CpuItem const& item, Scratch& t) {
  T const* const x = static_cast<T const*>(p.x) + item.b * p.stride_x.b + item.h * p.stride_x.h;
  T const* const c =
      static_cast<T const*>(p.centroids) + item.b * p.stride_centroids.b + item.h * p.stride_centroids.h;
  int const words = words_of<kDot>(p.head_dim), vecs = vecs_of(item.rows), groups = groups_of(vecs);
  alignas(64) int32_t label[kCpuItemRows] = {};  // what a row keeps that compares with nothing, for NaN
  for (int i = 0; i < vecs * kLanes; ++i) t.max[i] = -__builtin_inff();
  pack_rows<kDot>(x + item.row * p.stride_x.s, p.stride_x.s, nullptr, item.rows, p.head_dim, false, t);
  for (int64_t first = 0; first < p.num_centroids; first += kTileKeys) {
    int const count = static_cast<int>(min64(kTileKeys, p.num_centroids - first)),
              at = static_cast<int>(first);
    for (int n = 0; n < count; ++n) {
      T const* const row = c + (first + n) * p.stride_centroids.s;
      copy_row<kDot>(row, t.k + n * kTilePitch, p.head_dim);
      t.sum[n] = 0.5f * sum_squares(row, p.head_dim);
    }
    for (int g = 0; g < groups; ++g) {
      Group const group = group_of(g, groups, vecs);
      if (group.vecs == 1) assign_group<kDot, 1>(t, group.first_vec, at, count, words, t.max, label);
      if (group.vecs == 2) assign_group<kDot, 2>(t, group.first_vec, at, count, words, t.max, label);
      if constexpr (Simd::kMaxVecs >= 3)
        if (group.vecs == 3) assign_group<kDot, 3>(t, group.first_vec, at, count, words, t.max, label);
    }
  }
  int32_t* const labels = p.labels + (item.b * p.heads + item.h) * p.num_rows + item.row;
  std::memcpy(labels, label, sizeof(int32_t) * item.rows);
}

void assign(KMeansAssignParams const& p, CpuItem const& item, void* scratch) {
  Scratch& t = *static_cast<Scratch*>(scratch);
  switch (p.dtype) {
    case DType::kFloat32: return assign_item<false, float>(p, item, t);
    case DType::kFloat16: return assign_item<false, Float16>(p, item, t);
    case DType::kBFloat16: return assign_item<Simd::kDotBf16, BFloat16>(p, item, t);
  }
}

// ---- row-wise ops ----

// sum[d] += x[d]
template <class T>
inline void add_row(T const* x, float* sum, int head_dim) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes)
    Simd::store(sum + d, Simd::add(Simd::load(sum + d), Simd::load(x + d)));
  for (; d < head_dim; ++d) sum[d] += to_float(x[d]);
}

template <class T>
void mean_pool_block(MeanPoolBlocksParams const& p, CpuItem const& item) {
  int64_t begin = item.block * p.block_size, end = min64(begin + p.block_size, p.seqlen);
  if (p.offsets != nullptr) {
    int32_t const* const offsets = p.offsets + item.b * p.stride_offsets.b + item.h * p.stride_offsets.h;
    begin = offsets[item.block];
    end = offsets[item.block + 1];
  }
  T const* const x = static_cast<T const*>(p.x) + item.b * p.stride_x.b + item.h * p.stride_x.h;
  float* const out = p.out + ((item.b * p.heads + item.h) * p.num_blocks + item.block) * p.head_dim;
  std::memset(out, 0, sizeof(float) * p.head_dim);
  if (end <= begin) return;
  for (int64_t i = begin; i < end; ++i) add_row(x + i * p.stride_x.s, out, p.head_dim);
  float const rows = static_cast<float>(end - begin);
  for (int d = 0; d < p.head_dim; ++d) out[d] /= rows;
}

void mean_pool(MeanPoolBlocksParams const& p, CpuItem const& item) {
  switch (p.dtype) {
    case DType::kFloat32: return mean_pool_block<float>(p, item);
    case DType::kFloat16: return mean_pool_block<Float16>(p, item);
    case DType::kBFloat16: return mean_pool_block<BFloat16>(p, item);
  }
}

template <class T>
void segment_mean_block(SegmentMeanParams const& p, CpuItem const& item) {
  int64_t const head = item.b * p.heads + item.h;
  int32_t const* const offsets = p.offsets + head * (p.num_segments + 1);
  int32_t const* const index = p.sorted_idx + head * p.num_rows;
  int64_t const begin = offsets[item.block], end = offsets[item.block + 1];
  T* const out = static_cast<T*>(p.out) + (head * p.num_segments + item.block) * p.head_dim;
  T const* const fallback = static_cast<T const*>(p.fallback) + item.b * p.stride_fallback.b +
                            item.h * p.stride_fallback.h + item.block * p.stride_fallback.s;
  bool finite = end > begin;
  T const* const x = static_cast<T const*>(p.x) + item.b * p.stride_x.b + item.h * p.stride_x.h;
  float const rows = static_cast<float>(end - begin);
  constexpr int kChunk = 256;  // columns summed at a time, so that any head_dim works
  for (int d = 0; d < p.head_dim && finite; d += kChunk) {
    int const columns = p.head_dim - d < kChunk ? p.head_dim - d : kChunk;
    alignas(64) float sum[kChunk] = {};
    for (int64_t i = begin; i < end; ++i) add_row(x + index[i] * p.stride_x.s + d, sum, columns);
    for (int j = 0; j < columns; ++j) sum[j] /= rows;
    store_row(sum, out + d, columns);
    for (int j = 0; j < columns; ++j) finite = finite && __builtin_isfinite(to_float(out[d + j]));
  }
  if (!finite) std::memcpy(out, fallback, sizeof(T) * p.head_dim);
}

void segment_mean(SegmentMeanParams const& p, CpuItem const& item) {
  switch (p.dtype) {
    case DType::kFloat32: return segment_mean_block<float>(p, item);
    case DType::kFloat16: return segment_mean_block<Float16>(p, item);
    case DType::kBFloat16: return segment_mean_block<BFloat16>(p, item);
  }
}

// out = w1 * x1 + w2 * x2; a weight of 0 takes no part, so that a NaN behind it stays out.
template <class T>
inline void blend_rows(T const* x1, float w1, T const* x2, float w2, T* out, int head_dim) {
  Vec const zero = Simd::set1(0.f), v1 = Simd::set1(w1), v2 = Simd::set1(w2);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec acc = w1 == 0.f ? zero : Simd::mul(Simd::load(x1 + d), v1);
    if (w2 != 0.f) acc = Simd::fma(Simd::load(x2 + d), v2, acc);
    Simd::store(out + d, acc);
  }
  for (; d < head_dim; ++d) {
    float acc = w1 == 0.f ? 0.f : to_float(x1[d]) * w1;
    if (w2 != 0.f) acc += to_float(x2[d]) * w2;
    out[d] = from_float<T>(acc);
  }
}

template <class T>
void merge_item(MergeAttentionParams const& p, CpuItem const& item) {
  float const minus_inf = -__builtin_inff();
  auto const at = [&](Strides3 const& s, int64_t row) { return item.b * s.b + item.h * s.h + row * s.s; };
  for (int64_t row = item.row; row < item.row + item.rows; ++row) {
    float const lse1 = p.lse1[at(p.stride_lse1, row)], lse2 = p.lse2[at(p.stride_lse2, row)];
    float const max = lse1 >= lse2 ? lse1 : lse2;  // of two -inf, -inf; a NaN comes out of the sum below
    float const w1 = lse1 == minus_inf ? 0.f : __builtin_expf(lse1 - max);
    float const w2 = lse2 == minus_inf ? 0.f : __builtin_expf(lse2 - max);
    float const sum = w1 + w2, inverse = sum == 0.f ? 0.f : 1.f / sum;
    blend_rows(static_cast<T const*>(p.out1) + at(p.stride_out1, row), w1 * inverse,
               static_cast<T const*>(p.out2) + at(p.stride_out2, row), w2 * inverse,
               static_cast<T*>(p.out) + at(p.stride_out, row), p.head_dim);
    p.lse[at(p.stride_lse, row)] = sum == 0.f ? minus_inf : max + __builtin_logf(sum);
  }
}

void merge(MergeAttentionParams const& p, CpuItem const& item) {
  switch (p.dtype) {
    case DType::kFloat32: return merge_item<float>(p, item);
    case DType::kFloat16: return merge_item<Float16>(p, item);
    case DType::kBFloat16: return merge_item<BFloat16>(p, item);
  }
}

// ---- norm and rotary embedding ----

// One head of one token on its way, and what turns it. Behind head_dim stands anything.
struct alignas(64) NormRopeRow {
  float x[kCpuMaxHeadDim], partner[kCpuMaxHeadDim];  // the other channel of each pair
  float cos[kCpuMaxHeadDim], sin[kCpuMaxHeadDim];    // sin with the sign of its channel: minus for the first
  float sign[kCpuMaxHeadDim];
};

inline float inverse_rms(float sum, int64_t count, float eps) {
  return 1.f / __builtin_sqrtf(sum / static_cast<float>(count) + eps);
}

// A row of a table as one value a channel.
template <class Table>
inline void load_angles(RmsNormRopeParams const& p, Table const* table, float* out) {
  int const d = p.head_dim;
  if (p.rope_width == d) return copy_row<false>(table, out, d);
  if (p.interleaved) {
    for (int i = 0; i < d / 2; ++i) out[2 * i] = out[2 * i + 1] = to_float(table[i]);
  } else {
    copy_row<false>(table, out, d / 2);
    copy_row<false>(table, out + d / 2, d / 2);
  }
}

template <class T>
void load_angles(RmsNormRopeParams const& p, int64_t b, int64_t h, int64_t turn, NormRopeRow& t) {
  Strides3 const c = p.stride_cos, s = p.stride_sin;
  int64_t const cos = b * c.b + h * c.h + turn * c.s, sin = b * s.b + h * s.h + turn * s.s;
  if (p.rope_dtype == DType::kFloat32) {
    load_angles(p, static_cast<float const*>(p.cos) + cos, t.cos);
    load_angles(p, static_cast<float const*>(p.sin) + sin, t.sin);
  } else {
    load_angles(p, static_cast<T const*>(p.cos) + cos, t.cos);
    load_angles(p, static_cast<T const*>(p.sin) + sin, t.sin);
  }
  for (int d = 0; d < p.head_dim; d += kLanes)
    Simd::store(t.sin + d, Simd::mul(Simd::load(t.sin + d), Simd::load(t.sign + d)));
}

inline void scale_row(float* x, float factor, float const* weight, int head_dim) {
  Vec const factors = Simd::set1(factor);
  for (int d = 0; d < head_dim; d += kLanes) Simd::store(x + d, Simd::mul(Simd::load(x + d), factors));
  if (weight == nullptr) return;
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes)
    Simd::store(x + d, Simd::mul(Simd::load(x + d), Simd::load(weight + d)));
  for (; d < head_dim; ++d) x[d] *= weight[d];
}

inline void rotate_row(NormRopeRow& t, bool interleaved, int head_dim) {
  int const half = head_dim / 2;
  if (!interleaved) {
    std::memcpy(t.partner, t.x + half, sizeof(float) * half);
    std::memcpy(t.partner + half, t.x, sizeof(float) * half);
  }
  for (int d = 0; d < head_dim; d += kLanes) {
    Vec const x = Simd::load(t.x + d),
              partner = interleaved ? Simd::swap_pairs(x) : Simd::load(t.partner + d);
    Simd::store(t.x + d, Simd::fma(x, Simd::load(t.cos + d), Simd::mul(partner, Simd::load(t.sin + d))));
  }
}

template <class T>
void norm_rope_item(RmsNormRopeParams const& p, int32_t const* inverse, CpuItem const& item) {
  NormRopeRow t = {};
  int const dim = p.head_dim;
  for (int d = 0; d < dim; ++d) t.sign[d] = (p.interleaved ? d % 2 == 0 : d < dim / 2) ? -1.f : 1.f;
  int32_t const* const index = p.index ? p.index + item.b * p.stride_index.b : nullptr;
  if (inverse != nullptr && p.stride_index.b != 0) inverse += item.b * p.heads * p.seqlen;
  float const* const weight = static_cast<float const*>(p.weight);
  bool const angles_differ = p.stride_cos.h != 0 || p.stride_sin.h != 0;

  for (int64_t slot = item.row; slot < item.row + item.rows; ++slot) {
    int64_t const token = index != nullptr && inverse == nullptr ? index[slot] : slot;
    T const* const x = static_cast<T const*>(p.x) + item.b * p.stride_x.b + token * p.stride_x.s;
    T* const out = static_cast<T*>(p.out) + item.b * p.stride_out.b;
    int64_t const turn = token - p.rope_start;
    bool const rotates = turn >= 0 && turn < p.rope_rows;
    float factor = 1.f;
    if (p.norm && p.across_heads) {
      float sum = 0.f;
      for (int64_t h = 0; h < p.heads; ++h) sum += sum_squares(x + h * p.stride_x.h, dim);
      factor = inverse_rms(sum, p.heads * dim, p.eps);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      copy_row<false>(x + h * p.stride_x.h, t.x, dim);
      if (p.norm && !p.across_heads) factor = inverse_rms(sum_squares(t.x, dim), dim, p.eps);
      if (p.norm) scale_row(t.x, factor, weight ? weight + h * p.stride_weight_h : nullptr, dim);
      if (rotates && (h == 0 || angles_differ)) load_angles<T>(p, item.b, h, turn, t);
      if (rotates) rotate_row(t, p.interleaved, dim);
      int64_t const row = inverse ? inverse[h * p.seqlen + slot] : slot;
      store_row(t.x, out + h * p.stride_out.h + row * p.stride_out.s, dim);
    }
  }
}

// ---- block mass ----

// Negated exponents are formed, in units of log 2, so that max() can clamp them: it keeps a NaN on its right.
constexpr float kLog2E = 1.44269504089f;
constexpr float kLowestNegated = -30.f * kLog2E;

// One tile of keys, the first of which is `first`, against one group of rows: exponentials are added to the group's
// running sums, and where a key block ends, the sums over its rows to its place in `row`.
template <bool kDot, int kVecs>
void mass_tile(BlockMassParams const& p, Scratch& t, int first_vec, int64_t first, int count, bool last, float* row) {
  constexpr int kWidth = kVecs * kLanes;
  int const words = words_of<kDot>(p.head_dim), lane0 = first_vec * kLanes;
  Vec const neg_scale = Simd::set1(-p.scale * kLog2E), lowest = Simd::set1(kLowestNegated), minus = Simd::set1(-1.f);
  Vec unused[kVecs], lse[kVecs], sum[kVecs];
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    unused[v] = Simd::set1(0.f);
    lse[v] = Simd::load(t.max + lane0 + v * kLanes);
    sum[v] = Simd::load(t.out + lane0 + v * kLanes);
  }
  score_tile<kDot, kVecs>(t.q + lane0 * words, t.k, words, count, t.s, unused);
  int64_t block = first / p.kv_block_size, end = (block + 1) * p.kv_block_size;
  for (int n = 0; n < count; ++n) {
    VDIT_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Vec const negated = Simd::fma(Simd::load(t.s + n * kWidth + v * kLanes), neg_scale, lse[v]);
      sum[v] = Simd::add(sum[v], Simd::exp2<true>(Simd::mul(Simd::max(lowest, negated), minus)));
    }
    if (first + n + 1 < end && !(last && n + 1 == count)) continue;
    float lanes[kWidth], mass = 0.f;
    VDIT_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Simd::store(lanes + v * kLanes, sum[v]);
      sum[v] = Simd::set1(0.f);
    }
    for (int i = 0; i < kWidth; ++i)
      if (t.sum[lane0 + i] != 0.f) mass += lanes[i];
    row[block++] += mass;
    end += p.kv_block_size;
  }
  VDIT_UNROLL
  for (int v = 0; v < kVecs; ++v) Simd::store(t.out + lane0 + v * kLanes, sum[v]);
}

// `rows` rows from `begin` on against all keys. t.max holds their lse in units of log 2, t.sum whether they count, t.out
// the running sums.
template <bool kDot, class T>
void mass_rows(BlockMassParams const& p, CpuItem const& item, int64_t begin, int rows, int64_t keys, float* row,
               Scratch& t) {
  T const* const q = static_cast<T const*>(p.q) + item.b * p.stride_q.b + item.h * p.stride_q.h;
  T const* const k = static_cast<T const*>(p.k) + item.b * p.stride_k.b + item.h * p.stride_k.h;
  float const* const lse = p.lse + item.b * p.stride_lse.b + item.h * p.stride_lse.h;
  int const vecs = vecs_of(rows), groups = groups_of(vecs);
  pack_rows<kDot>(q + begin * p.stride_q.s, p.stride_q.s, nullptr, rows, p.head_dim, false, t);
  for (int i = 0; i < vecs * kLanes; ++i) {
    float const value = i < rows ? lse[(begin + i) * p.stride_lse.s] : -__builtin_inff();
    t.sum[i] = value == -__builtin_inff() ? 0.f : 1.f;
    t.max[i] = t.sum[i] == 0.f ? 0.f : value * kLog2E;
    t.out[i] = 0.f;
  }
  for (int64_t first = 0; first < keys; first += kTileKeys) {
    int const count = static_cast<int>(min64(kTileKeys, keys - first));
    bool const last = first + count == keys;
    for (int n = 0; n < count; ++n)
      copy_row<kDot>(k + (first + n) * p.stride_k.s, t.k + n * kTilePitch, p.head_dim);
    for (int g = 0; g < groups; ++g) {
      Group const group = group_of(g, groups, vecs);
      if (group.vecs == 1) mass_tile<kDot, 1>(p, t, group.first_vec, first, count, last, row);
      if (group.vecs == 2) mass_tile<kDot, 2>(p, t, group.first_vec, first, count, last, row);
      if constexpr (Simd::kMaxVecs >= 3)
        if (group.vecs == 3) mass_tile<kDot, 3>(p, t, group.first_vec, first, count, last, row);
    }
  }
}

void norm_rope(RmsNormRopeParams const& p, int32_t const* inverse, CpuItem const& item) {
  switch (p.dtype) {
    case DType::kFloat32: return norm_rope_item<float>(p, inverse, item);
    case DType::kFloat16: return norm_rope_item<Float16>(p, inverse, item);
    case DType::kBFloat16: return norm_rope_item<BFloat16>(p, inverse, item);
  }
}

template <bool kDot, class T>
void mass_item(BlockMassParams const& p, CpuItem const& item, float* row, Scratch& t) {
  int64_t const begin = item.block * p.q_block_size, end = min64(begin + p.q_block_size, p.seqlen_q);
  int64_t const keys = p.kv_lengths ? p.kv_lengths[item.b * p.stride_kv_lengths] : p.seqlen_kv;
  for (int64_t j = 0; j < p.num_kv_blocks; ++j) row[j] = 0.f;
  for (int64_t at = begin; at < end; at += kCpuItemRows)
    mass_rows<kDot, T>(p, item, at, static_cast<int>(min64(kCpuItemRows, end - at)), keys, row, t);
}

void mass(BlockMassParams const& p, CpuItem const& item, float* row, void* scratch) {
  Scratch& t = *static_cast<Scratch*>(scratch);
  switch (p.dtype) {
    case DType::kFloat32: return mass_item<false, float>(p, item, row, t);
    case DType::kFloat16: return mass_item<false, Float16>(p, item, row, t);
    case DType::kBFloat16: return mass_item<Simd::kDotBf16, BFloat16>(p, item, row, t);
  }
}

}  // namespace
}  // namespace vdit

// The table of this unit.
#define VDIT_ATTENTION_CPU_KERNELS                                             \
  {vdit::Simd::kName, sizeof(vdit::Scratch), vdit::attend,       vdit::assign, \
   vdit::merge,       vdit::mean_pool,       vdit::segment_mean, vdit::norm_rope,  vdit::mass}
