"""VQ4DiT: weights as indices into a codebook of each layer, calibrated against the model's own blocks.

arXiv 2408.17131 (AAAI 2025). k-means finds a codebook; every word of a weight then keeps its n nearest
codewords as candidates with learnable ratios, and ratios, codebooks and biases are trained so that each
transformer block returns what it returned at full precision, on inputs from the model's own sampling: no data
set. Ratios are driven to 0 or 1; what remains are plain codes.

What departs from the released code: blocks are calibrated one by one, each on the full-precision model's
input to it (``mode="end_to_end"`` for the other way); codebooks learn from the beginning
(``codebooks="two_phase"``); the weight of the ratio loss rises with time instead of being switched
(``schedule="gate"``); distortion is counted in units of plain k-means', and learning rates in those of the
codebook, without which they would mean something else in every block (``units="absolute"``); rates fall to
zero under hard assignments; and a block that k-means alone fits better on held-out calls stays so.
:data:`RELEASED` has the settings of the released code.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from .. import ops
from ..ops.vq import CODEWORDS
from . import accounting, vq_checkpoint
from . import layers as layer_lists
from .apply import QuantizedModel, get_linear
from .block_calls import Call, floating, record_calls, spare_memory
from .calibration import Progress
from .kmeans_vq import VQFormat, clamp_codewords, kmeans_vq, row_scales, split_words, vq_format
from .layers import LinearInfo
from .linear import QuantLayer
from .soft_vq import SoftWeight
from .transform import InputTransform
from .vq_training import PARTS, RELEASED, Settings, Student, calibrate, parameter_name
from .weights import DenseWeight, Int8Weight, VQWeight

__all__ = ["BITS", "RELEASED", "SERVING", "Settings", "linears_of", "quantize", "quantize_kmeans", "serve"]

BITS = ("w2", "w3")  # the default first


def quantize(
    model: nn.Module,
    calibration: Any,
    *,
    bits: str = "w2",
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | Mapping[str, LinearInfo] | None = None,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> QuantizedModel:
    """Vector-quantize a model's linears and calibrate the assignments; the model is left as it is.

    Args:
        model: a diffusers transformer, or any model when ``layers`` is given.
        calibration: what :func:`vdit_ext.quant.calibrate` returned, of which the ``runs`` are used; or a
            function that samples with the model, or several.
        bits: "w2", 256 words of 4 weights, or "w3", 64 words of 2.
        seed: decides k-means' seeding, which calls are kept and in which order they are used.
        progress: called with parts done, parts in all, and the name of a layer or block.
        layers: the linears to quantize; those of :func:`linears_of` when None.
        checkpoint: folder that takes up every block as it is finished, and from which a later call with the
            same model, seed and settings goes on; None keeps nothing.
        settings: of :class:`Settings`.

    Returns:
        A :class:`QuantizedModel` of :class:`VQWeight` layers. Its report has, for each block, the mean squared
        error of its output on held-out calls with plain k-means and after calibration, and exact sizes.

    Raises:
        ValueError: unknown bits or settings, input features that the word length does not divide, a run that
            does not call a block, or a checkpoint of another model or of other settings; one sentence.
    """
    runs = _runs(calibration)
    job = _Job.of(model, bits, seed, layers, settings, progress)
    store = None if checkpoint is None else vq_checkpoint.Store(Path(checkpoint))
    found = _by_block(job, runs, store) if job.settings.mode == "block" else _end_to_end(job, runs, store)
    return job.result("vq4dit", found)


def _runs(calibration: Any) -> tuple[Callable[[], Any], ...]:
    runs = getattr(calibration, "runs", calibration)
    runs = (runs,) if callable(runs) else tuple(runs) if isinstance(runs, Iterable) else ()
    if not runs or not all(map(callable, runs)):
        came = type(calibration).__name__
        raise ValueError(
            "vdit_ext.quant: calibration must hold functions that sample with the model, got "
            f"{came} without any"
        )
    return runs


def quantize_kmeans(
    model: nn.Module,
    calibration: Any = None,
    *,
    bits: str = "w2",
    seed: int = 0,
    progress: Progress | None = None,
    layers: Iterable[LinearInfo] | Mapping[str, LinearInfo] | None = None,
    **settings: Any,
) -> QuantizedModel:
    """Plain k-means of every weight, the baseline that needs no calibration. Arguments as :func:`quantize`."""
    job = _Job.of(model, bits, seed, layers, settings, progress, calibrated=False)
    found = {}
    for block in job.blocks:
        coded = {name: job.coded(name, soft) for name, soft in job.soft(block).items()}
        found[block] = vq_checkpoint.Block(coded)
    return job.result("kmeans_vq", found)


@dataclass
class _Job:
    """What is to be done, and what every part of it needs."""

    model: nn.Module
    bits: str
    seed: int
    settings: Settings
    infos: list[LinearInfo]
    progress: Progress | None
    calibrated: bool = True
    done: int = 0

    @classmethod
    def of(cls, model, bits, seed, layers, settings, progress, calibrated=True) -> _Job:
        vq_format(bits)
        known = {field.name for field in dataclasses.fields(Settings)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f"vdit_ext.quant: settings of vq4dit must be among {', '.join(sorted(known))}, got {unknown[0]}"
            )
        model = getattr(model, "_orig_mod", model)
        chosen = Settings(**settings)
        job = cls(model, bits, seed, chosen, linears_of(model, layers, chosen.modulation), progress, calibrated)
        for info in job.infos:  # refuses before anything runs
            weight = job.linear(info.name).weight
            split_words(weight[:1], job.form.dim)
            if not bool(weight.isfinite().all()):
                raise ValueError(f"vdit_ext.quant: {info.name} must be finite, it has a NaN or an infinity")
        return job

    @property
    def form(self) -> VQFormat:
        return vq_format(self.bits)

    @property
    def blocks(self) -> dict[str, list[LinearInfo]]:
        found: dict[str, list[LinearInfo]] = {}
        for info in self.infos:
            found.setdefault(info.block, []).append(info)
        return found

    def linear(self, name: str) -> nn.Linear:
        return get_linear(self.model, name)

    def tell(self, what: str) -> None:
        """One part is done."""
        self.done += 1
        if self.progress is not None:
            rounds = 1 if self.settings.mode == "end_to_end" else len(self.blocks)
            total = len(self.infos) + PARTS * rounds * self.calibrated
            self.progress(min(self.done, total), total, what)

    def skip(self, block: str) -> None:
        """All parts of a block were done before."""
        self.done += len(self.blocks.get(block, self.infos)) + PARTS - 1
        self.tell(block or "model")

    def soft(self, block: str) -> dict[str, SoftWeight]:
        """k-means of a block's weights, by layer; layers that share a codebook hold the same tensor."""
        s, groups = self.settings, {}
        for info in self.blocks[block]:
            shared = s.share_qkv and info.group.endswith("qkv")
            groups.setdefault(info.group if shared else info.name, []).append(info.name)
        found = {}
        for group, names in groups.items():
            weights = [self.linear(name).weight.detach().to(torch.float32) for name in names]
            scales = [row_scales(weight) if s.row_scale else None for weight in weights]
            words = [
                split_words(weight if scale is None else weight / scale[:, None], self.form.dim)
                for weight, scale in zip(weights, scales, strict=True)
            ]
            every = torch.cat(words)
            count = clamp_codewords(self.form.codewords, len(every))
            seed = self.seed_of(group)
            codebook = kmeans_vq(every, count, iterations=s.iterations, seed=seed).codebook.requires_grad_(True)
            for name, weight, word, scale in zip(names, weights, words, scales, strict=True):
                shape = tuple(weight.shape)
                found[name] = SoftWeight(word, shape, codebook, s.candidates, s.ratio_init, scale)
                self.tell(name)
        return found

    def seed_of(self, name: str) -> int:
        """A seed of its own for each part, so that a resumed run draws as an uninterrupted one."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def coded(self, name: str, soft: SoftWeight, bias: Tensor | None = None) -> vq_checkpoint.Coded:
        """A weight's codes as they stand."""
        own = self.linear(name).bias
        bias = own if bias is None else bias
        return vq_checkpoint.Coded(
            soft.chosen().reshape(soft.shape[0], -1).to("cpu", torch.uint8),
            soft.codebook.detach().cpu().clone(),
            None if bias is None else bias.detach().to(torch.float32).cpu().clone(),
            None if soft.row_scale is None else soft.row_scale.cpu(),
        )

    def key(self, block: str) -> str:
        """Says whether a checkpoint is of this block, these weights and these settings."""
        names = [info.name for info in self.blocks.get(block, self.infos)]
        asked = {"bits": self.bits, "seed": self.seed, "settings": dataclasses.asdict(self.settings)}
        return vq_checkpoint.key_of(asked, {name: self.linear(name) for name in names})

    def result(self, method: str, found: dict[str, vq_checkpoint.Block]) -> QuantizedModel:
        coded = {name: layer for block in found.values() for name, layer in block.layers.items()}
        layers = {info.name: _quant_layer(coded[info.name], self.form, self.settings) for info in self.infos}
        report = {
            "bits": self.bits,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.settings),
            "size": self.size_report(),
            "blocks": {name: block.report for name, block in found.items() if block.report},
        }
        return QuantizedModel(method, layers, report=report)

    def size_report(self) -> dict[str, Any]:
        """Exact bytes, by the paper's formula, with and without the modulation linears."""
        plain = [info for info in self.infos if info.kind != layer_lists.MODULATION]
        parts = {
            "quantized": self.infos,
            "with_modulation": linears_of(self.model, plain, True),
            "without_modulation": plain,
        }
        s = self.settings
        bits = {"float16": 16, "float32": 32, "int8": 8}[s.codebook_dtype]
        found = {}
        for name, infos in parts.items():
            sizes = [self._linear_size(info) for info in infos]
            size = accounting.vq_size(sizes, self.form, codebook_bits=bits, row_scale_bits=16 * s.row_scale)
            found[name] = {"bytes": size.total, "full_bytes": size.full, "ratio": size.ratio}
        return found

    def _linear_size(self, info: LinearInfo) -> accounting.LinearSize:
        shared = self.settings.share_qkv and info.group.endswith("qkv")
        has_bias = self.linear(info.name).bias is not None
        return accounting.LinearSize(
            info.out_features, info.in_features, has_bias, info.group if shared else None
        )


