#include "common/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vdit {
namespace {

constexpr char const* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
constexpr int kLevels = sizeof kNames / sizeof *kNames;

CpuIsa best_level() {
#if VDIT_CPU_X86
  bool const avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return CpuIsa::kPortable;
  bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuIsa::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return CpuIsa::kAvx512;
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512Vnni;
#else
  return CpuIsa::kPortable;
#endif
}

CpuIsa chosen_level() {
  CpuIsa const best = best_level();
  char const* const wish = std::getenv("VDIT_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (int level = 0; level < kLevels; ++level) {
    if (std::string(wish) != kNames[level]) continue;
    if (level <= static_cast<int>(best)) return static_cast<CpuIsa>(level);
    throw std::runtime_error("vdit: VDIT_CPU_ISA=" + std::string(wish) +
                             " is not supported by this CPU, whose best is " +
                             kNames[static_cast<int>(best)]);
  }
  throw std::runtime_error("vdit: VDIT_CPU_ISA must be portable, avx2, avx512, avx512_vnni or avx512_bf16, got " +
                           std::string(wish));
}

}  // namespace

CpuIsa cpu_isa_level() {
  static CpuIsa const level = chosen_level();
  return level;
}

char const* cpu_isa() { return kNames[static_cast<int>(cpu_isa_level())]; }

}  // namespace vdit
