// How vq_linear gets its weights, chosen by size alone: pure functions, so that a choice can be explained and tested.
#pragma once
#include <cstdint>

namespace vdit {

enum class VqPath : int32_t {
  kRows = 0,    // few rows: bound by reading codes; a word is looked up for a few rows at a time
  kFused = 1,   // words are looked up where the product's registers are filled
  kExpand = 2,  // the weight is written to a scratch first
};

inline char const* to_string(VqPath path) {
  return path == VqPath::kRows ? "rows" : path == VqPath::kFused ? "fused" : "expand";
}

// Which of its two loops the CPU runs.
// NOTE: rows lie in the lanes of the fused loop, so fewer than a vector of them waste lanes.
inline VqPath vq_cpu_path(int64_t m, int lanes) { return m <= lanes / 2 ? VqPath::kRows : VqPath::kFused; }

}  // namespace vdit
