// The ops of the family, written once: check, allocate, fill the launch struct, run. A backend lends
//   static constexpr bool kOnHost         results can be read without waiting
//   static constexpr bool kCuda           K a multiple of 16 and 16-byte aligned rows only
//   struct Scope { Scope(Tensor const&); }   device guard and stream, alive during the call
//   run(scope, launch struct, like)       one overload a struct
//   expands(scope, LinearParams, like)    whether path="auto" expands this weight to int8 first
#pragma once
#include <tuple>

#include "linear/checks.h"

namespace vdit {

template <class Backend>
struct LinearOps {
  using Scope = typename Backend::Scope;
  using OptTensor = std::optional<Tensor>;

  static bool contents_checked() { return Backend::kOnHost || contents_checked_on_request(); }

  // --- quantize_rows -----------------------------------------------------------------------------------

  static void set_modulation(char const* op, char const* name, OptTensor const& t, RowShape const& rows, int64_t k,
                             Tensor const& x, void const*& data, Strides2& stride) {
    if (!t) return;
    check_broadcast_rows(op, name, *t, rows, k, x);
    data = t->const_data_ptr();
    stride = row_strides(*t);
  }

  static void set_channels(char const* op, char const* name, OptTensor const& t, int64_t k, Tensor const& x,
                           float const*& data) {
    if (t) data = check_per_channel(op, name, *t, k, x);
  }

  static void check_hadamard(char const* op, int64_t block, int64_t k, bool signs) {
    VDIT_CHECK(block == 0 || block == 16 || block == 32 || block == 64 || block == 128, op,
               "hadamard must be 0, 16, 32, 64 or 128, got ", block);
    VDIT_CHECK(block == 0 || k % block == 0, op, "hadamard must divide the ", k, " channels of x, got ", block);
    VDIT_CHECK(block != 0 || !signs, op, "signs must be None where hadamard is 0");
  }

  // int8 [..., width] whose rows are a multiple of 16 bytes apart.
  static Tensor padded_codes(Tensor const& like, std::vector<int64_t> shape) {
    int64_t const width = shape.back();
    shape.back() = (width + 15) / 16 * 16;
    Tensor codes = torch::stable::new_empty(like, shape, ScalarType::Char);
    if (shape.back() == width) return codes;
    return torch::stable::narrow(codes, static_cast<int64_t>(shape.size()) - 1, 0, width);
  }

  static std::tuple<Tensor, Tensor, Tensor> quantize_rows(Tensor x, std::string prologue, OptTensor norm_weight,
                                                          OptTensor norm_bias, OptTensor modulation_scale,
                                                          OptTensor shift, OptTensor channel_scale, int64_t hadamard,
                                                          OptTensor signs, int64_t bits, double eps) {
    char const* op = "quantize_rows";
    RowShape const rows = check_row_shape(op, "x", x);
    VDIT_CHECK(is_float(x.scalar_type()), op, "x must be float32, float16 or bfloat16, got ",
               dtype_name(x.scalar_type()));
    int64_t const k = x.size(x.dim() - 1);
    check_channels(op, k, false);
    VDIT_CHECK(bits >= 2 && bits <= 8, op, "bits must be in 2..8, got ", bits);
    VDIT_CHECK(eps >= 0, op, "eps must be at least 0, got ", eps);
    check_hadamard(op, hadamard, k, signs.has_value());
    QuantizeRowsParams p;
    p.prologue = check_prologue(op, prologue);
    bool const norm_arguments = norm_weight || norm_bias || modulation_scale || shift;
    VDIT_CHECK(p.prologue == RowPrologue::kLayerNorm || !norm_arguments, op,
               "norm_weight, norm_bias, modulation_scale and shift must be None with prologue ", prologue);
    VDIT_CHECK(!modulation_scale || !shift || modulation_scale->scalar_type() == shift->scalar_type(), op,
               "modulation_scale and shift must have one dtype, got ", dtype_name(modulation_scale->scalar_type()),
               " and ", dtype_name(shift->scalar_type()));
    set_channels(op, "norm_weight", norm_weight, k, x, p.norm_weight);
    set_channels(op, "norm_bias", norm_bias, k, x, p.norm_bias);
    set_channels(op, "channel_scale", channel_scale, k, x, p.channel_scale);
    set_channels(op, "signs", signs, k, x, p.signs);
    set_modulation(op, "modulation_scale", modulation_scale, rows, k, x, p.modulation_scale,
                   p.stride_modulation_scale);
    set_modulation(op, "shift", shift, rows, k, x, p.shift, p.stride_shift);

    Scope scope(x);
    Tensor codes = padded_codes(x, rows.with(k));
    std::vector<int64_t> const lead = rows.lead();
    Tensor scale = torch::stable::new_empty(x, lead, ScalarType::Float);
    Tensor sum = torch::stable::new_empty(x, lead, ScalarType::Int);
    if (rows.rows() == 0) return {codes, scale, sum};
    p.x = x.const_data_ptr();
    p.codes = codes.mutable_data_ptr<int8_t>();
    p.scale = scale.mutable_data_ptr<float>();
    p.sum = sum.mutable_data_ptr<int32_t>();
    p.stride_x = row_strides(x);
    p.stride_codes = (k + 15) / 16 * 16;
    p.batch = rows.batch;
    p.tokens = rows.tokens;
    p.channels = k;
    p.hadamard = static_cast<int32_t>(hadamard);
    p.q_max = (1 << (bits - 1)) - 1;
    p.eps = static_cast<float>(eps);
    p.dtype = to_dtype(x.scalar_type());
    if (modulation_scale || shift) p.modulation_dtype = to_dtype((modulation_scale ? modulation_scale : shift)->scalar_type());
    Backend::run(scope, p, x);
    if (contents_checked()) check_rows_were_finite(op, scale);
    return {codes, scale, sum};
  }

