// The linear family for AVX-512. Compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
// -ffp-contract=off.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "linear/cpu_body.h"

namespace vdit {
LinearCpuKernels const kLinearAvx512 = VDIT_LINEAR_CPU_KERNELS;
}
#endif
