// The linear family for AVX-512 with VNNI. Compile with the flags of cpu_avx512.cpp and -mavx512vnni.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "linear/cpu_body.h"

namespace vdit {
LinearCpuKernels const kLinearAvx512Vnni = VDIT_LINEAR_CPU_KERNELS;
}
#endif
