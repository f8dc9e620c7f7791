// What op_cuda.cpp runs beside the public entry points.
#pragma once
#include "vdit/vq.h"

namespace vdit {

// p.epilogue of a product [m, n] of p.dtype, contiguous, that another library has computed.
void run_vq_finish_sm80(VqLinearParams const& p, void const* product, void* stream);

}  // namespace vdit
