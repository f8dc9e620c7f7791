// The vq family for AVX2. Compile with -mavx2 -mfma -mf16c.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx2.h"
//
#include "vq/cpu_body.h"

namespace vdit {
VqCpuKernels const kVqAvx2 = VDIT_VQ_CPU_KERNELS;
}
#endif
