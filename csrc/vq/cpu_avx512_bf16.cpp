// The vq family for AVX-512 with bf16 dot products. Compile with -mavx512bf16 beside the flags of
// avx512_vnni.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "vq/cpu_body.h"

namespace vdit {
VqCpuKernels const kVqAvx512Bf16 = VDIT_VQ_CPU_KERNELS;
}
#endif
