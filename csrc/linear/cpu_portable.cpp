// The linear family without any flag of an instruction set: SSE2 on x86-64, NEON on aarch64.
// Compile with -ffp-contract=off.
#include "common/cpu/simd_portable.h"
//
#include "linear/cpu_body.h"

namespace vdit {
LinearCpuKernels const kLinearPortable = VDIT_LINEAR_CPU_KERNELS;
}
