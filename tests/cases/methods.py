"""Small sparse methods for the tests of the integrations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vdit_ext.sparse.plan import BlockPlan, StepInfo, TokenLayout


class State:
    """What a test method remembers of one layer."""

    def __init__(self, layer: int):
        self.layer = layer
        self.tokens_permuted = False
        self.resets = 0
        self.handle = torch.zeros(1)  # compiled code reads it, a different one for every layer


@dataclass(frozen=True)
class Banded:
    """Every query block sees the next ``keep`` share of the key blocks, its own first; 1 keeps all.

    With ``shuffle`` the blocks are made of tokens in a random order, which the model may apply once.
    ``calls`` gathers what the method was told: step, branch and so on.
    """

    name: ClassVar[str] = "banded"
    observes_dense_steps: bool = False
    keep: float = 1.0
    block: int = 8
    dense_steps: int = 0
    dense_layers: int = 0
    shuffle: bool = False
    calls: list[StepInfo] = field(default_factory=list, compare=False)

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        return info.step < self.dense_steps or layer < self.dense_layers

    def new_state(self, layer: int, num_layers: int) -> State:
        return State(layer)

    def begin_step(self, info: StepInfo, layout: TokenLayout, state: State) -> None:
        if state.layer == 0:
            self.calls.append(info)

    def plan(self, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, state: State) -> BlockPlan:
        length = layout.num_tokens
        blocks = -(-length // self.block)
        width = max(1, round(self.keep * blocks))
        rows = torch.arange(blocks, device=q.device)
        lists = (rows[:, None] + rows[None, :width]) % blocks
        counts = torch.full((1, 1, blocks), width, dtype=torch.int32, device=q.device)
        counts = counts + state.handle.to(q.device).int()
        index = None
        if self.shuffle and not state.tokens_permuted:
            index = self.token_order(layout).to(q.device)[None, None]
        return BlockPlan(
            counts,
            lists.int()[None, None],
            q_block_size=self.block,
            kv_block_size=self.block,
            q_index=index,
            kv_index=index,
        )

    def observe(self, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, state: State) -> None:
        state.handle.mul_(1)

    def token_order(self, layout: TokenLayout) -> torch.Tensor | None:
        if not self.shuffle:
            return None
        # A fixed permutation without a generator, which a compiled block could not hold: multiply by a unit.
        length = layout.num_tokens
        step = next(
            s
            for s in range(length // 2 + 1, 2 * length)
            if torch.gcd(torch.tensor(s), torch.tensor(length)) == 1
        )
        return (torch.arange(length) * step % length).int()

    def reset(self, state: State) -> None:
        state.resets += 1
