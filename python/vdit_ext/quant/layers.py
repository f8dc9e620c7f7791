"""Which linears of a diffusers transformer are quantized, which stay in high precision, and what belongs
together.

Everything is data: a class is one entry of :data:`CLASSES`. Patch embedding, time and text embedders,
modulation, token refiners and the output head stay as they are (ViDiT-Q, section 4; section 6 of the authors'
configurations keeps the same).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

SELF, CROSS, TEMPORAL, FFN = KINDS = ("self", "cross", "temporal", "ffn")


@dataclass(frozen=True)
class LinearInfo:
    """One linear that is quantized.

    Attributes:
        name: of the module, as in ``model.named_modules()``, without what LoRA wrappers add to it.
        block: the transformer block it stands in, such as ``blocks.3``.
        kind: "self", "cross", "temporal" or "ffn": the group whose sensitivity is measured together (ViDiT-Q,
            section 4). Spatial and joint attention count as "self"; the text stream of joint attention as
            "cross".
        group: linears of one group read the same tensor, and share what is done to it.
        in_features, out_features: sizes.
    """

    name: str
    block: str
    kind: str
    group: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Rule:
    """Linears of a block: a pattern for their whole name within it, their kind, and the input they share.

    An empty ``shared`` is a group of its own for each linear.
    """

    pattern: str
    kind: str
    shared: str = ""


@dataclass(frozen=True)
class ClassLayers:
    """The linears of one class.

    Attributes:
        blocks: lists of blocks by name, in the order they run. With ``interleaved``, the first blocks of all
            lists run before the second ones.
        quantized: rules within a block.
        kept: patterns for whole names, with why these stay in high precision.
    """

    blocks: tuple[str, ...]
    quantized: tuple[Rule, ...]
    kept: tuple[tuple[str, str], ...]
    interleaved: bool = False


PATCH, TIME, TEXT = "patch embedding", "time embedder", "text or image embedder"
MODULATION, HEAD, REFINER = "modulation", "output head", "token refiner"
GATES, CONTROL = "gates, one a head", "joins the control stream to the video"
FUSED = "fused projections hold its weights"
UNLISTED, OUTSIDE = "not known to this version of vdit_ext", "not named by layers="


def _attention(name: str, kind: str, *, context: bool = False) -> tuple[Rule, ...]:
    """Rules of one attention module; with ``context``, keys and values read another tensor than queries."""
    inner = re.escape(name)
    if not context:
        inputs = (Rule(rf"{inner}\.to_(q|k|v|qkv)", kind, f"{name}.qkv"),)
    else:
        inputs = (
            Rule(rf"{inner}\.to_q", kind, f"{name}.q"),
            Rule(rf"{inner}\.to_(k|v|kv)", kind, f"{name}.kv"),
        )
    return (*inputs, Rule(rf"{inner}\.to_out\.0", kind))


def _joint(name: str) -> tuple[Rule, ...]:
    """Rules of one attention over video and text together, each with its own projections."""
    inner = re.escape(name)
    return (
        *_attention(name, SELF),
        Rule(rf"{inner}\.(add_(q|k|v)_proj|to_added_qkv)", CROSS, f"{name}.added"),
        Rule(rf"{inner}\.to_add_out", CROSS),
    )


def _feed_forward(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(rf"{re.escape(name)}\.net\.(0\.proj|2)", FFN) for name in names)


# One block computes attention and feed-forward side by side, from one input, and joins them in `proj_out`.
_SINGLE = (Rule(r"(attn\.to_(q|k|v|qkv)|proj_mlp)", SELF, "attn.qkv"), Rule(r"proj_out", FFN))

_WAN = ClassLayers(
    blocks=("blocks",),
    quantized=(
        *_attention("attn1", SELF),
        *_attention("attn2", CROSS, context=True),
        Rule(r"attn2\.(add_(k|v)_proj|to_added_kv)", CROSS, "attn2.added"),
        *_feed_forward("ffn"),
    ),
    kept=(
        (r"patch_embedding\..*", PATCH),
        (r"condition_embedder\.(time_embedder\..*)", TIME),
        (r"condition_embedder\.time_proj", MODULATION),
        (r"condition_embedder\.(text|image)_embedder\..*", TEXT),
        (r"fps_projection\..*", MODULATION),
        (r"vace_blocks\.\d+\.proj_(in|out)", CONTROL),
        (r"proj_out", HEAD),
    ),
)
_HUNYUAN_KEPT = (
    (r"context_embedder(_2)?\..*", REFINER),
    (r"image_embedder\..*", TEXT),
    (r"time_(text_)?embed\..*", TIME),
    (r".*_blocks\.\d+\.norm(1|1_context)?\.linear", MODULATION),
    (r"norm_out\.linear", MODULATION),
    (r"proj_out", HEAD),
)
_LTX_KEPT = (
    (r"(audio_)?proj_in", PATCH),
    (r"(audio_)?time_embed\.emb\..*", TIME),
    (r"(audio_)?time_embed\.linear", MODULATION),
    (r"av_cross_attn_.*|(audio_)?prompt_adaln\..*", MODULATION),
    (r"(audio_)?caption_projection\..*", TEXT),
    (r".*\.to_gate_logits", GATES),
    (r"(audio_)?proj_out", HEAD),
)
_ADALN_SINGLE_KEPT = (
    (r"pos_embed\..*", PATCH),
    (r"adaln_single\.emb\..*", TIME),
    (r"adaln_single\.linear", MODULATION),
    (r"caption_projection\..*", TEXT),
    (r"proj_out", HEAD),
)
_CROSS_BLOCK = (
    *_attention("attn1", SELF),
    *_attention("attn2", CROSS, context=True),
    *_feed_forward("ff"),
)

# Class name in diffusers to its linears; a new model is a new entry.
CLASSES: dict[str, ClassLayers] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": ClassLayers(("vace_blocks", "blocks"), _WAN.quantized, _WAN.kept),
    "SkyReelsV2Transformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": ClassLayers(
        ("transformer_blocks", "single_transformer_blocks"),
        (*_joint("attn"), *_feed_forward("ff", "ff_context"), *_SINGLE),
        _HUNYUAN_KEPT,
    ),
    "HunyuanVideo15Transformer3DModel": ClassLayers(
        ("transformer_blocks",), (*_joint("attn"), *_feed_forward("ff", "ff_context")), _HUNYUAN_KEPT
    ),
    "CogVideoXTransformer3DModel": ClassLayers(
        ("transformer_blocks",),
        (*_attention("attn1", SELF), *_feed_forward("ff")),
        (
            (r"patch_embed\..*", PATCH),
            (r"(time|ofs)_embedding\..*", TIME),
            (r"transformer_blocks\.\d+\.norm[12]\.linear", MODULATION),
            (r"norm_out\.linear", MODULATION),
            (r"proj_out", HEAD),
        ),
    ),
    "LTXVideoTransformer3DModel": ClassLayers(("transformer_blocks",), _CROSS_BLOCK, _LTX_KEPT),
    "LTX2VideoTransformer3DModel": ClassLayers(
        ("transformer_blocks",),
        (
            *_attention("attn1", SELF),
            *_attention("audio_attn1", SELF),
            *_attention("attn2", CROSS, context=True),
            *_attention("audio_attn2", CROSS, context=True),
            *_attention("audio_to_video_attn", CROSS, context=True),
            *_attention("video_to_audio_attn", CROSS, context=True),
            *_feed_forward("ff", "audio_ff"),
        ),
        _LTX_KEPT,
    ),
    "MochiTransformer3DModel": ClassLayers(
        ("transformer_blocks",),
        (*_joint("attn1"), *_feed_forward("ff", "ff_context")),
        (
            (r"patch_embed\..*", PATCH),
            (r"time_embed\.(pooler|caption_proj)(\..*)?", TEXT),
            (r"time_embed\..*", TIME),
            (r"transformer_blocks\.\d+\.norm1(_context)?\.linear(_1)?", MODULATION),
            (r"norm_out\.linear", MODULATION),
            (r"proj_out", HEAD),
        ),
    ),
    "PixArtTransformer2DModel": ClassLayers(("transformer_blocks",), _CROSS_BLOCK, _ADALN_SINGLE_KEPT),
    "DiTTransformer2DModel": ClassLayers(
        ("transformer_blocks",),
        (*_attention("attn1", SELF), *_feed_forward("ff")),
        (
            (r"pos_embed\..*", PATCH),
            (r"transformer_blocks\.\d+\.norm1\.emb\..*", TIME),
            (r"transformer_blocks\.\d+\.norm1\.linear", MODULATION),
            (r"proj_out_1", MODULATION),
            (r"proj_out_2", HEAD),
        ),
    ),
    "AllegroTransformer3DModel": ClassLayers(("transformer_blocks",), _CROSS_BLOCK, _ADALN_SINGLE_KEPT),
    # The temporal blocks have no attn2; their attn1 attends along time alone.
    "LatteTransformer3DModel": ClassLayers(
        ("transformer_blocks", "temporal_transformer_blocks"),
        _CROSS_BLOCK,
        _ADALN_SINGLE_KEPT,
        interleaved=True,
    ),
    # Its feed-forward is made of convolutions.
    "SanaVideoTransformer3DModel": ClassLayers(
        ("transformer_blocks",),
        (*_attention("attn1", SELF), *_attention("attn2", CROSS, context=True)),
        (
            (r"patch_embedding\..*", PATCH),
            (r"time_embed\.linear", MODULATION),
            (r"time_embed\..*", TIME),
            (r"caption_projection\..*", TEXT),
            (r"proj_out", HEAD),
        ),
    ),
    "Kandinsky5Transformer3DModel": ClassLayers(
        ("visual_transformer_blocks",),
        (
            Rule(r"self_attention\.to_(query|key|value)", SELF, "self_attention.qkv"),
            Rule(r"self_attention\.out_layer", SELF),
            Rule(r"cross_attention\.to_query", CROSS, "cross_attention.q"),
            Rule(r"cross_attention\.to_(key|value)", CROSS, "cross_attention.kv"),
            Rule(r"cross_attention\.out_layer", CROSS),
            Rule(r"feed_forward\.(in|out)_layer", FFN),
        ),
        (
            (r"visual_embeddings\..*", PATCH),
            (r"time_embeddings\..*", TIME),
            (r"(pooled_)?text_embeddings\..*", TEXT),
            (r".*_modulation\.out_layer|out_layer\.modulation\.out_layer", MODULATION),
            (r"text_transformer_blocks\..*", REFINER),
            (r"out_layer\.out_layer", HEAD),
        ),
    ),
    "FluxTransformer2DModel": ClassLayers(
        ("transformer_blocks", "single_transformer_blocks"),
        (*_joint("attn"), *_feed_forward("ff", "ff_context"), *_SINGLE),
        (
            (r"x_embedder", PATCH),
            (r"context_embedder", TEXT),
            (r"time_text_embed\..*", TIME),
            (r".*_blocks\.\d+\.norm(1|1_context)?\.linear", MODULATION),
            (r"norm_out\.linear", MODULATION),
            (r"proj_out", HEAD),
        ),
    ),
}


@dataclass
class LayerList:
    """The linears of a model; it iterates over those that are quantized, and prints as a table.

    Attributes:
        quantized: in the order the blocks run.
        kept: names of the others, with why they stay in high precision.
    """

    quantized: list[LinearInfo] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __iter__(self):
        return iter(self.quantized)

    def __len__(self) -> int:
        return len(self.quantized)

    def groups(self) -> dict[str, list[LinearInfo]]:
        """Linears that read one tensor, by group, in order."""
        found: dict[str, list[LinearInfo]] = {}
        for info in self.quantized:
            found.setdefault(info.group, []).append(info)
        return found

    def blocks(self) -> dict[str, list[LinearInfo]]:
        """Linears by block, in the order the blocks run."""
        found: dict[str, list[LinearInfo]] = {}
        for info in self.quantized:
            found.setdefault(info.block, []).append(info)
        return found

    def __str__(self) -> str:
        """Two parts; a name with a number range stands for the blocks that are alike."""
        rows = [(info.name, info.kind, f"{info.out_features} x {info.in_features}") for info in self.quantized]
        rows += [(name, "kept", reason) for name, reason in self.kept.items()]
        if not rows:
            return "no linears"
        lines = [("linear", "kind", "weight, or why it stays"), *merge_blocks(rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in table)


def merge_blocks(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that begin with a name: those that differ in the first number of it only become one row."""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for name, *cells in rows:
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        if found is not None:
            name = f"{found.group(1)}*{found.group(3)}"
        numbers.setdefault((name, *cells), []).append(int(found.group(2)) if found else 0)
    merged = []
    for (name, *cells), found in numbers.items():
        first, last = min(found), max(found)
        whole = sorted(found) == list(range(first, last + 1))
        shown = f"{first}" if first == last else f"{first}-{last}" if whole else ",".join(map(str, found))
        merged.append((name.replace("*", shown, 1), *cells))
    return merged


