"""A block of Wan whose quantized linears do what lies between them: norms, modulation, GELU, gates, residuals.

Upstream's block reads and writes the token stream some fourteen times around its linears. Here
``quantize_rows`` norms, modulates and quantizes in one pass, and the products add bias, gate and residual as
they store. The results
differ from the unfused ones by rounding: what upstream rounds to the model's dtype between two operations stays
in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from ..quant.linear import QuantLinear
from .processors import WanSelfAttentionProcessor

_PROCESSORS = (WanAttnProcessor, WanSelfAttentionProcessor)


class FusedBlocks:
    """The blocks of a model that run fused, for as long as nothing else wants to see what lies between.

    Attributes:
        blocks: those that could when this was made.
    """

    def __init__(self, model: nn.Module):
        self.blocks: list[WanTransformerBlock] = []
        self._forwards: list[_FusedForward] = []
        for block in getattr(model, "blocks", ()):
            if (
                type(block) is WanTransformerBlock
                and "forward" not in block.__dict__
                and refusal(block) is None
            ):
                forward = _FusedForward(block)
                block.forward = forward
                self.blocks.append(block)
                self._forwards.append(forward)

    def check(self) -> None:
        """Look again which blocks may run fused: hooks and adapters come and go. Called before the model is.

        A compiled block sees the outcome alone, one boolean.
        """
        free = not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
        for forward in self._forwards:
            forward.fuses = free and refusal(forward.block) is None

    def running(self) -> list[WanTransformerBlock]:
        """The blocks that would run fused now."""
        self.check()
        return [forward.block for forward in self._forwards if forward.fuses]

    def undo(self) -> None:
        """Let the blocks run as upstream wrote them."""
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            forward.fuses = False
            # Something else may have wrapped it since; it then passes calls on.
            if block.__dict__.get("forward") is forward:
                del block.forward
        self.blocks, self._forwards = [], []


class _FusedForward:
    """Stands for ``block.forward``."""

    def __init__(self, block: WanTransformerBlock):
        self.block = block
        self.fuses = False

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        block = self.block
        if not self.fuses:
            return WanTransformerBlock.forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
        return fused_forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)


def refusal(block: WanTransformerBlock) -> str | None:
    """Why a block cannot run fused: the first part that is not what upstream and ``accelerate`` made, or
    None."""
    for name, part in block.named_modules():
        if part is block:
            continue
        hooked = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        # Offloading, caches and the like replace `forward` instead of registering a hook.
        if hooked or "forward" in part.__dict__:
            return f"{name} has hooks"
    for name in ("attn1", "attn2"):
        attn = getattr(block, name)
        if type(attn) is not WanAttention or type(attn.processor) not in _PROCESSORS:
            return f"{name} is not upstream's"
        if not _is_idle(attn.to_out[1]):
            return f"{name} drops out"
    for name in ("norm1", "norm3"):
        norm = getattr(block, name)
        if type(norm) is not FP32LayerNorm or norm.weight is not None or norm.bias is not None:
            return f"{name} is not upstream's"
    if type(block.norm2) not in (FP32LayerNorm, nn.Identity):
        return "norm2 is not upstream's"
    first, dropout, second = _feed_forward(block)
    if first is None or not _is_idle(dropout):
        return "ffn is not upstream's"
    for linear in (*_readers(block.attn1), *_readers(block.attn2)[:1], *_writers(block), first, second):
        if type(linear) is not QuantLinear or not linear.takes_prologue:
            return "a linear is not quantized, or not to integer rows"
    return None


def fused_forward(
    block: WanTransformerBlock, hidden: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """As ``WanTransformerBlock.forward``; hidden ``[B, S, D]``, temb ``[B, 6, D]`` or, by token, ``[B, S, 6,
    D]``."""
    by_token = temb.ndim == 4
    table = block.scale_shift_table.unsqueeze(0) if by_token else block.scale_shift_table
    parts = (table + temb.float()).chunk(6, dim=2 if by_token else 1)
    shift, scale, gate, c_shift, c_scale, c_gate = (p.squeeze(2) if by_token else p for p in parts)
    with (
        _adding(_readers(block.attn1), prologue=_norm(block.norm1, scale, shift), reading=hidden),
        _adding([block.attn1.to_out[0]], epilogue={"gate": gate, "residual": hidden}),
    ):
        hidden = block.attn1(hidden, None, None, rotary_emb)
    with (
        _adding(_readers(block.attn2)[:1], prologue=_norm(block.norm2)),
        _adding([block.attn2.to_out[0]], epilogue={"residual": hidden}),
    ):
        hidden = block.attn2(hidden, context, None, None)
    first, _, second = _feed_forward(block)
    with _adding([first], prologue=_norm(block.norm3, c_scale, c_shift)):
        inner = first(hidden)
    with _adding([second], prologue={"prologue": "gelu_tanh"}):
        return second(inner, gate=c_gate, residual=hidden)


@contextlib.contextmanager
def _adding(
    linears: list[QuantLinear],
    *,
    prologue: dict[str, Any] | None = None,
    epilogue: dict[str, Any] | None = None,
    reading: Tensor | None = None,
) -> Iterator[None]:
    """The linears do this too, in calls inside of the block; ``reading`` is what all of them will read."""
    try:
        for linear in linears:
            linear.prologue, linear.epilogue = prologue, epilogue
        if reading is not None and _share_by_hand(linears, reading):
            rows = linears[0].rows(reading)
            for linear in linears:
                linear.ahead = rows
        yield
    finally:
        for linear in linears:
            linear.prologue = linear.epilogue = linear.ahead = None


def _share_by_hand(linears: list[QuantLinear], x: Tensor) -> bool:
    """Whether the linears have one input transform, and would each quantize x for itself."""
    alike = len(linears) > 1 and all(one.shared is linears[0].shared is not None for one in linears)
    return alike and (torch.compiler.is_compiling() or x.is_inference())


def _norm(norm: nn.Module, scale: Tensor | None = None, shift: Tensor | None = None) -> dict[str, Any] | None:
    """Arguments of ``quantize_rows`` for a norm and the modulation after it."""
    if type(norm) is nn.Identity:
        return None
    return {
        "prologue": "layer_norm",
        "norm_weight": None if norm.weight is None else norm.weight.float(),
        "norm_bias": None if norm.bias is None else norm.bias.float(),
        "modulation_scale": scale,
        "shift": shift,
        "eps": norm.eps,
    }


def _readers(attn: WanAttention) -> list[nn.Module]:
    """The linears that read the attention's own input; of cross attention, the first one does."""
    if attn.fused_projections and getattr(attn, "to_qkv", None) is not None:
        return [attn.to_qkv]
    return [attn.to_q, attn.to_k, attn.to_v]


def _writers(block: WanTransformerBlock) -> list[nn.Module]:
    return [block.attn1.to_out[0], block.attn2.to_out[0]]


def _feed_forward(block: WanTransformerBlock) -> tuple[Any, Any, Any]:
    """The two linears of the feed-forward and the dropout between, or three times None where it is another."""
    ffn = block.ffn
    plain = type(ffn) is FeedForward and len(ffn.net) == 3 and type(ffn.net[0]) is GELU
    if not plain or ffn.net[0].approximate != "tanh":
        return None, None, None
    return ffn.net[0].proj, ffn.net[1], ffn.net[2]


def _is_idle(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and (module.p == 0 or not module.training)
