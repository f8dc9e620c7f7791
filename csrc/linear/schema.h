// Op schemas of the linear family. In a header because the emulator registers the same ones in a second
// namespace.
#pragma once
#include "common/torch_stable.h"

namespace vdit {

inline void define_linear_schemas(torch::stable::detail::StableLibrary& m) {
  m.def(
      "quantize_rows(Tensor x, *, str prologue=\"none\", Tensor? norm_weight=None, Tensor? norm_bias=None, "
      "Tensor? modulation_scale=None, Tensor? shift=None, Tensor? channel_scale=None, int hadamard=0, "
      "Tensor? signs=None, int bits=8, float eps=1e-6) -> (Tensor, Tensor, Tensor)");
  m.def(
      "w8a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, *, Tensor? x_sum=None, "
      "Tensor? weight_zero=None, Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "w4a8_linear(Tensor x, Tensor x_scale, Tensor x_sum, Tensor weight, Tensor weight_scale, Tensor weight_zero, "
      "*, Tensor? weight_low=None, Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, "
      "ScalarType? out_dtype=None, str path=\"auto\") -> Tensor");
  m.def(
      "log4a8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor table, Tensor weight_scale, *, "
      "Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, ScalarType? out_dtype=None, "
      "str path=\"auto\") -> Tensor");
  m.def("expand_w4(Tensor weight, int out_features, int in_features, *, Tensor? weight_low=None) -> Tensor");
  m.def("expand_log4(Tensor weight, Tensor table, int in_features) -> Tensor");
}

}  // namespace vdit