def _is_known(model: nn.Module) -> bool:
    return layer_lists.class_layers(model) is not None


def linears_of(
    model: nn.Module,
    layers: Iterable[LinearInfo] | Mapping[str, LinearInfo] | None = None,
    modulation: bool | None = None,
) -> list[LinearInfo]:
    """The linears that :func:`quantize` takes, block by block.

    ``modulation`` adds the modulation linears of these blocks; None does so for DiTTransformer2DModel, unless
    ``layers`` leaves some of the blocks' other linears out.
    """
    given = list(layers.values() if isinstance(layers, Mapping) else layers or ())
    if layers is not None and not _is_known(model):
        return given
    known = layer_lists.linear_layers(model)
    given = list(known) if layers is None else given
    blocks: dict[str, list[LinearInfo]] = {}
    for info in given:
        blocks.setdefault(info.block, []).append(info)
    linears, named = layer_lists.plain_linears(model), {info.name for info in given}
    if modulation is None:
        whole = all(info.name in named for info in known if info.block in blocks)
        modulation = whole and any(c.__name__ == "DiTTransformer2DModel" for c in type(model).__mro__)
    for name, reason in known.kept.items() if modulation else ():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if reason == layer_lists.MODULATION and block is not None and name not in named:
            size = (linears[name].in_features, linears[name].out_features)
            blocks[block].append(LinearInfo(name, block, layer_lists.MODULATION, name, *size))
    return [info for infos in blocks.values() for info in infos]


