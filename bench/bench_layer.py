"""One whole transformer layer of diffusers at a model's real size, dense against accelerated.

Weights are random; hidden states have topics, and the norms of q and k have a gain, so that attention is
concentrated and the density that SVG2's selection keeps means something. It is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import attention_peers
import bench_attention
import bench_hopper
import synthetic
import torch
from bench_hopper import MODELS, Model
from harness import Case, Group, NotHere, Peer
from torch import Tensor, nn

from vdit_ext import ops
from vdit_ext.sparse import SVG2, DraftAttention
from vdit_ext.testing import TOLERANCE, assert_close

METHODS = ("svg2", "draft")
# Squared, the spread of the logits between unrelated topics: at 2 a tenth of them holds most of the attention.
NORM_GAIN = 2**0.5


# ---------------------------------------------------------------------------------------------------------
# Blocks of diffusers
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A block on a device with the arguments of a call.

    Attributes:
        attention: its self-attention.
        hidden: name of the argument that holds the video tokens.
        rotary: name of the argument with the rotary tables, and their axis of tokens.
    """

    model: Model
    block: nn.Module
    attention: nn.Module
    arguments: dict[str, Any]
    rotary: tuple[str, int]
    hidden: str = "hidden_states"
    upstream: Any = field(init=False)

    def __post_init__(self) -> None:
        self.upstream = self.attention.processor
        for norm in (self.attention.norm_q, self.attention.norm_k):
            norm.weight.data.fill_(NORM_GAIN)

    def run(self, processor: Any) -> Tensor:
        """The block's video tokens with that attention processor."""
        self.attention.processor = processor
        result = self.block(**self.arguments)
        return result[0] if isinstance(result, tuple) else result

    def reorder(self, order: Tensor) -> None:
        """Run in another order of the video tokens from now on."""
        start, count = self.model.layout.video_start, self.model.layout.num_video
        order = order.long()[start : start + count].to(self.arguments[self.hidden].device) - start
        self.arguments[self.hidden] = self.arguments[self.hidden].index_select(1, order)
        name, axis = self.rotary
        self.arguments[name] = tuple(table.index_select(axis, order) for table in self.arguments[name])


def wan(model: Model, dtype, device) -> Layer:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    width, gen = model.heads * model.dim, torch.Generator(device).manual_seed(1)
    with torch.device(device):  # drawing the weights of a large layer on a CPU takes seconds
        block = WanTransformerBlock(
            width, width * 27 // 10, model.heads, "rms_norm_across_heads", cross_attn_norm=True
        )
    frames, rows, columns = model.layout.grid
    latents = torch.empty(1, 1, frames, 2 * rows, 2 * columns, device="meta")
    tables = WanRotaryPosEmbed(model.dim, (1, 2, 2), 1024)(latents)
    arguments = {
        "hidden_states": synthetic.video_hidden(model.layout, width, dtype, device),
        "encoder_hidden_states": torch.randn(1, 512, width, generator=gen, device=device).to(dtype),
        "temb": torch.randn(1, 6, width, generator=gen, device=device),
        "rotary_emb": tuple(table.float().to(device) for table in tables),
    }
    block = block.to(device, dtype).eval()
    return Layer(model, block, block.attn1, arguments, ("rotary_emb", 1))


