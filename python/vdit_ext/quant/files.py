"""Quantized layers on disk: one safetensors file and one JSON that says what is in it; never pickle.

    FOLDER/vdit_quant.json          format, version, method, settings of each layer, bit map, report
    FOLDER/vdit_quant.safetensors   tensors named ``<layer>.<tensor>``, as in the model's state dict, but for
                                    codes of three bits, which are packed as such

Where the rest of the transformer goes into the same folder (:func:`save` with ``rest`` and ``config``), the
tensors are in ``diffusion_pytorch_model.safetensors`` beside a ``config.json``, and diffusers'
``from_pretrained`` loads it. Files appear under their names when they are complete, the JSON last; an identity
that both carry tells a pair of two different runs apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .apply import QuantizedModel, check_intervals
from .linear import QuantLayer
from .twin_log import compact_tensors, expanded_tensors

SETTINGS, LAYERS, WHOLE, CONFIG = (
    "vdit_quant.json",
    "vdit_quant.safetensors",
    "diffusion_pytorch_model.safetensors",
    "config.json",
)
FORMAT, VERSION = "vdit_ext quantized layers", 1

# What a settings file must hold, and the types of it.
_SCHEMA = {
    "format": str,
    "version": int,
    "id": str,
    "method": str,
    "tensors": str,
    "layers": dict,
    "intervals": list,
    "report": dict,
    "info": dict,
}


def save(
    folder: str | Path,
    quantized: QuantizedModel,
    *,
    info: Mapping[str, Any] | None = None,
    rest: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write quantized layers into a folder, which is made if it is not there; its other files stay.

    Args:
        folder: where to; files of an earlier run are replaced or, where the new one has none such, removed.
        quantized: what a method returned.
        info: what else is worth keeping, as JSON can hold it: the model's class, settings of the run.
        rest: the transformer's other tensors by name, which makes the folder one for ``from_pretrained``.
        config: content of ``config.json`` beside them.

    Returns:
        The folder.

    Raises:
        ValueError: a report or info that JSON cannot hold, names of ``rest`` that are the layers' own, or a
            folder that holds another model where ``rest`` is given.
        OSError: the folder cannot be written. Nothing half-written is left in either case.
    """
    folder = Path(folder)
    identity = secrets.token_hex(8)
    tensors = {}
    for name, layer in quantized.layers.items():
        own = layer.tensors() if rest is not None else compact_tensors(layer.config(), layer.tensors())
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    if rest is not None:
        check_target(folder)
        if both := sorted(tensors.keys() & rest.keys()):
            raise ValueError(f"vdit_ext.quant: rest must not hold tensors of quantized layers, got {both[0]}")
        tensors |= rest
    name = LAYERS if rest is None else WHOLE
    settings = describe(quantized) | {"id": identity, "tensors": name, "info": dict(info or {})}
    texts = {SETTINGS: _dumped(settings, "report and info")}
    if config is not None:
        texts[CONFIG] = _dumped(dict(config), "config")
    left_over = _left_over(folder, [name, *texts])
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder, [name, *texts]) as paths:
        save_file(unshared(tensors), paths[name], metadata={"format": "pt", "vdit_quant": identity})
        for file, text in texts.items():
            paths[file].write_text(text)
        shutil.copymode(paths[SETTINGS], paths[name])  # safetensors makes files that their owner alone may read
    for path in left_over:
        path.unlink(missing_ok=True)
    return folder


def check_target(folder: str | Path) -> None:
    """Raise ValueError, one sentence, where a whole transformer would replace one that is not of :func:`save`,
    such as the very model that is quantized."""
    folder = Path(folder)
    if is_saved(folder):
        return
    for name in (CONFIG, WHOLE):
        if (folder / name).exists():
            raise ValueError(
                f"vdit_ext.quant: {folder} must not hold a model that is not quantized, it has {name}; name "
                "another folder"
            )


def _left_over(folder: Path, names: list[str]) -> list[Path]:
    """Files of an earlier run that the new one does not replace: those of whole transformers, or of layers."""
    if not is_saved(folder):
        return []
    try:
        earlier = read_settings(folder)["tensors"]
    except (ValueError, OSError):
        return []  # which files were its own is not known
    own = [WHOLE, CONFIG] if earlier == WHOLE else [LAYERS]
    return [folder / name for name in own if name not in names]