# ---------------------------------------------------------------------------------------------------------
# Block by block, or end to end
# ---------------------------------------------------------------------------------------------------------


def _by_block(job: _Job, runs: tuple[Callable[[], Any], ...], store: vq_checkpoint.Store | None):
    found: dict[str, vq_checkpoint.Block] = {}
    for block in job.blocks:
        if store is not None and (before := store.load(block, job.key(block))) is not None:
            found[block] = before
            job.skip(block)
    left = [block for block in job.blocks if block not in found]
    wanted = {"calls": job.settings.calls, "seed": job.seed_of("calls")}
    while left:
        some = left[: job.settings.blocks_at_once or len(left)]
        recorded = record_calls(job.model, some, runs, memory=spare_memory(), **wanted)
        for block in [block for block in some if block in recorded]:
            found[block] = _one_block(job, block, recorded.pop(block))
            if store is not None:
                store.save(block, job.key(block), found[block])
        left = [block for block in left if block not in found]
    return {block: found[block] for block in job.blocks}


def _one_block(job: _Job, block: str, calls: list[Call]) -> vq_checkpoint.Block:
    module = job.model.get_submodule(block)
    student, by_layer = _student(job, job.soft(block), module, functools.partial(_call_module, module))
    report = calibrate(student, calls, job.settings, job.seed_of(f"order {block}"), lambda: job.tell(block))
    return vq_checkpoint.Block(_coded(job, student, by_layer), report)


def _end_to_end(job: _Job, runs: tuple[Callable[[], Any], ...], store: vq_checkpoint.Store | None):
    key = job.key("") if store is not None else ""
    if store is not None and (before := store.load("", key)) is not None:
        job.skip("")
        return {"model": before}
    blocks = list(job.blocks)
    recorded = record_calls(job.model, [""], runs, calls=job.settings.calls, seed=job.seed_of("calls"))
    outputs = functools.partial(_call_model, job.model, blocks)
    with torch.no_grad():
        calls = [Call(call.args, call.kwargs, outputs({}, call)) for call in recorded[""]]
    soft = {name: weight for block in blocks for name, weight in job.soft(block).items()}
    student, by_layer = _student(job, soft, job.model, outputs)
    report = calibrate(student, calls, job.settings, job.seed_of("order"), lambda: job.tell("model"))
    found = vq_checkpoint.Block(_coded(job, student, by_layer), report)
    if store is not None:
        store.save("", key, found)
    return {"model": found}


