// The attention family for AVX-512 with bf16 dot products. Compile as cpu_avx512.cpp, plus -mavx512bf16.
#include "common/cpu/isa.h"
#if VDIT_CPU_X86
#include "common/cpu/simd_avx512.h"
//
#include "attention/cpu_body.h"

namespace vdit {
AttentionCpuKernels const kAttentionAvx512Bf16 = VDIT_ATTENTION_CPU_KERNELS;
}
#endif
