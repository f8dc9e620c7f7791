// What every backend of the family checks before it fills a launch struct.
#pragma once
#include <algorithm>

#include "attention/params.h"
#include "common/op_checks.h"

namespace vdit {

struct Shape4 {
  int64_t b, h, s, d;
};

// A [b, h, s, d] tensor of fp32, fp16 or bf16 whose rows are contiguous.
inline Shape4 check_rows(char const* op, char const* name, Tensor const& t, bool any_dtype = false) {
  VDIT_CHECK(t.dim() == 4, op, name, " must have 4 dimensions [B, H, S, D], got ", shape_of(t));
  VDIT_CHECK(any_dtype || is_float(t.scalar_type()), op, name,
             " must be float32, float16 or bfloat16, got ", dtype_name(t.scalar_type()));
  VDIT_CHECK(t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0, op, name,
             " must have a contiguous last dimension, got stride ", t.stride(3), "; call .contiguous() on it");
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

// dims of a tensor that broadcasts over batch and heads: [b|1, h|1, rest...], int32, last dim contiguous.
inline void check_list(char const* op, char const* name, Tensor const& t, Tensor const& like, int64_t dims,
                       int64_t batch, int64_t heads) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, ScalarType::Int);
  VDIT_CHECK(t.dim() == dims, op, name, " must have ", dims, " dimensions, got ", shape_of(t));
  VDIT_CHECK((t.size(0) == batch || t.size(0) == 1) && (t.size(1) == heads || t.size(1) == 1), op, name,
             " must begin with [", batch, " or 1, ", heads, " or 1], got ", shape_of(t));
  VDIT_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1 || t.numel() == 0, op, name,
             " must have a contiguous last dimension, got stride ", t.stride(dims - 1));
}

inline Strides3 strides3(Tensor const& t) { return {stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}; }

// Strides of dimensions 0 and 1, 0 where the dimension broadcasts.
inline Strides2 broadcast2(Tensor const& t) {
  return {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)};
}
inline Strides3 broadcast3(Tensor const& t) {
  Strides2 const two = broadcast2(t);
  return {two.b, two.h, t.stride(2)};
}

// offsets start at 0, never fall and end at `length`.
inline void check_offsets_contents(char const* op, char const* name, Tensor const& given, int64_t length) {
  Tensor const t = to_cpu(given);
  int64_t const n = t.size(2);
  for (int64_t b = 0; b < t.size(0); ++b)
    for (int64_t h = 0; h < t.size(1); ++h) {
      int32_t const* row = t.const_data_ptr<int32_t>() + b * t.stride(0) + h * t.stride(1);
      VDIT_CHECK(row[0] == 0, op, name, " must start at 0, got ", row[0], " for batch ", b, ", head ", h);
      for (int64_t i = 1; i < n; ++i)
        VDIT_CHECK(row[i] >= row[i - 1], op, name, " must never fall, got ", row[i - 1], " then ", row[i],
                   " at position ", i, " of batch ", b, ", head ", h);
      VDIT_CHECK(row[n - 1] == length, op, name, " must end at the sequence length ", length, ", got ", row[n - 1],
                 " for batch ", b, ", head ", h);
    }
}

inline void check_lists_contents(char const* op, Tensor const& given_counts, Tensor const& given_lists,
                                 int64_t num_kv_blocks) {
  Tensor const counts = to_cpu(given_counts), lists = to_cpu(given_lists);
  Strides3 const by_count = broadcast3(counts), by_list = broadcast3(lists);
  int64_t const width = lists.size(3);
  // Either of the two may broadcast while the other does not: every pair that a kernel will meet is checked.
  for (int64_t b = 0; b < std::max(counts.size(0), lists.size(0)); ++b)
    for (int64_t h = 0; h < std::max(counts.size(1), lists.size(1)); ++h)
      for (int64_t i = 0; i < lists.size(2); ++i) {
        int32_t const count = counts.const_data_ptr<int32_t>()[b * by_count.b + h * by_count.h + i * by_count.s];
        VDIT_CHECK(count >= 0 && count <= width, op, "kv_num_blocks must be in 0..", width,
                   " (the width of kv_indices), got ", count, " for query block ", i);
        int32_t const* list =
            lists.const_data_ptr<int32_t>() + b * by_list.b + h * by_list.h + i * by_list.s;
        for (int32_t j = 0; j < count; ++j)
          VDIT_CHECK(list[j] >= 0 && list[j] < num_kv_blocks, op, "kv_indices must be in 0..", num_kv_blocks - 1,
                     ", got ", list[j], " for query block ", i);
      }
}

// An index list of row numbers below `rows`; with `permutation`, each row exactly once.
inline void check_index_contents(char const* op, char const* name, Tensor const& given, int64_t rows,
                                 bool permutation) {
  Tensor const t = to_cpu(given);
  std::vector<char> seen;
  for (int64_t b = 0; b < t.size(0); ++b)
    for (int64_t h = 0; h < t.size(1); ++h) {
      int32_t const* row = t.const_data_ptr<int32_t>() + b * t.stride(0) + h * t.stride(1);
      if (permutation) seen.assign(rows, 0);
      for (int64_t i = 0; i < t.size(2); ++i) {
        VDIT_CHECK(row[i] >= 0 && row[i] < rows, op, name, " must be in 0..", rows - 1, ", got ", row[i],
                   " at position ", i);
        if (!permutation) continue;
        VDIT_CHECK(!seen[row[i]], op, name, " must be a permutation, got ", row[i], " twice in batch ", b, ", head ",
                   h);
        seen[row[i]] = 1;
      }
    }
}

}  // namespace vdit
