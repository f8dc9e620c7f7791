"""Sparse attention: methods that return a :class:`BlockPlan`, and what they are built from."""

from collections.abc import Callable

from .dense import Dense
from .draft_attention import DraftAttention
from .plan import (
    BlockPlan,
    SparseMethod,
    StepInfo,
    TokenLayout,
    add_text_blocks,
    add_text_index,
    add_text_offsets,
    begin_step,
    dense_layout_plan,
    dense_plan,
)
from .shapes import SHAPES, VideoShape
from .svg1 import SVG1
from .svg2 import SVG2

# A name to its class: METHODS[name](**settings), or METHODS[name].preset(model, kind).
METHODS: dict[str, Callable[..., SparseMethod]] = {
    method.name: method for method in (Dense, DraftAttention, SVG1, SVG2)
}

__all__ = [
    "METHODS",
    "SHAPES",
    "SVG1",
    "SVG2",
    "BlockPlan",
    "Dense",
    "DraftAttention",
    "SparseMethod",
    "StepInfo",
    "TokenLayout",
    "VideoShape",
    "add_text_blocks",
    "add_text_index",
    "add_text_offsets",
    "begin_step",
    "dense_layout_plan",
    "dense_plan",
]
