// The ops of the family, written once: check, allocate, fill the launch struct, run. A backend lends
//   static constexpr bool kCuda           K a multiple of 16, 16-byte aligned rows, no fp32 product
//   struct Scope { Scope(Tensor const&); }   device guard and stream, alive during the call
//   run(scope, launch struct, like)       one overload a struct; LinearParams for an expanded int8 weight
//   path(VqLinearParams, asked, like)     whether the weight is expanded first
//   multiply_expanded(scope, ...)         the product of floats with an expanded weight, into `out`
#pragma once
#include <cmath>
#include <tuple>

#include "vdit/linear.h"
#include "vq/checks.h"
#include "vq/path.h"

namespace vdit {

template <class Backend>
struct VqOps {
  using Scope = typename Backend::Scope;
  using OptTensor = std::optional<Tensor>;

  // --- vq_assign ---------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> vq_assign(Tensor vectors, Tensor codebook, int64_t count) {
    char const* op = "vq_assign";
    check_dtype(op, "vectors", vectors, ScalarType::Float);
    VDIT_CHECK(vectors.dim() == 2 && vectors.size(1) >= 1 && vectors.size(1) <= 16, op,
               "vectors must be [V, D] with D in 1..16, got ", shape_of(vectors));
    check_same_device(op, "codebook", codebook, vectors);
    check_dtype(op, "codebook", codebook, ScalarType::Float);
    VDIT_CHECK(codebook.dim() == 2 && codebook.size(1) == vectors.size(1) && codebook.size(0) >= 1 &&
                   codebook.size(0) <= kMaxCodewords,
               op, "codebook must be [C, ", vectors.size(1), "] with C in 1..", kMaxCodewords, ", got ",
               shape_of(codebook));
    VDIT_CHECK(count >= 1 && count <= 8 && count <= codebook.size(0), op, "count must be in 1..",
               std::min<int64_t>(8, codebook.size(0)), " (8, or the codewords where they are fewer), got ", count);
    Scope scope(vectors);
    vectors = torch::stable::contiguous(vectors);
    codebook = torch::stable::contiguous(codebook);
    std::vector<int64_t> const shape{vectors.size(0), count};
    Tensor indices = torch::stable::new_empty(vectors, shape, ScalarType::Int);
    Tensor distances = torch::stable::new_empty(vectors, shape, ScalarType::Float);
    if (vectors.size(0) == 0) return {indices, distances};
    VqAssignParams p;
    p.vectors = vectors.const_data_ptr<float>();
    p.codebook = codebook.const_data_ptr<float>();
    p.indices = indices.mutable_data_ptr<int32_t>();
    p.distances = distances.mutable_data_ptr<float>();
    p.num_vectors = vectors.size(0);
    p.num_codewords = codebook.size(0);
    p.dim = static_cast<int32_t>(vectors.size(1));
    p.count = static_cast<int32_t>(count);
    Backend::run(scope, p, vectors);
    return {indices, distances};
  }

  // --- vq_dequantize -----------------------------------------------------------------------------------

  static bool is_int8(Tensor const& t) { return t.scalar_type() == ScalarType::Char; }

  // Into rows of `stride` elements, zero from k on.
  static Tensor dequantized(Scope& scope, VqDequantizeParams& p, Tensor const& codebook, int64_t stride) {
    std::vector<int64_t> const shape{p.n, stride};
    Tensor out = torch::stable::new_empty(codebook, shape);
    p.codebook = codebook.const_data_ptr();
    p.is_int8 = is_int8(codebook);
    p.dtype = p.is_int8 ? DType::kFloat32 : to_dtype(codebook.scalar_type());
    p.out = out.mutable_data_ptr();
    p.stride_out = stride;
    if (p.n > 0) Backend::run(scope, p, codebook);
    return out;
  }

  static Tensor vq_dequantize(Tensor codes, Tensor codebook, int64_t out_features, int64_t in_features,
                              OptTensor row_scale) {
    char const* op = "vq_dequantize";
    check_sizes(op, out_features, in_features);
    VqDequantizeParams p;
    p.format = check_codes(op, codes, out_features, in_features);
    check_codebook(op, codebook, p.format, codes);
    if constexpr (Backend::kCuda) check_vq_addresses(op, codes, codebook);
    VDIT_CHECK(!row_scale || !is_int8(codebook), op, "row_scale must be None with an int8 codebook");
    if (row_scale) p.row_scale = check_per_channel(op, "row_scale", *row_scale, out_features, codes);
    p.codes = codes.const_data_ptr();
    p.n = out_features;
    p.k = in_features;
    Scope scope(codes);
    return dequantized(scope, p, codebook, in_features);
  }

  // --- vq_linear ---------------------------------------------------------------------------------------

