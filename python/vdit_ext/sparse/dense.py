"""Dense attention as a method, so that comparisons have a baseline of the same kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .plan import BlockPlan, StepInfo, TokenLayout, dense_layout_plan
from .state import LayerState


@dataclass(frozen=True)
class Dense:
    """Always dense; :meth:`plan` exists for those who want the sparse kernel to run dense attention."""

    name: ClassVar[str] = "dense"
    observes_dense_steps: ClassVar[bool] = False

    @classmethod
    def preset(cls, model: str, kind: str = "paper") -> Dense:
        """There is nothing to set: every model and kind gives the same."""
        return cls()

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        """True."""
        return True

    def new_state(self, layer: int, num_layers: int) -> LayerState:
        """An empty state."""
        return LayerState(layer, num_layers)

    def plan(self, q: Tensor, k: Tensor, layout: TokenLayout, state: LayerState) -> BlockPlan:
        """All pairs, except that padded text sees, and is seen by, only itself; q and k ``[B, H, S, D]``."""
        layout.check(q, k, "Dense")
        return dense_layout_plan(layout, device=q.device)

    def observe(self, q: Tensor, k: Tensor, layout: TokenLayout, state: LayerState) -> None:
        """Nothing to learn."""

    def token_order(self, layout: TokenLayout) -> None:
        """None: any order does."""
        return None

    def reset(self, state: LayerState) -> None:
        """Clear the state."""
        state.reset()
