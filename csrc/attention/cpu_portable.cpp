// The attention family without any flag of an instruction set: SSE2 on x86-64, NEON on aarch64.
#include "common/cpu/simd_portable.h"
//
#include "attention/cpu_body.h"

namespace vdit {
AttentionCpuKernels const kAttentionPortable = VDIT_ATTENTION_CPU_KERNELS;
}
