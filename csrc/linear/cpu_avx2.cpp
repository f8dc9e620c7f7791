// The linear family for AVX2. Compile with -mavx2 -mfma -mf16c -ffp-contract=off.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx2.h"
//
#include "linear/cpu_body.h"

namespace vdit {
LinearCpuKernels const kLinearAvx2 = VDIT_LINEAR_CPU_KERNELS;
}
#endif
