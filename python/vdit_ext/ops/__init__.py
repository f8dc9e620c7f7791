"""Python side of ``torch.ops.vdit``: documented wrappers, fake kernels and naive definitions."""

from ._library import NAMESPACE, library_dir, load_libraries

LIBRARIES = load_libraries()

from .attention import (  # noqa: E402
    block_mass,
    block_mass_topk,
    block_sparse_attention,
    kmeans_assign,
    label_sort,
    lists_from_mask,
    mask_from_lists,
    mean_pool_blocks,
    merge_attention,
    permute_rows,
    rms_norm_rope,
    segment_mean,
    topk_blocks,
    topp_blocks,
    unpermute_rows,
)
from .linear import (  # noqa: E402
    expand_log4,
    expand_w4,
    log4a8_linear,
    pack_log4,
    pack_w4,
    quantize_rows,
    unpack_log4,
    unpack_w4,
    w4a8_linear,
    w8a8_linear,
)
from .vq import pack_vq, unpack_vq, vq_assign, vq_dequantize, vq_linear  # noqa: E402

__all__ = [
    "LIBRARIES",
    "NAMESPACE",
    "block_mass",
    "block_mass_topk",
    "block_sparse_attention",
    "expand_log4",
    "expand_w4",
    "kmeans_assign",
    "label_sort",
    "library_dir",
    "lists_from_mask",
    "log4a8_linear",
    "mask_from_lists",
    "mean_pool_blocks",
    "merge_attention",
    "pack_log4",
    "pack_vq",
    "pack_w4",
    "permute_rows",
    "quantize_rows",
    "rms_norm_rope",
    "segment_mean",
    "topk_blocks",
    "topp_blocks",
    "unpack_log4",
    "unpack_vq",
    "unpack_w4",
    "unpermute_rows",
    "vq_assign",
    "vq_dequantize",
    "vq_linear",
    "w4a8_linear",
    "w8a8_linear",
]
