"""Finished blocks of a vector quantization on disk: one safetensors file each, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

_VERSION = 1


@dataclass(frozen=True)
class Coded:
    """One linear's codes: indices uint8 ``[O, C / d]``, codebook fp32 ``[k, d]``, bias fp32 ``[O]`` or None,
    row_scale fp32 ``[O]`` or None.
    """

    indices: Tensor
    codebook: Tensor
    bias: Tensor | None
    row_scale: Tensor | None


@dataclass(frozen=True)
class Block:
    """The linears of a block by name, and what calibration has to say of it."""

    layers: dict[str, Coded]
    report: dict[str, Any] = field(default_factory=dict)


def key_of(asked: dict[str, Any], linears: dict[str, nn.Linear]) -> str:
    """A digest of what was asked and of the weights it was asked of."""
    digest = hashlib.sha256(json.dumps([_VERSION, asked], sort_keys=True).encode())
    for name, linear in linears.items():
        digest.update(f"{name} {tuple(linear.weight.shape)} {linear.weight.dtype}".encode())
        for tensor in (linear.weight, linear.bias):
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Store:
    """A folder of finished blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: str, key: str, content: Block) -> None:
        """Write a block; a kill while writing leaves none."""
        tensors = {}
        for name, layer in content.layers.items():
            for part in ("indices", "codebook", "bias", "row_scale"):
                tensor = getattr(layer, part)
                if tensor is not None:
                    tensors[f"{name}/{part}"] = tensor.contiguous()
        notes = {"key": key, "block": block, "report": json.dumps(content.report)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(block)
        part = path.with_name(path.name + ".part")
        part.write_bytes(save(tensors, notes))
        part.replace(path)

    def load(self, block: str, key: str) -> Block | None:
        """A block that was saved under this key; None when there is none.

        Raises:
            ValueError: a damaged file, or one that was saved under another key.
        """
        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                if notes.get("key") != key:
                    raise ValueError(
                        f"vdit_ext.quant: {path.name} must be of this model, seed and settings, it is of "
                        "others; take another checkpoint folder"
                    )
                layers: dict[str, dict[str, Tensor]] = {}
                for name in tuple(file.keys()):
                    layer, part = name.rsplit("/", 1)
                    layers.setdefault(layer, {})[part] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"vdit_ext.quant: {path.name} must be a whole safetensors file, it cannot be read ({error}); "
                "delete it"
            ) from None
        coded = {
            name: Coded(found["indices"], found["codebook"], found.get("bias"), found.get("row_scale"))
            for name, found in layers.items()
        }
        return Block(coded, json.loads(notes["report"]))

    def _path(self, block: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', block) or 'model'}.safetensors"
