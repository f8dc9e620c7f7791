// The vq family for AVX-512. Compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "vq/cpu_body.h"

namespace vdit {
VqCpuKernels const kVqAvx512 = VDIT_VQ_CPU_KERNELS;
}
#endif