  // --- the linears -------------------------------------------------------------------------------------

  // x and the sizes of a product. `held` keeps x, or a copy of it in even rows, until the launch.
  static RowShape set_activations(char const* op, Tensor const& x, int64_t n, LinearParams& p, Tensor& held) {
    RowShape const rows = check_row_shape(op, "x", x);
    check_dtype(op, "x", x, ScalarType::Char);
    p.m = rows.rows();
    p.n = n;
    p.k = x.size(x.dim() - 1);
    check_channels(op, p.k, Backend::kCuda);
    if (p.m == 0) return rows;
    held = as_even_rows(x, rows, p.k, 16);
    p.x = held.const_data_ptr<int8_t>();
    p.stride_x = row_pitch(held, rows);
    if constexpr (Backend::kCuda) check_aligned_rows(op, "x", held, p.stride_x);
    return rows;
  }

  // The same product with the weight's codes as int8, in scratch memory.
  static void run_expanded(Scope& scope, LinearParams p, Tensor const& like) {
    ExpandWeightParams e;
    e.weight = p.weight;
    e.weight_low = p.weight_low;
    e.table = p.table;
    e.table_size = p.table_size;
    e.format = p.format;
    e.n = p.n;
    e.k = p.k;
    std::vector<int64_t> const shape{p.n, p.k};
    Tensor wide = padded_codes(like, shape);
    e.out = wide.mutable_data_ptr<int8_t>();
    e.stride_out = (p.k + 15) / 16 * 16;
    Backend::run(scope, e, like);
    p.format = WeightFormat::kInt8;
    p.weight = e.out;
    p.stride_weight = e.stride_out;
    p.weight_low = p.table = nullptr;
    Backend::run(scope, p, like);
  }

  static void run_linear(char const* op, Scope& scope, std::string const& path, LinearParams const& p,
                         Tensor const& like) {
    check_path(op, path);
    if (p.m == 0 || p.n == 0) return;
    if (path == "expand" || (path == "auto" && Backend::expands(scope, p, like)))
      return run_expanded(scope, p, like);
    Backend::run(scope, p, like);
  }

  static ScalarType result_dtype(std::optional<ScalarType> const& asked) {
    return asked ? *asked : ScalarType::BFloat16;
  }

  static Tensor w8a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, OptTensor x_sum,
                            OptTensor weight_zero, OptTensor bias, OptTensor gate, OptTensor residual,
                            std::optional<ScalarType> out_dtype) {
    char const* op = "w8a8_linear";
    LinearParams p;
    Tensor held;
    check_same_device(op, "weight", weight, x);
    check_dtype(op, "weight", weight, ScalarType::Char);
    VDIT_CHECK(weight.dim() == 2, op, "weight must be [N, K], got ", shape_of(weight));
    RowShape const rows = set_activations(op, x, weight.size(0), p, held);
    VDIT_CHECK(weight.size(1) == p.k, op, "weight must be [", p.n, ", ", p.k, "] like the channels of x, got ",
               shape_of(weight));
    check_contiguous_last(op, "weight", weight);
    p.weight = weight.const_data_ptr();
    p.stride_weight = weight.size(0) > 1 ? weight.stride(0) : p.k;
    if constexpr (Backend::kCuda) check_aligned_rows(op, "weight", weight, p.stride_weight);
    bool const raw = result_dtype(out_dtype) == ScalarType::Int;
    VDIT_CHECK(!weight_zero || x_sum, op, "x_sum must be given with weight_zero; quantize_rows returns it");
    VDIT_CHECK(!raw || !weight_zero, op, "weight_zero must be None with out_dtype int32, which asks for the raw sums");
    EpilogueTensors t{x_scale, x_sum, weight_scale, weight_zero, bias, gate, residual};
    Scope scope(x);
    Tensor out = make_epilogue(op, t, rows, p.n, result_dtype(out_dtype), x, p.epilogue);
    if (t.x_sum && contents_checked_on_request()) check_x_sum(op, x, p.k, *t.x_sum);
    run_linear(op, scope, "fused", p, x);
    return out;
  }