def hunyuan(model: Model, dtype, device, *, single: bool = False) -> Layer:
    from diffusers.models.transformers import transformer_hunyuan_video as upstream

    width, gen = model.heads * model.dim, torch.Generator(device).manual_seed(1)
    kind = upstream.HunyuanVideoSingleTransformerBlock if single else upstream.HunyuanVideoTransformerBlock
    with torch.device(device):
        block = kind(model.heads, model.dim, mlp_ratio=4.0, qk_norm="rms_norm")
    axes = [model.dim // 8, model.dim * 7 // 16, model.dim * 7 // 16]
    rotary = upstream.HunyuanVideoRotaryPosEmbed(1, 1, axes)
    tables = rotary(torch.empty(1, 1, *model.layout.grid, device=device))
    name = "image_rotary_emb" if single else "freqs_cis"
    arguments = {
        "hidden_states": synthetic.video_hidden(model.layout, width, dtype, device),
        "encoder_hidden_states": torch.randn(1, model.layout.text_len, width, generator=gen, device=device).to(
            dtype
        ),
        "temb": torch.randn(1, width, generator=gen, device=device).to(dtype),
        # NOTE: the whole model always passes a mask, which keeps torch from its fastest kernels; without one
        # the dense layer is at its best.
        "attention_mask": None,
        name: tables,
    }
    block = block.to(device, dtype).eval()
    return Layer(model, block, block.attn, arguments, (name, 0))


def hunyuan_single(model: Model, dtype, device) -> Layer:
    return hunyuan(model, dtype, device, single=True)


def cogvideox(model: Model, dtype, device) -> Layer:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    width, gen = model.heads * model.dim, torch.Generator(device).manual_seed(1)
    with torch.device(device):
        block = CogVideoXBlock(width, model.heads, model.dim, time_embed_dim=512, attention_bias=True)
    frames, rows, columns = model.layout.grid
    tables = get_3d_rotary_pos_embed(
        model.dim, None, (rows, columns), frames, grid_type="slice", max_size=(rows, columns), device=device
    )
    arguments = {
        "hidden_states": synthetic.video_hidden(model.layout, width, dtype, device),
        "encoder_hidden_states": torch.randn(1, model.layout.text_len, width, generator=gen, device=device).to(
            dtype
        ),
        "temb": torch.randn(1, 512, generator=gen, device=device).to(dtype),
        "image_rotary_emb": tables,
    }
    block = block.to(device, dtype).eval()
    return Layer(model, block, block.attn1, arguments, ("image_rotary_emb", 0))


# Classes of diffusers that are made of such blocks.
TRANSFORMERS = {
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "hunyuan_single": "HunyuanVideoTransformer3DModel",
    "wan14b": "WanTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
}
# Name on the command line: how its layer is made, and whose sizes it has.
SHAPES: dict[str, tuple[Callable[..., Layer], str]] = {
    "hunyuan": (hunyuan, "hunyuan"),
    "hunyuan_single": (hunyuan_single, "hunyuan"),
    "wan14b": (wan, "wan14b"),
    "cogvideox": (cogvideox, "cogvideox"),
}


# ---------------------------------------------------------------------------------------------------------
# Selection
# ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="wan14b", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated sparse methods")
    parser.add_argument("--dtype", choices=tuple(bench_attention.DTYPES), default="bfloat16")
    bench_hopper.add_size_arguments(parser)


def dtypes_of(args: argparse.Namespace, device: str) -> set[torch.dtype]:
    """The type whose matrix rate is a ceiling in this run."""
    return {bench_attention.DTYPES[args.dtype]}


def groups(args: argparse.Namespace, device: str) -> Iterator[Callable[[], Group]]:
    """Builders of a group for each layer and method; a layer that only runs dense has one."""
    for option, known in (("shape", tuple(SHAPES)), ("methods", METHODS)):
        if unknown := set(getattr(args, option).split(",")) - set(known):
            raise SystemExit(
                f"--{option}: expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}"
            )
    dtype = bench_attention.DTYPES[args.dtype]
    for shape in args.shape.split(","):
        model = bench_hopper.resized(MODELS[SHAPES[shape][1]], args)
        if entry_of(TRANSFORMERS[shape]) is None:
            yield lambda s=shape, m=model: dense_group(s, m, dtype, device)
            continue
        for method in args.methods.split(","):
            yield lambda s=shape, m=model, n=method: layer_group(s, m, n, dtype, device)


def entry_of(transformer: str):
    """How ``accelerate`` treats a transformer class of diffusers, None where it does not."""
    from vdit_ext.integrations.diffusers import MODELS as known

    return known.get(transformer)


# ---------------------------------------------------------------------------------------------------------
# A layer under one method
# ---------------------------------------------------------------------------------------------------------


def dense_group(shape: str, model: Model, dtype, device: str) -> Group:
    """A layer that vdit_ext has no processor for, and attention of its size."""
    torch.manual_seed(0)  # of the weights
    layer = SHAPES[shape][0](model, dtype, device)
    size = 1, model.layout.num_tokens, model.heads, model.dim
    q, k, v = (torch.randn(size, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    group = Group(f"layer {shape} dense", device, [])
    why = f"dense only, vdit_ext has no processor for {TRANSFORMERS[shape]}"
    sizes = {"layer": shape, "method": "dense", "tokens": model.layout.num_tokens, "note": why}
    for part, calls in (
        ("dense layer", dense_layers(layer, device)),
        ("dense attention", dense_attention(q, k, v, device)),
    ):
        own, *others = calls
        case = Case(part, f"{shape}_dense", dtype, calls[own], finite, sizes=sizes | {"part": part})
        case.peers = [Peer(name, name) for name in others]
        group.calls |= {name: calls[name] for name in others}
        group.cases.append(case)
    return group


def layer_group(shape: str, model: Model, name: str, dtype, device: str) -> Group:
    """The dense layer, the accelerated one, and the parts of the latter's attention."""
    torch.manual_seed(0)  # of the weights
    layer, entry = SHAPES[shape][0](model, dtype, device), entry_of(TRANSFORMERS[shape])
    method, state = bench_hopper.make_method(name, model.q_clusters, model.k_clusters, model.sparsity)
    if name == "draft":
        state.tokens_permuted = entry.token_order is not None
        if state.tokens_permuted:
            layer.reorder(method.token_order(model.layout))
    processor = processor_for(entry, method, state, layer)
    q, k, v = captured(layer, processor)
    plan = method.plan(q, k, model.layout, state)
    moved = bench_hopper.permuted(plan, q, k, v)
    tokens = model.layout.num_tokens
    pairs = int(plan.kept_pairs(tokens, tokens).expand(q.shape[:2]).sum())

    group = Group(f"layer {shape} {name}", device, [])
    dense, attention = dense_layers(layer, device), dense_attention(q, k, v, device)
    group.calls = dense | attention
    sizes = {"layer": shape, "method": name, "heads": model.heads, "tokens": tokens}
    sizes["density"] = pairs / (q.shape[1] * tokens**2)

    def case(part: str, call: Callable, check: Callable, peers: dict = {}, **more) -> None:  # noqa: B006  only read
        made = Case(part, f"{shape}_{name}", dtype, call, check, sizes=sizes | {"part": part} | more)
        made.peers = [Peer(peer, peer) for peer in peers]
        group.cases.append(made)

    kwargs = bench_hopper.plan_kwargs(plan)

    def attend():
        return ops.block_sparse_attention(*moved, plan.kv_num_blocks, plan.kv_indices, **kwargs)

    check = bench_attention.make_check(*moved, plan.kv_num_blocks, plan.kv_indices, kwargs)
    case("layer", lambda: layer.run(processor), LayerCheck(layer, entry, name), dense)
    case("attention", attend, check, attention, kernel=bench_hopper.kernel_of(attend, device))
    bench_hopper.in_place(group.cases[-1], plan, q)
    group.cases[-1].flops, group.cases[-1].exps = 4.0 * q.shape[3] * pairs, float(pairs)
    case("plan", lambda: method.plan(q, k, model.layout, state), lambda got: got.validate(tokens, tokens))
    if plan.kv_index is not None:
        case("permute", bench_hopper.permutation(plan, k, v), bench_hopper.PermutationCheck(plan, k, v))
    return group


def dense_attention(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, Callable]:
    """Every dense attention on the same q, k and v."""
    calls = attention_peers.dense(q, k, v, device)
    return {f"attention: {name.removesuffix(' x density')}": call for name, call in calls.items()}


def processor_for(entry, method, state, layer: Layer):
    """The processor that ``accelerate`` would give this layer, told what the root hook would tell it."""
    processor = entry.processor(method, "the layer", "error")
    processor.dense, processor.layout, processor.state = False, layer.model.layout, state
    return processor


def captured(layer: Layer, processor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, S, D]`` as the layer's attention gets them; the call warms the method's state up."""
    seen: list[Tensor] = []
    attend = processor.attend

    def spy(query, key, value, mask):
        seen[:] = (t.transpose(1, 2) for t in (query.to(value.dtype), key.to(value.dtype), value))
        return attend(query, key, value, mask)

    processor.attend = spy
    try:
        layer.run(processor)
    finally:
        del processor.attend
    return tuple(seen)


def dense_layers(layer: Layer, device: str) -> dict[str, Callable]:
    """The layer as upstream has it, under every dense attention that torch or diffusers can give it."""

    def run(context=None, backend=None):
        if backend is None:
            if context is None:
                return layer.run(layer.upstream)
            with context():
                return layer.run(layer.upstream)
        if not hasattr(layer.upstream, "_attention_backend"):
            raise NotHere("this processor of diffusers has no attention backends")
        before = layer.upstream._attention_backend
        layer.upstream._attention_backend = backend
        try:
            return layer.run(layer.upstream)
        finally:
            layer.upstream._attention_backend = before

    calls = {"layer: SDPA": run}
    if device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for name, choice in (
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("FA2 in torch", SDPBackend.FLASH_ATTENTION),
        ):
            calls[f"layer: {name}"] = lambda c=choice: run(context=lambda: sdpa_kernel(c))
        calls["layer: FA3"] = lambda: run(backend=flash_3())
    return calls


def flash_3():
    """Diffusers' name of FlashAttention-3."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    attention_peers.needed(
        "flash_attn_interface", "flash_attn_func", "flash-attn-3 (hopper/ of flash-attention)"
    )
    return AttentionBackendName._FLASH_3


def finite(result: Tensor) -> None:
    assert bool(result.isfinite().all()), "the layer's output is not finite everywhere"


class LayerCheck:
    """The accelerated layer is finite, and with everything kept it is the dense layer."""

    def __init__(self, layer: Layer, entry, name: str) -> None:
        self.layer, self.entry, self.name = layer, entry, name

    def __call__(self, result: Tensor) -> None:
        finite(result)
        model = self.layer.model
        if self.name == "svg2":
            method = SVG2(
                top_p=1.0, num_q_clusters=model.q_clusters, num_k_clusters=model.k_clusters, iter_init=1
            )
        else:
            method = DraftAttention(sparsity=0.0)
        state = method.new_state(0, 1)
        if self.name == "draft":
            state.tokens_permuted = self.entry.token_order is not None
        everything = self.layer.run(processor_for(self.entry, method, state, self.layer))
        dense = self.layer.run(self.layer.upstream)
        # Two attention kernels round apart, and the feed-forward passes it on.
        assert_close(
            everything, dense, tolerance=2 * TOLERANCE[dense.dtype], what="the layer with everything kept"
        )


# ---------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------

HEAD = [
    "layer",
    "attention",
    "kernel",
    "density",
    "layer ms",
    "attention ms",
    "plan ms",
    "permute ms",
    "rest ms",
]
HEAD += ["dense layer / layer"]


def tables_of(rows: list[dict]) -> list[dict]:
    """Dense and accelerated layers side by side, the latter split into its parts."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "part" in row["sizes"]:
            key = row["sizes"]["layer"], row["sizes"]["method"]
            groups.setdefault(key, {})[row["sizes"]["part"]] = row
    lines, notes = [], []
    for (layer, method), parts in groups.items():
        whole = _best_dense(parts.get("layer") or parts["dense layer"])
        inner = _best_dense(parts.get("attention") or parts["dense attention"])
        rest = _ms(whole[0] - inner[0]) if whole and inner else "-"
        dense = [
            layer,
            f"dense, {whole[1]}" if whole else "dense, not timed",
            inner[1] if inner else "-",
            "1.000",
        ]
        lines.append([*dense, _ms(whole and whole[0]), _ms(inner and inner[0]), "-", "-", rest, "1.00"])
        if "layer" in parts:
            lines.append(_accelerated(layer, method, parts, whole and whole[0]))
        else:
            notes.append(f"{layer}: {parts['dense layer']['sizes']['note']}")
    if not lines:
        return []
    note = (
        "`rest` is the layer without attention, plan and permutation, which are timed apart on its own tensors."
    )
    return [{"title": "Whole layers", "note": note, "head": HEAD, "cells": lines, "last": "; ".join(notes)}]


def _accelerated(layer: str, method: str, parts: dict[str, dict], dense_us: float | None) -> list[str]:
    names = "layer", "attention", "plan", "permute"
    us = {
        part: parts[part].get("us") if part in parts else 0.0 for part in names
    }  # what is not there takes no time
    rest = us["layer"] - us["attention"] - us["plan"] - us["permute"] if None not in us.values() else None
    speedup = f"{dense_us / us['layer']:.2f}" if dense_us and us["layer"] else "-"
    cells = [layer, method, parts["attention"]["sizes"]["kernel"], f"{parts['layer']['sizes']['density']:.3f}"]
    return [*cells, *(_ms(us[part]) for part in names), _ms(rest), speedup]


def _best_dense(row: dict) -> tuple[float, str] | None:
    """Microseconds and name of the fastest dense call of a row: its own, where it is dense, or a peer's."""
    timed = [(peer["us"], name.split(": ")[-1]) for name, peer in row.get("peers", {}).items() if "us" in peer]
    if row["sizes"]["method"] == "dense" and row["status"] == "timed":
        timed.append((row["us"], "SDPA"))
    return min(timed, default=None)


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1e3:.3f}"
