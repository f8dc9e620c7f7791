// The vq family without any flag of an instruction set: SSE2 on x86-64, NEON on aarch64.
#include "common/cpu/simd_portable.h"
//
#include "vq/cpu_body.h"

namespace vdit {
VqCpuKernels const kVqPortable = VDIT_VQ_CPU_KERNELS;
}