def linear_layers(model: nn.Module, layers: str | Iterable[str] | None = None) -> LayerList:
    """The linears of a diffusers transformer: those to quantize, in the order of blocks, and those to keep.

    Args:
        model: of a class in :data:`CLASSES` or derived from one; of any class when ``layers`` is given.
        layers: regular expressions that match whole names of linears; these, and no others, are quantized. Kind
            and group are those of the class where it knows the linear, else "self" and a group of its own.

    Returns:
        A :class:`LayerList`, in which every ``nn.Linear`` of the model is found once.

    Raises:
        TypeError: unknown class and no ``layers``.
        ValueError: ``layers`` that match no linear, or that are no regular expressions.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps it
    known = class_layers(model)
    if known is None and layers is None:
        raise TypeError(
            f"vdit_ext.quant: the model's class must be one of {', '.join(CLASSES)}, got "
            f'{type(model).__name__}; name its linears with layers=, such as layers=r"blocks\\..*"'
        )
    chosen = None if layers is None else _compiled(layers)
    result = LayerList()
    found = []
    for name, module in plain_linears(model).items():
        info = _info(model, known, name, module)
        if isinstance(info, str):
            if chosen is None or not _any(chosen, name):
                result.kept[name] = info if chosen is None or info != UNLISTED else OUTSIDE
                continue
            info = _unlisted(name, module)
        elif chosen is not None and not _any(chosen, name):
            result.kept[name] = OUTSIDE
            continue
        found.append(info)
    if chosen is not None and not found:
        raise ValueError(
            f"vdit_ext.quant: layers= must match linears of {type(model).__name__}, got "
            f"{', '.join(p.pattern for p in chosen)}, which match none; names look like "
            f"{_example(result.kept)}"
        )
    order = _block_order(model, known) if known is not None else {}
    result.quantized = sorted(found, key=lambda info: order.get(info.block, len(order)))
    return result


def class_layers(model: nn.Module) -> ClassLayers | None:
    """The entry of :data:`CLASSES` for a model's class or the nearest class it derives from, or None."""
    return next((CLASSES[c.__name__] for c in type(model).__mro__ if c.__name__ in CLASSES), None)


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linears with a weight of their own, by name.

    Those inside a LoRA wrapper go by the wrapper's name; its low-rank factors, and linears that are quantized
    already, are left out.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module._parameters.get("weight") is None:
            continue
        if re.search(r"(^|\.)lora_[A-Za-z_]+\.", name):
            continue
        found[re.sub(r"\.base_layer$", "", name)] = module
    return found


