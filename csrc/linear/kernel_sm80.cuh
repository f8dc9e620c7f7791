// The linear layer on compute capability 8.0 and up: int8 rows times int8, 4-bit, nibble-plane or table
// weights.
#pragma once
#include "linear/kernel_sm80_weights.cuh"

namespace vdit {

template <class Tile, template <class> class WeightsOf>
struct LinearKernel : GemmS8Kernel<Tile, WeightsOf<Tile>> {};

}  // namespace vdit
