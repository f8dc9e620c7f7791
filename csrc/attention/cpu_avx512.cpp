// The attention family for AVX-512. Compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "attention/cpu_body.h"

namespace vdit {
AttentionCpuKernels const kAttentionAvx512 = VDIT_ATTENTION_CPU_KERNELS;
}
#endif
