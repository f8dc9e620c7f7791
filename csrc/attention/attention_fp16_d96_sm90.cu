// One of the instantiations of block_sparse_attention for sm90, each a file, so that compilers share the
// work.
#include "attention/kernel_sm90_attend.cuh"

template void vdit::sm90::attend<cute::half_t, 96>(BlockSparseAttentionParams const&, void*, void*);
