// One of the instantiations of block_sparse_attention for sm80, each a file: together they would want 4 GB of
// compiler memory.
#include "attention/kernel_sm80_attend.cuh"

template void vdit::sm80::attend<cute::half_t, 64>(BlockSparseAttentionParams const&, AttentionTile const&,
                                                   void*);