def _info(model: nn.Module, known: ClassLayers | None, name: str, module: nn.Linear) -> LinearInfo | str:
    """What the class says of a linear: its place, or why it stays in high precision."""
    if known is None:
        return UNLISTED
    for pattern, reason in known.kept:
        if re.fullmatch(pattern, name):
            return reason
    holder, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    if holder not in known.blocks or not number.isdigit():
        return UNLISTED
    for rule in known.quantized:
        if re.fullmatch(rule.pattern, inner):
            if _is_fused(model, name):
                return FUSED
            block = f"{holder}.{number}"
            kind = TEMPORAL if rule.kind == SELF and holder.startswith("temporal") else rule.kind
            group = f"{block}.{rule.shared or inner}"
            return LinearInfo(name, block, kind, group, module.in_features, module.out_features)
    return UNLISTED


_FUSED_INTO = {
    "to_q": ("to_qkv",),
    "to_k": ("to_qkv", "to_kv"),
    "to_v": ("to_qkv", "to_kv"),
    "add_q_proj": ("to_added_qkv",),
    "add_k_proj": ("to_added_qkv", "to_added_kv"),
    "add_v_proj": ("to_added_qkv", "to_added_kv"),
}


def _is_fused(model: nn.Module, name: str) -> bool:
    """Whether ``fuse_qkv_projections`` has put another linear in this one's place."""
    parent, _, last = name.rpartition(".")
    attention = model.get_submodule(parent)
    fused = (getattr(attention, into, None) is not None for into in _FUSED_INTO.get(last, ()))
    return bool(getattr(attention, "fused_projections", False)) and any(fused)


def _unlisted(name: str, module: nn.Linear) -> LinearInfo:
    number = re.match(r"(.*?\.\d+)\.", name)
    block = number.group(1) if number else name
    return LinearInfo(name, block, SELF, name, module.in_features, module.out_features)


def _example(kept: dict[str, str]) -> str:
    """A name for a message, of a linear that could have been chosen if there is one."""
    return next(
        itertools.chain((n for n, why in kept.items() if why == OUTSIDE), kept), "nothing, it has no linears"
    )


def _block_order(model: nn.Module, known: ClassLayers) -> dict[str, int]:
    columns = [
        [f"{holder}.{i}" for i in range(len(getattr(model, holder, None) or ()))] for holder in known.blocks
    ]
    if known.interleaved:
        rows = itertools.zip_longest(*columns)
        names = [name for row in rows for name in row if name is not None]
    else:
        names = list(itertools.chain(*columns))
    return {name: place for place, name in enumerate(names)}


def _compiled(layers: str | Iterable[str]) -> list[re.Pattern]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(
            f"vdit_ext.quant: layers= must hold regular expressions, got {error.pattern!r}: {error.msg}"
        ) from None


def _any(patterns: list[re.Pattern], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)
