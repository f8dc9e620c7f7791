// How vq_linear gets its weights: pure functions of sizes, so that a choice can be explained and tested.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>

#include "vdit/vq.h"

namespace vdit {

enum class VqPath : int32_t {
  kRows = 0,    // few rows: bound by the bytes of the codes, each word looked up once for all rows
  kFused = 1,   // words are looked up where the product's registers are filled
  kExpand = 2,  // the weight is written to a scratch, and multiplied as any other
};

struct VqPathChoice {
  VqPath path = VqPath::kFused;
  bool asked = false;      // the caller named the path
  double expand_cost = 0;  // time that expanding adds, as a fraction of the stock product's
  double fused_cost = 0;   // time that a fused product takes beyond the stock one, likewise
  int64_t m = 0;

  std::string to_string() const {
    char const* const names[] = {"rows", "fused", "expand"};
    char text[160];
    std::snprintf(
        text, sizeof text,
        "vq_linear: %s at M = %lld%s: expanding would add %.1f %% to the stock product, looking words up in "
        "the kernel %.1f %% (estimates)",
        names[static_cast<int>(path)], static_cast<long long>(m), asked ? ", as asked" : "",
        100 * expand_cost, 100 * fused_cost);
    return text;
  }
};

inline constexpr int64_t kVqFewRows = 16;  // a row of mma tiles

// Reading codes and writing the weight beside the product, both proportional to n k, so that only m is left.
// On an H200 (4.3 TB/s; 700 TFLOP/s bf16, 1400 TOP/s int8 as reached) a bf16 weight costs 183 / m of its
// product and an int8 one 204 / m; on an A100 (1.7 TB/s, 270 and 500) 179 / m and 184 / m.
inline double vq_expand_cost(int64_t m, bool is_int8, int compute_capability) {
  bool const hopper = compute_capability >= 90;
  double const rows = is_int8 ? (hopper ? 204 : 184) : (hopper ? 183 : 179);
  return rows / static_cast<double>(m > 0 ? m : 1);
}

// NOTE: estimates from instruction counts, to be replaced by measured ones. `kernel` is the compute
// capability that the fused kernel was written for: on a GPU of 9.0, mma.sync reaches some 60 % of what wgmma
// does.
inline double vq_fused_cost(bool is_int8, int compute_capability, int kernel) {
  if (kernel >= 90) return is_int8 ? 0.03 : 0.02;
  double const lookups = is_int8 ? 0.08 : 0.15;
  return compute_capability >= 90 ? lookups + 0.6 : lookups;
}

inline VqPathChoice vq_path(int64_t m, bool is_int8, std::string const& asked, int compute_capability,
                            int kernel) {
  VqPathChoice choice;
  choice.m = m;
  choice.asked = asked != "auto";
  choice.expand_cost = vq_expand_cost(m, is_int8, compute_capability);
  choice.fused_cost = vq_fused_cost(is_int8, compute_capability, kernel);
  bool const expand = choice.asked ? asked == "expand" : choice.expand_cost < choice.fused_cost;
  choice.path = expand ? VqPath::kExpand : !is_int8 && m <= kVqFewRows ? VqPath::kRows : VqPath::kFused;
  return choice;
}

// Which of its loops the CPU runs.
// NOTE: microseconds of one Zen 4 core on 1536 x 1536 bf16 with 256 words of 4, other programs running:
//   rows        1    2    4    8   16
//   few rows  222  242  283  570
//   many      500  500  500  500  503   (a vector holds 16 rows)
inline VqPath vq_cpu_path(int64_t m) { return m <= 4 ? VqPath::kRows : VqPath::kFused; }

}  // namespace vdit
