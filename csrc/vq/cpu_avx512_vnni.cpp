// The vq family for AVX-512 with VNNI. Compile with -mavx512vnni beside the flags of avx512.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "vq/cpu_body.h"

namespace vdit {
VqCpuKernels const kVqAvx512Vnni = VDIT_VQ_CPU_KERNELS;
}
#endif
