// The ops of the family, written once: check, allocate, fill the launch struct, run. A backend lends
//   static constexpr bool kOnHost         list contents can be read without waiting
//   static constexpr bool kCuda           fp16/bf16 attention with D 64, 96, 128 and 16-byte aligned rows only
//   struct Scope { Scope(Tensor const&); }   device guard and stream, alive during the call
//   run(scope, launch struct, like)       one overload a struct
#pragma once
#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/checks.h"

namespace vdit {

template <class Backend>
struct AttentionOps {
  using Scope = typename Backend::Scope;

  static bool contents_checked() { return Backend::kOnHost || contents_checked_on_request(); }

  // --- block_sparse_attention --------------------------------------------------------------------------

  static void check_attention_tensor(char const* name, Tensor const& t, Tensor const& q) {
    char const* op = "block_sparse_attention";
    check_rows(op, name, t);
    check_same_device(op, name, t, q);
    check_dtype(op, name, t, q.scalar_type());
    VDIT_CHECK(t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(3) == q.size(3), op, name, " must be [",
               q.size(0), ", ", q.size(1), ", Skv, ", q.size(3), "] like q, got ", shape_of(t));
  }

  static void check_head_dim(char const* op, Tensor const& q) {
    int64_t const d = q.size(3);
    if constexpr (Backend::kCuda) {
      VDIT_CHECK(d == 64 || d == 96 || d == 128, op, "head_dim must be 64, 96 or 128 on CUDA, got ", d);
      VDIT_CHECK(q.scalar_type() != ScalarType::Float, op,
                 "q must be float16 or bfloat16 on CUDA, got float32; convert it");
    } else {
      VDIT_CHECK(d % 8 == 0 && d > 0 && d <= 256, op, "head_dim must be a multiple of 8 up to 256 on CPU, got ", d);
    }
  }

  // The vector loads of the CUDA kernels move 16 bytes.
  static void check_alignment(char const* op, char const* name, Tensor const& t) {
    if constexpr (Backend::kCuda) {
      int64_t const lanes = 16 / static_cast<int64_t>(t.element_size());
      Strides3 const s = strides3(t);
      bool const strides = s.b % lanes == 0 && s.h % lanes == 0 && s.s % lanes == 0;
      VDIT_CHECK(t.numel() == 0 || (strides && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0), op, name,
                 " must have rows aligned to 16 bytes on CUDA, got strides [", t.stride(0), ", ", t.stride(1), ", ",
                 t.stride(2), "] elements; call .contiguous() on it");
    }
  }

  static int64_t count_blocks(char const* op, char const* name, std::optional<Tensor> const& offsets,
                              int64_t block_size, int64_t length, Tensor const& q) {
    if (!offsets) return (length + block_size - 1) / block_size;
    check_list(op, name, *offsets, q, 3, q.size(0), q.size(1));
    VDIT_CHECK(offsets->size(2) >= 1, op, name, " must hold at least one boundary, got ", shape_of(*offsets));
    return offsets->size(2) - 1;
  }

  // What a launch struct holds of a list that may be left out, [b|1, h|1, n].
  static void set_list(std::optional<Tensor> const& list, int32_t const*& data, Strides2& stride) {
    if (!list) return;
    data = list->const_data_ptr<int32_t>();
    stride = broadcast2(*list);
  }

  // A block larger than its sequence is the sequence: FlexAttention's empty BlockMask says 2^30.
  static int32_t block_rows(int64_t block_size, int64_t length) {
    return static_cast<int32_t>(std::min(block_size, std::max<int64_t>(1, length)));
  }

  // q's storage order of heads and tokens is kept, so that a [B, S, H, D] model gets its own layout back.
  static Tensor empty_like_query(Tensor const& q) {
    if (q.stride(1) < q.stride(2)) {
      std::vector<int64_t> const shape{q.size(0), q.size(2), q.size(1), q.size(3)};
      return torch::stable::transpose(torch::stable::new_empty(q, shape), 1, 2);
    }
    std::vector<int64_t> const shape{q.size(0), q.size(1), q.size(2), q.size(3)};
    return torch::stable::new_empty(q, shape);
  }