  static void check_linear_dtypes(char const* op, Tensor const& x, Tensor const& codebook) {
    ScalarType const type = x.scalar_type();
    VDIT_CHECK(is_float(type) || type == ScalarType::Char, op,
               "x must be int8, float16, bfloat16 or (on the CPU) float32, got ", dtype_name(type));
    VDIT_CHECK(!Backend::kCuda || type != ScalarType::Float, op,
               "x must be int8, float16 or bfloat16 on CUDA, got float32; convert it");
    VDIT_CHECK(codebook.scalar_type() == type, op, "codebook must be ", dtype_name(type), " like x, got ",
               dtype_name(codebook.scalar_type()));
  }

  // The weight in a scratch, then a product as any other. Floats take their weight's scale there.
  static void expand_and_multiply(Scope& scope, VqLinearParams const& p, Tensor const& codebook,
                                  OptTensor const& bias, Tensor const& x, Tensor const& out) {
    VqDequantizeParams d;
    d.codes = p.codes;
    d.n = p.n;
    d.k = p.k;
    d.format = p.format;
    if (!p.is_int8) {
      d.row_scale = p.epilogue.weight_scale;
      return Backend::multiply_expanded(scope, p, bias, x, dequantized(scope, d, codebook, p.k), out);
    }
    Tensor const weight = dequantized(scope, d, codebook, (p.k + 15) / 16 * 16);
    LinearParams l;
    l.x = static_cast<int8_t const*>(p.x);
    l.stride_x = p.stride_x;
    l.weight = weight.const_data_ptr();
    l.stride_weight = weight.size(1);
    l.m = p.m;
    l.n = p.n;
    l.k = p.k;
    l.epilogue = p.epilogue;
    Backend::run(scope, l, x);
  }

  static Tensor vq_linear(Tensor x, Tensor codes, Tensor codebook, int64_t out_features, OptTensor x_scale,
                          OptTensor weight_scale, OptTensor bias, OptTensor gate, OptTensor residual,
                          std::optional<ScalarType> out_dtype, std::string path) {
    char const* op = "vq_linear";
    RowShape const rows = check_row_shape(op, "x", x);
    check_linear_dtypes(op, x, codebook);
    VqLinearParams p;
    p.m = rows.rows();
    p.n = out_features;
    p.k = x.size(x.dim() - 1);
    p.is_int8 = is_int8(x);
    p.dtype = p.is_int8 ? DType::kFloat32 : to_dtype(x.scalar_type());
    check_sizes(op, p.n, p.k);
    if constexpr (Backend::kCuda)
      VDIT_CHECK(p.k % 16 == 0, op, "the channels of x must be a multiple of 16 on CUDA, got ", p.k,
                 "; pad x and the codes with zeros");
    check_same_device(op, "codes", codes, x);
    p.format = check_codes(op, codes, p.n, p.k);
    check_codebook(op, codebook, p.format, x);
    if constexpr (Backend::kCuda) check_vq_addresses(op, codes, codebook);
    VDIT_CHECK(path == "auto" || path == "fused" || path == "expand", op, "path must be auto, fused or expand, got ",
               path);
    ScalarType const result = out_dtype ? *out_dtype : p.is_int8 ? ScalarType::BFloat16 : x.scalar_type();
    VDIT_CHECK(p.is_int8 || is_float(result), op, "out_dtype must be float32, float16 or bfloat16 where x is not int8, "
               "got ", dtype_name(result));
    VDIT_CHECK(!p.is_int8 || result == ScalarType::Int || x_scale, op,
               "x_scale must be given with int8 x; quantize_rows returns it");
    VDIT_CHECK(p.is_int8 || !x_scale, op, "x_scale must be None where x is ", dtype_name(x.scalar_type()));
    Scope scope(x);
    EpilogueTensors t{x_scale, std::nullopt, weight_scale, std::nullopt, bias, gate, residual};
    Tensor out = make_epilogue(op, t, rows, p.n, result, x, p.epilogue);
    if (out.numel() == 0) return out;
    Tensor const held = as_even_rows(x, rows, p.k, p.is_int8 ? 16 : 1);
    p.x = held.const_data_ptr();
    p.stride_x = row_pitch(held, rows);
    if constexpr (Backend::kCuda) check_aligned_rows(op, "x", held, p.stride_x);
    p.codes = codes.const_data_ptr();
    p.codebook = codebook.const_data_ptr();
    if (Backend::path(p, path, x).path == VqPath::kExpand) expand_and_multiply(scope, p, codebook, bias, held, out);
    else Backend::run(scope, p, x);
    return out;
  }

  // -------------------------------------------------------------------------------------------------------

  static void bind(torch::stable::detail::StableLibrary& m) {
    m.impl("vq_assign", TORCH_BOX(&vq_assign));
    m.impl("vq_dequantize", TORCH_BOX(&vq_dequantize));
    m.impl("vq_linear", TORCH_BOX(&vq_linear));
  }
};

}  // namespace vdit
