// Op schemas of the vq family. In a header because the emulator registers the same ones in a second namespace.
#pragma once
#include "common/torch_stable.h"

namespace vdit {

inline void define_vq_schemas(torch::stable::detail::StableLibrary& m) {
  m.def("vq_assign(Tensor vectors, Tensor codebook, int count=1) -> (Tensor, Tensor)");
  m.def(
      "vq_dequantize(Tensor codes, Tensor codebook, int out_features, int in_features, *, "
      "Tensor? row_scale=None) -> Tensor");
  m.def(
      "vq_linear(Tensor x, Tensor codes, Tensor codebook, int out_features, *, Tensor? x_scale=None, "
      "Tensor? weight_scale=None, Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, "
      "ScalarType? out_dtype=None, str path=\"auto\") -> Tensor");
}

}  // namespace vdit