def _student(job: _Job, soft: dict[str, SoftWeight], module: nn.Module, outputs):
    """A student, and for each layer the name of its linear inside of the module."""
    inside = {linear: name for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
    places = {name: inside[job.linear(name)] for name in soft}
    biases = {}
    for name, place in places.items():
        linear = job.linear(name)
        if linear.bias is not None:
            copy = linear.bias.detach().to(torch.float32, copy=True)
            biases[parameter_name(place, "bias")] = copy.requires_grad_(True)
    by_parameter = {parameter_name(places[name], "weight"): weight for name, weight in soft.items()}
    dtype = next(job.linear(name).weight.dtype for name in soft)
    return Student(outputs, by_parameter, biases, dtype), places


def _coded(job: _Job, student: Student, places: dict[str, str]) -> dict[str, vq_checkpoint.Coded]:
    found = {}
    for name, place in places.items():
        bias = student.biases.get(parameter_name(place, "bias"))
        found[name] = job.coded(name, student.soft[parameter_name(place, "weight")], bias)
    return found


def _call_module(module: nn.Module, overrides: dict[str, Tensor], call: Call) -> tuple[Tensor, ...]:
    args, kwargs = _on_device((call.args, call.kwargs), module)
    return floating(functional_call(module, overrides, args, kwargs))


def _call_model(
    model: nn.Module, blocks: list[str], overrides: dict[str, Tensor], call: Call
) -> tuple[Tensor, ...]:
    """The outputs of all blocks in one pass through the model."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(block).register_forward_hook(lambda _m, _a, output: seen.extend(floating(output)))
        for block in blocks
    ]
    try:
        _call_module(model, overrides, call)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen)


def _on_device(tree: Any, module: nn.Module) -> Any:
    device = next(module.parameters()).device
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


# ---------------------------------------------------------------------------------------------------------
# Layers and how they are served
# ---------------------------------------------------------------------------------------------------------


def _quant_layer(coded: vq_checkpoint.Coded, form: VQFormat, settings: Settings) -> QuantLayer:
    rows, columns = coded.indices.shape
    codebook = torch.zeros(CODEWORDS[form.dim], form.dim)  # no index names what is left zero
    codebook[: len(coded.codebook)] = coded.codebook
    weight = VQWeight(
        ops.pack_vq(coded.indices, form.dim),
        codebook if settings.codebook_dtype != "float16" else codebook.to(torch.float16),
        form.bits,
        rows,
        columns * form.dim,
        row_scale=coded.row_scale,
    )
    if settings.codebook_dtype == "int8":
        return QuantLayer(weight.to_int8(), coded.bias, InputTransform(bits=8))
    return QuantLayer(weight, coded.bias, InputTransform(bits=0))


SERVING = ("fused", "scratch", "auto", "resident")


def serve(
    quantized: QuantizedModel, mode: str = "scratch", dtype: torch.dtype = torch.bfloat16
) -> QuantizedModel:
    """The same layers, to be multiplied in one of these ways.

    "fused": codewords are looked up inside of the product; "scratch": the weight is decoded before each product
    and dropped; "auto": whichever of the two suits the rows of a call; "resident": decoded once, here, which
    saves nothing but disk space: into ``dtype``, or into int8 where the codebook is int8.

    Raises ValueError for another mode.
    """
    if mode not in SERVING:
        raise ValueError(f"vdit_ext.quant: mode must be one of {', '.join(SERVING)}, got {mode!r}")
    served = {
        name: dataclasses.replace(layer, weight=_served(layer.weight, mode, dtype))
        if isinstance(layer.weight, VQWeight)
        else layer
        for name, layer in quantized.layers.items()
    }
    return dataclasses.replace(quantized, layers=served)


def _served(weight: VQWeight, mode: str, dtype: torch.dtype):
    if mode != "resident":
        return dataclasses.replace(weight, path={"scratch": "expand"}.get(mode, mode))
    size = (weight.out_features, weight.in_features)
    if weight.takes_codes:
        return Int8Weight(ops.vq_dequantize(weight.codes, weight.codebook, *size), weight.row_scale)
    return DenseWeight(weight.dequantize().to(dtype))
