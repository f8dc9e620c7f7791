// How a product with packed weights is run on CUDA: by a kernel that unpacks the codes as it multiplies
// ("fused"), or by unpacking them once to int8 and running the int8 kernel on that ("expand"). Pure host
// code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "vdit/linear.h"

namespace vdit {

enum class PathRequest : int32_t { kAuto = 0, kFused = 1, kExpand = 2 };

struct LinearPath {
  bool expand = false;
  bool asked = false;         // the caller named the path
  double expand_cost = 0;     // time that expanding adds, as a fraction of the int8 product's
  double fused_cost = 0;      // time that unpacking in the kernel adds, likewise
  int64_t scratch_bytes = 0;  // of the expanded weight
  int64_t m = 0;
  WeightFormat format = WeightFormat::kInt8;

  std::string to_string() const;
};

inline char const* format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt8: return "int8";
    case WeightFormat::kInt4: return "int4";
    case WeightFormat::kNibblePlanes: return "nibble planes";
    default: return "table";
  }
}

inline std::string percent(double fraction) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f %%", 100 * fraction);
  return text;
}

inline std::string LinearPath::to_string() const {
  if (format == WeightFormat::kInt8) return "linear: int8 weights are multiplied as they are";
  std::string const what = std::string(expand ? "expand" : "fused") + " for " + format_name(format) +
                           " weights at M = " + std::to_string(m);
  std::string const why = "expanding would add " + percent(expand_cost) + " to the int8 product and " +
                          std::to_string(scratch_bytes) + " bytes of scratch, unpacking in the kernel " +
                          percent(fused_cost) + " (estimates)";
  return "linear: " + what + (asked ? ", as asked: " : ": ") + why;
}

// Time to expand a weight beside the time of the int8 product: both are proportional to n k, so only m is
// left. A weight is read at half a byte and written at one, 1.5 n k bytes at memory speed; the product is 2 m
// n k operations. On an H200 (4.3 TB/s, 1450 TOP/s) that makes 253 / m, on an A100 (1.7 TB/s, 500 TOP/s) 221
// / m.
inline double expand_cost(int64_t m, int compute_capability) {
  return (compute_capability >= 90 ? 253.0 : 221.0) / static_cast<double>(m > 0 ? m : 1);
}

// Time that unpacking adds to a product of many rows, beside that of int8 weights.
// NOTE: calculated, to be replaced by measured times. With mma.sync (128 x 128 tiles on an A100) unpacking
// takes 9, 19, 13 and 41 % of the products' cycles on the integer lanes for int4, planes and tables of 8 and
// 16, most of it hidden behind the tensor cores; shared memory is as busy as with int8 weights (75 %), or 88
// % with planes. With wgmma (README.md) shared memory is the limit: int8 weights fill it, packed ones leave
// room, and planes need 9 % more.
inline double fused_cost(WeightFormat format, int32_t table_size, int compute_capability) {
  bool const sm90 = compute_capability >= 90, small_table = table_size == 8;
  switch (format) {
    case WeightFormat::kInt8: return 0;
    case WeightFormat::kInt4: return sm90 ? 0 : 0.01;
    case WeightFormat::kNibblePlanes: return sm90 ? 0.09 : 0.03;
    default: return sm90 ? (small_table ? 0 : 0.02) : (small_table ? 0.015 : 0.05);
  }
}

// A product of few rows is bound by the weight's bytes, which the fused kernel reads once and fewest: the
// rule below keeps it there by itself, because expanding then costs more than the whole product.
inline LinearPath linear_path(int64_t m, int64_t n, int64_t k, WeightFormat format, int32_t table_size,
                              PathRequest request, int compute_capability) {
  LinearPath path;
  path.m = m;
  path.format = format;
  if (format == WeightFormat::kInt8) return path;
  path.asked = request != PathRequest::kAuto;
  path.expand_cost = expand_cost(m, compute_capability);
  path.fused_cost = fused_cost(format, table_size, compute_capability);
  path.scratch_bytes = n * ((k + 15) / 16 * 16);
  path.expand = path.asked ? request == PathRequest::kExpand : path.expand_cost < path.fused_cost;
  return path;
}

// Throws std::runtime_error with one sentence.
inline PathRequest path_request(std::string const& name, char const* op) {
  if (name == "auto") return PathRequest::kAuto;
  if (name == "fused") return PathRequest::kFused;
  if (name == "expand") return PathRequest::kExpand;
  throw std::runtime_error(std::string("vdit::") + op + ": path must be auto, fused or expand, got '" + name +
                           "'.");
}

}  // namespace vdit
