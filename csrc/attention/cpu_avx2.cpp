// The attention family for AVX2. Compile with -mavx2 -mfma -mf16c.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx2.h"
//
#include "attention/cpu_body.h"

namespace vdit {
AttentionCpuKernels const kAttentionAvx2 = VDIT_ATTENTION_CPU_KERNELS;
}
#endif
