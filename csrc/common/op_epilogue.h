// What the linear and the vq family check and fill in of a LinearEpilogue, and how they take rows of activations.
#pragma once
#include <optional>
#include <vector>

#include "common/op_checks.h"
#include "vdit/epilogue.h"

namespace vdit {

// The leading dimensions of [M, C] (one batch of M tokens) or [B, S, C].
struct RowShape {
  int64_t batch = 1, tokens = 0;
  bool flat = true;

  int64_t rows() const { return batch * tokens; }
  std::vector<int64_t> with(int64_t width) const {
    return flat ? std::vector<int64_t>{tokens, width} : std::vector<int64_t>{batch, tokens, width};
  }
  std::vector<int64_t> lead() const {
    return flat ? std::vector<int64_t>{tokens} : std::vector<int64_t>{batch, tokens};
  }
  std::string text(std::string const& last) const {
    return flat ? concat("[", tokens, last, "]") : concat("[", batch, ", ", tokens, last, "]");
  }
};

inline void check_contiguous_last(char const* op, char const* name, Tensor const& t) {
  int64_t const last = t.dim() - 1;
  VDIT_CHECK(t.size(last) <= 1 || t.stride(last) == 1 || t.numel() == 0, op, name,
             " must have a contiguous last dimension, got stride ", t.stride(last), "; call .contiguous() on it");
}

inline RowShape check_row_shape(char const* op, char const* name, Tensor const& t) {
  VDIT_CHECK(t.dim() == 2 || t.dim() == 3, op, name, " must be [M, K] or [B, S, K], got ", shape_of(t));
  check_contiguous_last(op, name, t);
  if (t.dim() == 2) return {1, t.size(0), true};
  return {t.size(0), t.size(1), false};
}

// Strides over batch and token of [M, C] or [B, S, C].
inline Strides2 row_strides(Tensor const& t) {
  return {t.dim() == 3 ? stride_of(t, 0) : 0, stride_of(t, t.dim() - 2)};
}

inline bool has_lead(Tensor const& t, RowShape const& rows) {
  std::vector<int64_t> const lead = rows.lead();
  if (t.dim() != static_cast<int64_t>(lead.size())) return false;
  for (size_t i = 0; i < lead.size(); ++i)
    if (t.size(i) != lead[i]) return false;
  return true;
}

// One number a row, contiguous: a copy where it is not, which must outlive the launch.
inline Tensor check_per_row(char const* op, char const* name, Tensor const& t, RowShape const& rows,
                            ScalarType dtype, Tensor const& like) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, dtype);
  VDIT_CHECK(has_lead(t, rows), op, name, " must be ", rows.text(""), ", got ", shape_of(t));
  return torch::stable::contiguous(t);
}

// One float a channel.
inline float const* check_per_channel(char const* op, char const* name, Tensor const& t, int64_t channels,
                                      Tensor const& like) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, ScalarType::Float);
  VDIT_CHECK(t.dim() == 1 && t.size(0) == channels, op, name, " must be [", channels, "], got ", shape_of(t));
  VDIT_CHECK(t.size(0) <= 1 || t.stride(0) == 1, op, name, " must be contiguous, got stride ", t.stride(0),
             "; call .contiguous() on it");
  return t.const_data_ptr<float>();
}

// A float tensor [b|1, s|1, width] beside x [B, S, K], or [m|1, width] beside x [M, K].
inline void check_broadcast_rows(char const* op, char const* name, Tensor const& t, RowShape const& rows,
                                 int64_t width, Tensor const& like) {
  check_same_device(op, name, t, like);
  VDIT_CHECK(is_float(t.scalar_type()), op, name, " must be float32, float16 or bfloat16, got ",
             dtype_name(t.scalar_type()));
  int64_t const dims = rows.flat ? 2 : 3;
  bool const fits = t.dim() == dims && (t.size(dims - 2) == rows.tokens || t.size(dims - 2) == 1) &&
                    (rows.flat || t.size(0) == rows.batch || t.size(0) == 1) && t.size(dims - 1) == width;
  VDIT_CHECK(fits, op, name, " must be ",
             rows.flat ? concat("[", rows.tokens, " or 1, ", width, "]")
                       : concat("[", rows.batch, " or 1, ", rows.tokens, " or 1, ", width, "]"),
             ", got ", shape_of(t));
  check_contiguous_last(op, name, t);
}