  static std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks,
                                                           Tensor kv_indices, std::optional<Tensor> q_offsets,
                                                           std::optional<Tensor> kv_offsets,
                                                           std::optional<Tensor> q_index, int64_t q_block_size,
                                                           int64_t kv_block_size, std::optional<double> scale) {
    char const* op = "block_sparse_attention";
    Shape4 const size = check_rows(op, "q", q);
    check_attention_tensor("k", k, q);
    check_attention_tensor("v", v, q);
    VDIT_CHECK(k.size(2) == v.size(2), op, "k and v must have the same length, got ", k.size(2), " and ", v.size(2));
    check_head_dim(op, q);
    for (auto [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) check_alignment(op, name, *t);
    VDIT_CHECK(q_block_size > 0 && kv_block_size > 0, op, "block sizes must be positive, got ", q_block_size, " and ",
               kv_block_size);
    int64_t const nq = count_blocks(op, "q_offsets", q_offsets, q_block_size, size.s, q);
    int64_t const nkv = count_blocks(op, "kv_offsets", kv_offsets, kv_block_size, k.size(2), q);
    check_list(op, "kv_num_blocks", kv_num_blocks, q, 3, size.b, size.h);
    check_list(op, "kv_indices", kv_indices, q, 4, size.b, size.h);
    VDIT_CHECK(kv_num_blocks.size(2) == nq && kv_indices.size(2) == nq, op, "kv_num_blocks and kv_indices must list ",
               nq, " query blocks, got ", shape_of(kv_num_blocks), " and ", shape_of(kv_indices));
    if (q_index) {
      check_list(op, "q_index", *q_index, q, 3, size.b, size.h);
      VDIT_CHECK(q_index->size(2) == size.s, op, "q_index must have one entry for each of the ", size.s,
                 " queries, got ", shape_of(*q_index));
    }
    if (contents_checked()) {
      if (q_index) check_index_contents(op, "q_index", *q_index, size.s, true);
      if (q_offsets) check_offsets_contents(op, "q_offsets", *q_offsets, size.s);
      if (kv_offsets) check_offsets_contents(op, "kv_offsets", *kv_offsets, k.size(2));
      check_lists_contents(op, kv_num_blocks, kv_indices, nkv);
    }

    Scope scope(q);
    Tensor out = empty_like_query(q);
    std::vector<int64_t> const lse_shape{size.b, size.h, size.s};
    Tensor lse = torch::stable::new_empty(q, lse_shape, ScalarType::Float);
    if (out.numel() == 0) return {out, lse};

    BlockSparseAttentionParams p;
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr<float>();
    p.kv_num_blocks = kv_num_blocks.const_data_ptr<int32_t>();
    p.kv_indices = kv_indices.const_data_ptr<int32_t>();
    p.stride_q = strides3(q);
    p.stride_k = strides3(k);
    p.stride_v = strides3(v);
    p.stride_out = strides3(out);
    p.stride_lse = {lse.stride(0), lse.stride(1)};
    p.stride_num_blocks = broadcast3(kv_num_blocks);
    p.stride_indices = broadcast3(kv_indices);
    set_list(q_offsets, p.q_offsets, p.stride_q_offsets);
    set_list(kv_offsets, p.kv_offsets, p.stride_kv_offsets);
    set_list(q_index, p.q_index, p.stride_q_index);
    p.batch = size.b;
    p.heads = size.h;
    p.seqlen_q = size.s;
    p.seqlen_kv = k.size(2);
    p.num_q_blocks = nq;
    p.num_kv_blocks = nkv;
    p.list_width = static_cast<int32_t>(kv_indices.size(3));
    p.head_dim = static_cast<int32_t>(size.d);
    p.q_block_size = block_rows(q_block_size, size.s);
    p.kv_block_size = block_rows(kv_block_size, k.size(2));
    p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(size.d)));
    p.dtype = to_dtype(q.scalar_type());
    Backend::run(scope, p, q);
    return {out, lse};
  }

  // --- merge_attention ---------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> merge_attention(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) {
    char const* op = "merge_attention";
    Shape4 const size = check_rows(op, "out1", out1);
    check_rows(op, "out2", out2);
    check_same_device(op, "out2", out2, out1);
    check_dtype(op, "out2", out2, out1.scalar_type());
    VDIT_CHECK(shape_of(out1) == shape_of(out2), op, "out1 and out2 must have one shape, got ", shape_of(out1), " and ",
               shape_of(out2));
    for (auto [name, t] : {std::pair{"lse1", &lse1}, {"lse2", &lse2}}) {
      check_same_device(op, name, *t, out1);
      check_dtype(op, name, *t, ScalarType::Float);
      VDIT_CHECK(t->dim() == 3 && t->size(0) == size.b && t->size(1) == size.h && t->size(2) == size.s, op, name,
                 " must be [", size.b, ", ", size.h, ", ", size.s, "], got ", shape_of(*t));
    }
    Scope scope(out1);
    Tensor out = empty_like_query(out1);
    std::vector<int64_t> const lse_shape{size.b, size.h, size.s};
    Tensor lse = torch::stable::new_empty(lse1, lse_shape);
    if (out.numel() == 0) return {out, lse};
    MergeAttentionParams p;
    p.out1 = out1.const_data_ptr();
    p.lse1 = lse1.const_data_ptr<float>();
    p.out2 = out2.const_data_ptr();
    p.lse2 = lse2.const_data_ptr<float>();
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr<float>();
    p.stride_out1 = strides3(out1);
    p.stride_out2 = strides3(out2);
    p.stride_out = strides3(out);
    p.stride_lse1 = strides3(lse1);
    p.stride_lse2 = strides3(lse2);
    p.stride_lse = strides3(lse);
    p.batch = size.b;
    p.heads = size.h;
    p.seqlen = size.s;
    p.head_dim = static_cast<int32_t>(size.d);
    p.dtype = to_dtype(out1.scalar_type());
    Backend::run(scope, p, out1);
    return {out, lse};
  }

  // --- permute_rows, unpermute_rows --------------------------------------------------------------------

  static Tensor permute(char const* op, Tensor const& x, Tensor const& index, bool inverse) {
    Shape4 const size = check_rows(op, "x", x, /*any_dtype=*/true);
    check_list(op, "index", index, x, 3, size.b, size.h);
    int64_t const n = index.size(2);
    if (inverse)
      VDIT_CHECK(n == size.s, op, "index must have one entry for each of the ", size.s, " rows, got ", n);
    VDIT_CHECK(n == 0 || size.s > 0 || size.b * size.h == 0, op, "index must be empty because x has no rows, got ", n,
               " entries");
    if (contents_checked()) check_index_contents(op, "index", index, size.s, inverse);

    Scope scope(x);
    // The inverse stores [B, S, H, D]: that is what the projection after attention reads.
    std::vector<int64_t> const shape = inverse ? std::vector<int64_t>{size.b, size.s, size.h, size.d}
                                               : std::vector<int64_t>{size.b, size.h, n, size.d};
    Tensor out = torch::stable::new_empty(x, shape);
    if (inverse) out = torch::stable::transpose(out, 1, 2);
    if (out.numel() == 0) return out;
    int64_t const bytes = static_cast<int64_t>(x.element_size());
    auto in_bytes = [bytes](Strides3 s) { return Strides3{s.b * bytes, s.h * bytes, s.s * bytes}; };
    PermuteRowsParams p;
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.index = index.const_data_ptr<int32_t>();
    p.stride_x = in_bytes(strides3(x));
    p.stride_out = in_bytes(strides3(out));
    p.stride_index = broadcast2(index);
    p.batch = size.b;
    p.heads = size.h;
    p.num_index = n;
    p.rows_in = size.s;
    p.rows_out = out.size(2);
    p.row_bytes = size.d * bytes;
    p.inverse = inverse;
    Backend::run(scope, p, x);
    return out;
  }

  static Tensor permute_rows(Tensor x, Tensor index) { return permute("permute_rows", x, index, false); }
  static Tensor unpermute_rows(Tensor x, Tensor index) { return permute("unpermute_rows", x, index, true); }

  // --- mean_pool_blocks --------------------------------------------------------------------------------

  static Tensor mean_pool_blocks(Tensor x, std::optional<Tensor> offsets, int64_t block_size) {
    char const* op = "mean_pool_blocks";
    Shape4 const size = check_rows(op, "x", x);
    VDIT_CHECK(block_size > 0, op, "block_size must be positive, got ", block_size);
    int64_t const n = count_blocks(op, "offsets", offsets, block_size, size.s, x);
    if (offsets && contents_checked()) check_offsets_contents(op, "offsets", *offsets, size.s);
    Scope scope(x);
    std::vector<int64_t> const shape{size.b, size.h, n, size.d};
    Tensor out = torch::stable::new_empty(x, shape, ScalarType::Float);
    if (out.numel() == 0) return out;
    MeanPoolBlocksParams p;
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr<float>();
    p.stride_x = strides3(x);
    set_list(offsets, p.offsets, p.stride_offsets);
    p.batch = size.b;
    p.heads = size.h;
    p.seqlen = size.s;
    p.num_blocks = n;
    p.head_dim = static_cast<int32_t>(size.d);
    p.block_size = block_rows(block_size, size.s);
    p.dtype = to_dtype(x.scalar_type());
    Backend::run(scope, p, x);
    return out;
  }

  // --- kmeans_assign, label_sort, segment_mean ---------------------------------------------------------

  static void check_centroids(char const* op, char const* name, Tensor const& c, Tensor const& x) {
    check_rows(op, name, c);
    check_same_device(op, name, c, x);
    check_dtype(op, name, c, x.scalar_type());
    VDIT_CHECK(c.size(0) == x.size(0) && c.size(1) == x.size(1) && c.size(3) == x.size(3) && c.size(2) >= 1, op, name,
               " must be [", x.size(0), ", ", x.size(1), ", C >= 1, ", x.size(3), "], got ", shape_of(c));
  }

  static void check_planner_dim(char const* op, Tensor const& x) {
    VDIT_CHECK(x.size(3) % 8 == 0 && x.size(3) > 0 && x.size(3) <= 256, op,
               "head_dim must be a multiple of 8 up to 256, got ", x.size(3));
  }

  static Tensor kmeans_assign(Tensor x, Tensor centroids) {
    char const* op = "kmeans_assign";
    Shape4 const size = check_rows(op, "x", x);
    check_planner_dim(op, x);
    check_centroids(op, "centroids", centroids, x);
    Scope scope(x);
    std::vector<int64_t> const shape{size.b, size.h, size.s};
    Tensor labels = torch::stable::new_empty(x, shape, ScalarType::Int);
    if (labels.numel() == 0) return labels;
    KMeansAssignParams p;
    p.x = x.const_data_ptr();
    p.centroids = centroids.const_data_ptr();
    p.labels = labels.mutable_data_ptr<int32_t>();
    p.stride_x = strides3(x);
    p.stride_centroids = strides3(centroids);
    p.batch = size.b;
    p.heads = size.h;
    p.num_rows = size.s;
    p.num_centroids = centroids.size(2);
    p.head_dim = static_cast<int32_t>(size.d);
    p.dtype = to_dtype(x.scalar_type());
    Backend::run(scope, p, x);
    return labels;
  }

  static void check_labels_contents(Tensor const& given, int64_t num_labels) {
    Tensor const t = to_cpu(given);
    int32_t const* labels = t.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); ++i)
      VDIT_CHECK(labels[i] >= 0 && labels[i] < num_labels, "label_sort", "labels must be in 0..", num_labels - 1,
                 ", got ", labels[i], " at position ", i);
  }

  static std::tuple<Tensor, Tensor> label_sort(Tensor labels, int64_t num_labels) {
    char const* op = "label_sort";
    check_dtype(op, "labels", labels, ScalarType::Int);
    VDIT_CHECK(labels.dim() == 3, op, "labels must be [B, H, N], got ", shape_of(labels));
    VDIT_CHECK(num_labels >= 1 && num_labels < (int64_t{1} << 31), op, "num_labels must be at least 1, got ",
               num_labels);
    Scope scope(labels);
    labels = torch::stable::contiguous(labels);
    if (contents_checked()) check_labels_contents(labels, num_labels);
    Tensor sorted_idx = torch::stable::empty_like(labels);
    std::vector<int64_t> const shape{labels.size(0), labels.size(1), num_labels + 1};
    if (labels.numel() == 0) return {sorted_idx, torch::stable::new_zeros(labels, shape)};
    Tensor offsets = torch::stable::new_empty(labels, shape);
    LabelSortParams p;
    p.labels = labels.const_data_ptr<int32_t>();
    p.sorted_idx = sorted_idx.mutable_data_ptr<int32_t>();
    p.offsets = offsets.mutable_data_ptr<int32_t>();
    p.batch = labels.size(0);
    p.heads = labels.size(1);
    p.num_rows = labels.size(2);
    p.num_labels = static_cast<int32_t>(num_labels);
    Backend::run(scope, p, labels);
    return {sorted_idx, offsets};
  }

  static Tensor segment_mean(Tensor x, Tensor sorted_idx, Tensor offsets, Tensor fallback) {
    char const* op = "segment_mean";
    Shape4 const size = check_rows(op, "x", x);
    check_planner_dim(op, x);
    check_centroids(op, "fallback", fallback, x);
    check_list(op, "sorted_idx", sorted_idx, x, 3, size.b, size.h);
    check_list(op, "offsets", offsets, x, 3, size.b, size.h);
    int64_t const c = fallback.size(2);
    VDIT_CHECK(sorted_idx.size(0) == size.b && sorted_idx.size(1) == size.h && sorted_idx.size(2) == size.s, op,
               "sorted_idx must be [", size.b, ", ", size.h, ", ", size.s, "], got ", shape_of(sorted_idx));
    VDIT_CHECK(offsets.size(0) == size.b && offsets.size(1) == size.h && offsets.size(2) == c + 1, op,
               "offsets must be [", size.b, ", ", size.h, ", ", c + 1, "], got ", shape_of(offsets));
    if (contents_checked()) {
      check_index_contents(op, "sorted_idx", sorted_idx, size.s, false);
      check_offsets_contents(op, "offsets", offsets, size.s);
    }
    Scope scope(x);
    sorted_idx = torch::stable::contiguous(sorted_idx);
    offsets = torch::stable::contiguous(offsets);
    std::vector<int64_t> const shape{size.b, size.h, c, size.d};
    Tensor out = torch::stable::new_empty(x, shape);
    if (out.numel() == 0) return out;
    SegmentMeanParams p;
    p.x = x.const_data_ptr();
    p.sorted_idx = sorted_idx.const_data_ptr<int32_t>();
    p.offsets = offsets.const_data_ptr<int32_t>();
    p.fallback = fallback.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.stride_x = strides3(x);
    p.stride_fallback = strides3(fallback);
    p.batch = size.b;
    p.heads = size.h;
    p.num_rows = size.s;
    p.num_segments = c;
    p.head_dim = static_cast<int32_t>(size.d);
    p.dtype = to_dtype(x.scalar_type());
    Backend::run(scope, p, x);
    return out;
  }

  // --- topk_blocks, topp_blocks ------------------------------------------------------------------------

  static Shape4 check_scores(char const* op, Tensor const& scores) {
    Shape4 const size = check_rows(op, "scores", scores);
    check_dtype(op, "scores", scores, ScalarType::Float);
    return size;
  }

  static std::tuple<Tensor, Tensor> empty_lists(Tensor const& scores) {
    std::vector<int64_t> const rows{scores.size(0), scores.size(1), scores.size(2)};
    std::vector<int64_t> const all{scores.size(0), scores.size(1), scores.size(2), scores.size(3)};
    // No key block: there is nothing to list, and the kernels need not know.
    if (scores.size(3) == 0)
      return {torch::stable::new_zeros(scores, rows, ScalarType::Int),
              torch::stable::new_empty(scores, all, ScalarType::Int)};
    return {torch::stable::new_empty(scores, rows, ScalarType::Int),
            torch::stable::new_empty(scores, all, ScalarType::Int)};
  }

  static std::tuple<Tensor, Tensor> topk_blocks(Tensor scores, int64_t k, bool per_head, bool keep_row_max) {
    char const* op = "topk_blocks";
    Shape4 const size = check_scores(op, scores);
    VDIT_CHECK(k >= 0, op, "k must be at least 0, got ", k);
    Scope scope(scores);
    auto [counts, lists] = empty_lists(scores);
    if (scores.numel() == 0) return {counts, lists};
    TopkBlocksParams p;
    p.scores = scores.const_data_ptr<float>();
    p.kv_num_blocks = counts.template mutable_data_ptr<int32_t>();
    p.kv_indices = lists.template mutable_data_ptr<int32_t>();
    p.stride_scores = strides3(scores);
    p.batch = size.b;
    p.heads = size.h;
    p.num_q_blocks = size.s;
    p.num_kv_blocks = size.d;
    p.k = std::min<int64_t>(k, per_head ? size.s * size.d : size.d);
    p.per_head = per_head;
    p.keep_row_max = keep_row_max;
    Backend::run(scope, p, scores);
    return {counts, lists};
  }

  static std::tuple<Tensor, Tensor> topp_blocks(Tensor scores, double p_mass, std::optional<Tensor> weights,
                                                int64_t min_blocks) {
    char const* op = "topp_blocks";
    Shape4 const size = check_scores(op, scores);
    VDIT_CHECK(p_mass >= 0, op, "p must be at least 0, got ", p_mass);
    VDIT_CHECK(min_blocks >= 0, op, "min_blocks must be at least 0, got ", min_blocks);
    if (weights) {
      check_list(op, "weights", *weights, scores, 3, size.b, size.h);
      VDIT_CHECK(weights->size(2) == size.d, op, "weights must have one entry for each of the ", size.d,
                 " key blocks, got ", shape_of(*weights));
    }
    Scope scope(scores);
    auto [counts, lists] = empty_lists(scores);
    if (scores.numel() == 0) return {counts, lists};
    ToppBlocksParams p;
    p.scores = scores.const_data_ptr<float>();
    set_list(weights, p.weights, p.stride_weights);
    p.kv_num_blocks = counts.template mutable_data_ptr<int32_t>();
    p.kv_indices = lists.template mutable_data_ptr<int32_t>();
    p.stride_scores = strides3(scores);
    p.batch = size.b;
    p.heads = size.h;
    p.num_q_blocks = size.s;
    p.num_kv_blocks = size.d;
    p.p = static_cast<float>(p_mass);
    p.min_blocks = std::max<int64_t>(1, std::min<int64_t>(min_blocks, size.d));
    Backend::run(scope, p, scores);
    return {counts, lists};
  }

  // --- rms_norm_rope -----------------------------------------------------------------------------------

  static void check_float_like(char const* op, char const* name, Tensor const& t, Tensor const& x) {
    check_same_device(op, name, t, x);
    VDIT_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x.scalar_type(), op, name,
               " must be float32 or ", dtype_name(x.scalar_type()), " like x, got ", dtype_name(t.scalar_type()));
  }

  static void check_norm(char const* op, std::optional<Tensor> const& weight, std::optional<double> eps,
                         Tensor const& x) {
    VDIT_CHECK(!eps || *eps >= 0, op, "eps must be at least 0, or None for no norm, got ", *eps);
    if (!weight) return;
    VDIT_CHECK(eps, op, "weight must be None where eps is None, which means no norm");
    check_float_like(op, "weight", *weight, x);
    int64_t const d = x.size(3), all = x.size(1) * d;
    VDIT_CHECK(weight->dim() == 1 && (weight->size(0) == d || weight->size(0) == all), op, "weight must be [", d,
               "] or [", all, "], got ", shape_of(*weight));
    VDIT_CHECK(weight->size(0) <= 1 || weight->stride(0) == 1, op, "weight must be contiguous, got stride ",
               weight->stride(0), "; call .contiguous() on it");
  }

  static void check_tables(char const* op, std::optional<Tensor> const& cos, std::optional<Tensor> const& sin,
                           int64_t rope_start, Tensor const& x) {
    VDIT_CHECK(cos.has_value() == sin.has_value(), op, "cos and sin must both be given or both be None, got ",
               cos ? "cos" : "sin", " alone");
    if (!cos) return;
    int64_t const b = x.size(0), h = x.size(1), d = x.size(3);
    for (auto [name, t] : {std::pair{"cos", &*cos}, {"sin", &*sin}}) {
      check_float_like(op, name, *t, x);
      bool const fits = t->dim() == 4 && (t->size(0) == b || t->size(0) == 1) &&
                        (t->size(1) == h || t->size(1) == 1) && (t->size(3) == d || t->size(3) == d / 2);
      VDIT_CHECK(fits, op, name, " must be [", b, " or 1, ", h, " or 1, R, ", d, " or ", d / 2, "], got ",
                 shape_of(*t));
      VDIT_CHECK(t->stride(3) == 1 || t->numel() == 0, op, name,
                 " must have a contiguous last dimension, got stride ", t->stride(3), "; call .contiguous() on it");
    }
    VDIT_CHECK(shape_of(*cos) == shape_of(*sin) && cos->scalar_type() == sin->scalar_type(), op,
               "cos and sin must have one shape and dtype, got ", shape_of(*cos), " ", dtype_name(cos->scalar_type()),
               " and ", shape_of(*sin), " ", dtype_name(sin->scalar_type()));
    VDIT_CHECK(rope_start >= 0 && rope_start <= x.size(2) - cos->size(2), op, "the ", cos->size(2),
               " rows of cos and sin must lie inside the ", x.size(2), " tokens, got rope_start ", rope_start);
  }

  static Tensor rms_norm_rope(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> cos,
                              std::optional<Tensor> sin, std::optional<Tensor> index, bool across_heads,
                              bool interleaved, int64_t rope_start, std::optional<double> eps) {
    char const* op = "rms_norm_rope";
    Shape4 const size = check_rows(op, "x", x);
    check_planner_dim(op, x);
    check_norm(op, weight, eps, x);
    check_tables(op, cos, sin, rope_start, x);
    if (index) {
      check_list(op, "index", *index, x, 3, size.b, size.h);
      VDIT_CHECK(index->size(2) == size.s, op, "index must have one entry for each of the ", size.s, " tokens, got ",
                 index->size(2));
      if (contents_checked()) check_index_contents(op, "index", *index, size.s, true);
    }
    Scope scope(x);
    Tensor out = empty_like_query(x);
    if (out.numel() == 0) return out;
    RmsNormRopeParams p;
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.stride_x = strides3(x);
    p.stride_out = strides3(out);
    if (weight) {
      p.weight = weight->const_data_ptr();
      p.weight_dtype = to_dtype(weight->scalar_type());
      p.stride_weight_h = weight->size(0) == size.d ? 0 : size.d;
    }
    if (cos && cos->size(2) > 0) {
      p.cos = cos->const_data_ptr();
      p.sin = sin->const_data_ptr();
      p.stride_cos = strides3(*cos);
      p.stride_sin = strides3(*sin);
      p.rope_start = rope_start;
      p.rope_rows = cos->size(2);
      p.rope_width = static_cast<int32_t>(cos->size(3));
      p.rope_dtype = to_dtype(cos->scalar_type());
    }
    set_list(index, p.index, p.stride_index);
    p.batch = size.b;
    p.heads = size.h;
    p.seqlen = size.s;
    p.head_dim = static_cast<int32_t>(size.d);
    p.eps = eps ? static_cast<float>(*eps) : 0.f;
    p.norm = eps.has_value();
    p.across_heads = across_heads;
    p.interleaved = interleaved;
    p.dtype = to_dtype(x.scalar_type());
    Backend::run(scope, p, x);
    return out;
  }

  // --- block_mass, block_mass_topk ---------------------------------------------------------------------

  static void check_lengths_contents(char const* op, Tensor const& given, int64_t length) {
    Tensor const t = to_cpu(given);
    for (int64_t b = 0; b < t.size(0); ++b) {
      int32_t const n = t.const_data_ptr<int32_t>()[b * t.stride(0)];
      VDIT_CHECK(n >= 0 && n <= length, op, "kv_lengths must be in 0..", length, ", got ", n, " for batch ", b);
    }
  }

  // What both ops check, and their launch struct but for the results.
  static BlockMassParams mass_params(char const* op, Tensor const& q, Tensor const& k, Tensor const& lse,
                                     std::optional<Tensor> const& kv_lengths, int64_t q_block_size,
                                     int64_t kv_block_size, std::optional<double> scale) {
    Shape4 const size = check_rows(op, "q", q);
    check_rows(op, "k", k);
    check_same_device(op, "k", k, q);
    check_dtype(op, "k", k, q.scalar_type());
    VDIT_CHECK(k.size(0) == size.b && k.size(1) == size.h && k.size(3) == size.d, op, "k must be [", size.b, ", ",
               size.h, ", Skv, ", size.d, "] like q, got ", shape_of(k));
    check_head_dim(op, q);
    check_alignment(op, "q", q);
    check_alignment(op, "k", k);
    check_same_device(op, "lse", lse, q);
    check_dtype(op, "lse", lse, ScalarType::Float);
    VDIT_CHECK(lse.dim() == 3 && lse.size(0) == size.b && lse.size(1) == size.h && lse.size(2) == size.s, op,
               "lse must be [", size.b, ", ", size.h, ", ", size.s, "], got ", shape_of(lse));
    VDIT_CHECK(q_block_size > 0 && kv_block_size > 0, op, "block sizes must be positive, got ", q_block_size, " and ",
               kv_block_size);
    BlockMassParams p;
    if (kv_lengths) {
      check_same_device(op, "kv_lengths", *kv_lengths, q);
      check_dtype(op, "kv_lengths", *kv_lengths, ScalarType::Int);
      VDIT_CHECK(kv_lengths->dim() == 1 && kv_lengths->size(0) == size.b, op, "kv_lengths must be [", size.b,
                 "], got ", shape_of(*kv_lengths));
      if (contents_checked()) check_lengths_contents(op, *kv_lengths, k.size(2));
      p.kv_lengths = kv_lengths->const_data_ptr<int32_t>();
      p.stride_kv_lengths = stride_of(*kv_lengths, 0);
    }
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.lse = lse.const_data_ptr<float>();
    p.stride_q = strides3(q);
    p.stride_k = strides3(k);
    p.stride_lse = strides3(lse);
    p.batch = size.b;
    p.heads = size.h;
    p.seqlen_q = size.s;
    p.seqlen_kv = k.size(2);
    p.num_q_blocks = count_blocks(op, "q_offsets", std::nullopt, q_block_size, size.s, q);
    p.num_kv_blocks = count_blocks(op, "kv_offsets", std::nullopt, kv_block_size, k.size(2), q);
    p.head_dim = static_cast<int32_t>(size.d);
    p.q_block_size = block_rows(q_block_size, size.s);
    p.kv_block_size = block_rows(kv_block_size, k.size(2));
    p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(size.d)));
    p.dtype = to_dtype(q.scalar_type());
    return p;
  }

  static Tensor block_mass(Tensor q, Tensor k, Tensor lse, std::optional<Tensor> kv_lengths, int64_t q_block_size,
                           int64_t kv_block_size, std::optional<double> scale) {
    BlockMassParams p = mass_params("block_mass", q, k, lse, kv_lengths, q_block_size, kv_block_size, scale);
    Scope scope(q);
    std::vector<int64_t> const shape{p.batch, p.heads, p.num_q_blocks, p.num_kv_blocks};
    Tensor mass = torch::stable::new_empty(q, shape, ScalarType::Float);
    if (mass.numel() == 0) return mass;
    p.mass = mass.mutable_data_ptr<float>();
    Backend::run(scope, p, q);
    return mass;
  }

  static std::tuple<Tensor, Tensor, Tensor> block_mass_topk(Tensor q, Tensor k, Tensor lse, int64_t k_max,
                                                            std::optional<Tensor> forced,
                                                            std::optional<Tensor> kv_lengths, int64_t q_block_size,
                                                            int64_t kv_block_size, std::optional<double> scale) {
    char const* op = "block_mass_topk";
    BlockMassTopkParams p;
    p.row = mass_params(op, q, k, lse, kv_lengths, q_block_size, kv_block_size, scale);
    int64_t const nkv = p.row.num_kv_blocks;
    VDIT_CHECK(k_max >= 0 && k_max <= nkv, op, "k_max must be in 0..", nkv, " (the key blocks), got ", k_max);
    if constexpr (Backend::kCuda)
      VDIT_CHECK(nkv <= kMaxMassBlocks, op, "there must be at most ", kMaxMassBlocks, " key blocks on CUDA, got ", nkv,
                 "; raise kv_block_size");
    if (forced) {
      check_same_device(op, "forced", *forced, q);
      check_dtype(op, "forced", *forced, ScalarType::Bool);
      bool const whole = forced->dim() == 3 && (forced->size(0) == p.row.batch || forced->size(0) == 1) &&
                         (forced->size(1) == p.row.heads || forced->size(1) == 1) && forced->size(2) == nkv;
      VDIT_CHECK(whole || (forced->dim() == 1 && forced->size(0) == nkv), op, "forced must be [", nkv, "] or [",
                 p.row.batch, " or 1, ", p.row.heads, " or 1, ", nkv, "], got ", shape_of(*forced));
      forced = torch::stable::contiguous(*forced);
      p.forced = forced->const_data_ptr<bool>();
      if (forced->dim() == 3) p.stride_forced = broadcast2(*forced);
    }
    Scope scope(q);
    std::vector<int64_t> const rows{p.row.batch, p.row.heads, p.row.num_q_blocks};
    std::vector<int64_t> const lists{p.row.batch, p.row.heads, p.row.num_q_blocks, k_max};
    Tensor indices = torch::stable::new_empty(q, lists, ScalarType::Int);
    Tensor mass = torch::stable::new_empty(q, lists, ScalarType::Float);
    if (nkv == 0) return {indices, mass, torch::stable::new_zeros(q, rows, ScalarType::Float)};
    Tensor total = torch::stable::new_empty(q, rows, ScalarType::Float);
    if (total.numel() == 0) return {indices, mass, total};
    p.indices = indices.mutable_data_ptr<int32_t>();
    p.mass = mass.mutable_data_ptr<float>();
    p.total = total.mutable_data_ptr<float>();
    p.k_max = k_max;
    Backend::run(scope, p, q);
    return {indices, mass, total};
  }

  // -------------------------------------------------------------------------------------------------------

  static void bind(torch::stable::detail::StableLibrary& m) {
    m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
    m.impl("merge_attention", TORCH_BOX(&merge_attention));
    m.impl("permute_rows", TORCH_BOX(&permute_rows));
    m.impl("unpermute_rows", TORCH_BOX(&unpermute_rows));
    m.impl("mean_pool_blocks", TORCH_BOX(&mean_pool_blocks));
    m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));
    m.impl("label_sort", TORCH_BOX(&label_sort));
    m.impl("segment_mean", TORCH_BOX(&segment_mean));
    m.impl("topk_blocks", TORCH_BOX(&topk_blocks));
    m.impl("topp_blocks", TORCH_BOX(&topp_blocks));
    m.impl("rms_norm_rope", TORCH_BOX(&rms_norm_rope));
    m.impl("block_mass", TORCH_BOX(&block_mass));
    m.impl("block_mass_topk", TORCH_BOX(&block_mass_topk));
  }
};

}  // namespace vdit
