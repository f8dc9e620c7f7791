// Which instruction set the CPU kernels run with: the one place where the machine is asked.
#pragma once

#if defined(__x86_64__)
#define VDIT_CPU_X86 1
#else
#define VDIT_CPU_X86 0
#endif

namespace vdit {

// Ordered: every level includes the ones before it.
enum class CpuIsa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4 };

// The best level this machine supports, or the one that VDIT_CPU_ISA=portable|avx2|avx512|avx512_vnni|
// avx512_bf16 names. The variable is read once. Throws std::runtime_error for a name that is unknown or not
// supported here.
CpuIsa cpu_isa_level();

// The same as a name, for build info and error reports.
char const* cpu_isa();

}  // namespace vdit
