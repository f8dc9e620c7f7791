#include "linear/launch_sm80.cuh"

namespace vdit {
void launch_linear_table_sm80(LinearParams const& p, void* stream) {
  if (p.table_size == 8) return launch_linear<true, Table8Weights>(p, stream);
  launch_linear<true, Table16Weights>(p, stream);
}
}  // namespace vdit