  static Tensor w4a8_linear(Tensor x, Tensor x_scale, Tensor x_sum, Tensor weight, Tensor weight_scale,
                            Tensor weight_zero, OptTensor weight_low, OptTensor bias, OptTensor gate,
                            OptTensor residual, std::optional<ScalarType> out_dtype, std::string path) {
    char const* op = "w4a8_linear";
    LinearParams p;
    Tensor held;
    VDIT_CHECK(weight_scale.dim() == 1, op, "weight_scale must be [N], got ", shape_of(weight_scale));
    RowShape const rows = set_activations(op, x, weight_scale.size(0), p, held);
    check_weight_tiles(op, "weight", weight, p.n, p.k, x, Backend::kCuda);
    p.format = WeightFormat::kInt4;
    p.weight = weight.const_data_ptr();
    if (weight_low) {
      check_weight_tiles(op, "weight_low", *weight_low, p.n, p.k, x, Backend::kCuda);
      p.format = WeightFormat::kNibblePlanes;
      p.weight_low = weight_low->const_data_ptr();
    }
    EpilogueTensors t{x_scale, x_sum, weight_scale, weight_zero, bias, gate, residual};
    Scope scope(x);
    Tensor out = make_epilogue(op, t, rows, p.n, result_dtype(out_dtype), x, p.epilogue);
    if (t.x_sum && contents_checked_on_request()) check_x_sum(op, x, p.k, *t.x_sum);
    run_linear(op, scope, path, p, x);
    return out;
  }

  static Tensor log4a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor table, Tensor weight_scale,
                              OptTensor bias, OptTensor gate, OptTensor residual, std::optional<ScalarType> out_dtype,
                              std::string path) {
    char const* op = "log4a8_linear";
    LinearParams p;
    Tensor held;
    VDIT_CHECK(weight_scale.dim() == 1, op, "weight_scale must be [N], got ", shape_of(weight_scale));
    RowShape const rows = set_activations(op, x, weight_scale.size(0), p, held);
    check_weight_tiles(op, "weight", weight, p.n, p.k, x, Backend::kCuda);
    p.format = WeightFormat::kTable;
    p.weight = weight.const_data_ptr();
    p.table_size = check_code_table(op, table, p.n, x, Backend::kCuda);
    p.table = table.const_data_ptr<int8_t>();
    EpilogueTensors t{x_scale, std::nullopt, weight_scale, std::nullopt, bias, gate, residual};
    Scope scope(x);
    Tensor out = make_epilogue(op, t, rows, p.n, result_dtype(out_dtype), x, p.epilogue);
    run_linear(op, scope, path, p, x);
    return out;
  }

  // --- expand_w4, expand_log4 --------------------------------------------------------------------------

  static Tensor run_expand(char const* op, ExpandWeightParams& e, Tensor const& like) {
    Scope scope(like);
    std::vector<int64_t> const shape{e.n, e.k};
    Tensor out = padded_codes(like, shape);
    if (out.numel() == 0) return out;
    e.out = out.mutable_data_ptr<int8_t>();
    e.stride_out = (e.k + 15) / 16 * 16;
    Backend::run(scope, e, like);
    return out;
  }

  static void check_sizes(char const* op, int64_t n, int64_t k) {
    VDIT_CHECK(n >= 0 && k >= 1 && k <= kMaxLinearChannels, op, "there must be 1 to ", kMaxLinearChannels,
               " in_features and no fewer than 0 out_features, got ", k, " and ", n);
  }

  static Tensor expand_w4(Tensor weight, int64_t out_features, int64_t in_features, OptTensor weight_low) {
    char const* op = "expand_w4";
    check_sizes(op, out_features, in_features);
    check_weight_tiles(op, "weight", weight, out_features, in_features, weight, Backend::kCuda);
    ExpandWeightParams e;
    e.n = out_features;
    e.k = in_features;
    e.weight = weight.const_data_ptr();
    if (weight_low) {
      check_weight_tiles(op, "weight_low", *weight_low, out_features, in_features, weight, Backend::kCuda);
      e.format = WeightFormat::kNibblePlanes;
      e.weight_low = weight_low->const_data_ptr();
    }
    return run_expand(op, e, weight);
  }

  static Tensor expand_log4(Tensor weight, Tensor table, int64_t in_features) {
    char const* op = "expand_log4";
    VDIT_CHECK(table.dim() == 2, op, "table must be [N, 16] or [N, 8], got ", shape_of(table));
    check_sizes(op, table.size(0), in_features);
    check_weight_tiles(op, "weight", weight, table.size(0), in_features, weight, Backend::kCuda);
    ExpandWeightParams e;
    e.n = table.size(0);
    e.k = in_features;
    e.format = WeightFormat::kTable;
    e.weight = weight.const_data_ptr();
    e.table_size = check_code_table(op, table, e.n, weight, Backend::kCuda);
    e.table = table.const_data_ptr<int8_t>();
    return run_expand(op, e, weight);
  }

  // -------------------------------------------------------------------------------------------------------

  static void bind(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
    m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
    m.impl("w4a8_linear", TORCH_BOX(&w4a8_linear));
    m.impl("log4a8_linear", TORCH_BOX(&log4a8_linear));
    m.impl("expand_w4", TORCH_BOX(&expand_w4));
    m.impl("expand_log4", TORCH_BOX(&expand_log4));
  }
};

}  // namespace vdit