// The optional tensors of an epilogue as an op gets them. They and the copies made of them live as long as this.
struct EpilogueTensors {
  std::optional<Tensor> x_scale, x_sum, weight_scale, weight_zero, bias, gate, residual;
};

inline void check_epilogue_dtype(char const* op, ScalarType dtype) {
  VDIT_CHECK(is_float(dtype) || dtype == ScalarType::Int, op,
             "out_dtype must be float32, float16, bfloat16 or int32 (raw sums), got ", dtype_name(dtype));
}

// Checks `t` against rows and n, allocates the result and fills `e`.
inline Tensor make_epilogue(char const* op, EpilogueTensors& t, RowShape const& rows, int64_t n, ScalarType out_dtype,
                            Tensor const& like, LinearEpilogue& e) {
  check_epilogue_dtype(op, out_dtype);
  e.raw_sums = out_dtype == ScalarType::Int;
  e.rows_per_batch = rows.tokens;
  if (t.x_scale) {
    t.x_scale = check_per_row(op, "x_scale", *t.x_scale, rows, ScalarType::Float, like);
    e.x_scale = t.x_scale->const_data_ptr<float>();
  }
  if (t.x_sum) {
    t.x_sum = check_per_row(op, "x_sum", *t.x_sum, rows, ScalarType::Int, like);
    e.x_sum = t.x_sum->const_data_ptr<int32_t>();
  }
  if (t.weight_scale) e.weight_scale = check_per_channel(op, "weight_scale", *t.weight_scale, n, like);
  if (t.weight_zero) e.weight_zero = check_per_channel(op, "weight_zero", *t.weight_zero, n, like);
  if (t.bias) e.bias = check_per_channel(op, "bias", *t.bias, n, like);
  if (t.gate) {
    check_broadcast_rows(op, "gate", *t.gate, rows, n, like);
    e.gate = t.gate->const_data_ptr();
    e.gate_dtype = to_dtype(t.gate->scalar_type());
    e.stride_gate = row_strides(*t.gate);
  }
  VDIT_CHECK(!e.raw_sums || (!t.bias && !t.gate && !t.residual), op,
             "bias, gate and residual must be None with out_dtype int32, which asks for the raw sums");
  if (t.residual) {
    check_same_device(op, "residual", *t.residual, like);
    check_dtype(op, "residual", *t.residual, out_dtype);
    bool const fits = t.residual->dim() == (rows.flat ? 2 : 3) && (rows.flat || t.residual->size(0) == rows.batch) &&
                      t.residual->size(rows.flat ? 0 : 1) == rows.tokens &&
                      t.residual->size(t.residual->dim() - 1) == n;
    VDIT_CHECK(fits, op, "residual must be ", rows.text(concat(", ", n)), ", got ", shape_of(*t.residual));
    check_contiguous_last(op, "residual", *t.residual);
    e.residual = t.residual->const_data_ptr();
    e.stride_residual = row_strides(*t.residual);
  }
  std::vector<int64_t> const shape = rows.with(n);
  Tensor out = torch::stable::new_empty(like, shape, out_dtype);
  e.out = out.mutable_data_ptr();
  if (!e.raw_sums) e.out_dtype = to_dtype(out_dtype);
  return out;
}

// x [M, K] or [B, S, K] as evenly spaced rows, padded with zeros to a multiple of `pad_bytes`: itself where it lies so.
inline Tensor as_even_rows(Tensor const& x, RowShape const& rows, int64_t width, int64_t multiple) {
  Tensor even = x;
  bool const uneven = !rows.flat && rows.batch > 1 && rows.tokens > 1 && x.stride(0) != rows.tokens * x.stride(1);
  if (uneven) even = torch::stable::contiguous(x);
  if (width % multiple == 0) return even;
  std::vector<int64_t> const padding{0, multiple - width % multiple};
  return torch::stable::pad(even, padding);
}

inline int64_t row_pitch(Tensor const& t, RowShape const& rows) {
  if (rows.tokens > 1) return t.stride(t.dim() - 2);
  return !rows.flat && rows.batch > 1 ? t.stride(0) : t.size(t.dim() - 1);
}

// Rows that the CUDA kernels load 16 bytes at a time.
inline void check_aligned_rows(char const* op, char const* name, Tensor const& t, int64_t pitch) {
  bool const aligned = pitch * static_cast<int64_t>(t.element_size()) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  VDIT_CHECK(t.numel() == 0 || aligned, op, name, " must have rows aligned to 16 bytes on CUDA, got rows of ", pitch,
             " elements; call .contiguous() on it");
}

}  // namespace vdit