def describe(quantized: QuantizedModel) -> dict[str, Any]:
    """All of a quantized model but its tensors, as JSON can hold it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": quantized.method,
        "layers": {name: layer.config() for name, layer in quantized.layers.items()},
        "intervals": [dict(bits) for bits in quantized.intervals],
        "report": dict(quantized.report),
    }


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> QuantizedModel:
    """Read the layers that :func:`save` wrote; whatever else the tensor file holds is left alone.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: one sentence, for a file that is no JSON or of another format or version, for a tensor file
            that is truncated, of another run, or whose names, shapes or dtypes are not those of the settings.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    path = folder / settings["tensors"]
    if not path.is_file():
        raise FileNotFoundError(f"vdit_ext.quant: {path} is expected beside {SETTINGS}, there is none")
    with _opened(path, device) as file:
        identity = (file.metadata() or {}).get("vdit_quant")
        if identity != settings["id"]:
            raise ValueError(
                f"vdit_ext.quant: {path} must be of the same run as {SETTINGS} ({settings['id']}), got "
                f"{identity or 'a file without identity'}; quantize again"
            )
        own = _names_by_layer(file.keys(), settings["layers"])
        layers = {
            name: layer_from(
                config, {key: aligned(file.get_tensor(f"{name}.{key}")) for key in own[name]}, path, name
            )
            for name, config in settings["layers"].items()
        }
    quantized = QuantizedModel(
        settings["method"], layers, tuple(dict(bits) for bits in settings["intervals"]), settings["report"]
    )
    check_intervals(quantized)
    return quantized


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none of which shares memory with another, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        found[key] = stored.clone() if place in seen and stored.numel() > 0 else stored
        seen.add(place)
    return found


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it begins at an odd address, as in a mapped file; kernels read 16 bytes at
    once."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def layer_from(config: Any, tensors: Mapping[str, Tensor], path: Path, name: str) -> QuantLayer:
    """The layer of a file; a ValueError, one sentence, where its settings or tensors are not what they must
    be."""
    try:
        return QuantLayer.from_tensors(config, expanded_tensors(config, tensors), name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"vdit_ext.quant: the settings of {name} in {path.parent} must be those of a quantized layer, "
            f"they are not ({type(error).__name__}: {error}); quantize again"
        ) from error
    except ValueError as error:
        raise ValueError(f"vdit_ext.quant: {path}: {error}") from error


def is_saved(folder: str | Path) -> bool:
    """Whether a folder holds quantized layers."""
    return (Path(folder) / SETTINGS).is_file()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The checked content of ``vdit_quant.json``; raises as :func:`load` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"vdit_ext.quant: {folder} is expected to be a folder, there is none")
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"vdit_ext.quant: {folder} must hold {SETTINGS}, it does not; make it with `vdit quantize`"
        )
    try:
        settings = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"vdit_ext.quant: {path} must be JSON, it is not: {error}") from None
    check_settings(settings, path)
    return settings


def check_settings(settings: Any, path: Path) -> None:
    """Raise ValueError, one sentence, unless this is the content of a settings file of this version."""
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ValueError(f'vdit_ext.quant: {path} must say "format": "{FORMAT}", it does not')
    if settings.get("version") != VERSION:
        raise ValueError(
            f"vdit_ext.quant: {path} must be of format version {VERSION}, got {settings.get('version')}; "
            "another version of vdit_ext wrote it"
        )
    for key, kind in _SCHEMA.items():
        if not isinstance(settings.get(key), kind):
            came = type(settings[key]).__name__ if key in settings else "nothing"
            raise ValueError(f"vdit_ext.quant: {path}: {key} must be {kind.__name__}, got {came}")
    for place, config in settings["layers"].items():
        if not isinstance(config, dict):
            raise ValueError(
                f"vdit_ext.quant: {path}: layers.{place} must be dict, got {type(config).__name__}"
            )
    for bits in settings["intervals"]:
        if not isinstance(bits, dict) or not all(type(value) is int for value in bits.values()):
            raise ValueError(f"vdit_ext.quant: {path}: intervals must hold whole numbers by layer name")
    if settings["tensors"] not in (LAYERS, WHOLE):
        raise ValueError(
            f"vdit_ext.quant: {path}: tensors must be {LAYERS} or {WHOLE}, got {settings['tensors']!r}"
        )


def _names_by_layer(keys: list[str], layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of each layer's tensors, without the layer's own name."""
    found: dict[str, list[str]] = {name: [] for name in layers}
    for key in keys:
        layer, _, name = key.rpartition(".")
        if layer in found:
            found[layer].append(name)
    return found


def _dumped(value: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"vdit_ext.quant: {what} must be what JSON can hold, got {error}") from None


@contextlib.contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[Any]:
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"vdit_ext.quant: {path} must be a whole safetensors file, it is not ({error}); it may be truncated"
        ) from error


@contextlib.contextmanager
def staged(folder: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """Temporary names in a folder; renamed, in the order of ``names``, when the block succeeds, else
    removed."""
    token = secrets.token_hex(4)
    temporary = {name: folder / f".{name}-{token}" for name in names}
    try:
        yield temporary
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
