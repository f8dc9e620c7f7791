"""Pipelines from folders on disk."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_accelerate_available

from .diffusers import MODELS


def load_pipeline(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a diffusers pipeline from a folder that ``save_pretrained`` or a download made; no network is used.

    Args:
        path: the folder with ``model_index.json``.
        dtype: dtype of the weights, float32 when None. The VAE is always float32, as in upstream's examples:
            its error would otherwise drown what is to be compared.

    Returns:
        The pipeline, on the CPU.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a diffusers pipeline, one whose transformer :func:`accelerate` does not know, one that
            starts from an image or a video, or the package accelerate is missing, without which diffusers loads
            no Wan model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"vdit_ext.load_pipeline: {folder} is expected to be a folder, there is none")
    index = _read_index(folder)
    transformer = index.get("transformer")
    name = transformer[1] if isinstance(transformer, list) and len(transformer) == 2 else None
    if name not in MODELS:
        raise ValueError(
            f"vdit_ext.load_pipeline: the transformer in {folder} must be one of {', '.join(MODELS)}, "
            f"got {name or 'none'}"
        )
    loader = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(loader, type) and issubclass(loader, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"vdit_ext.load_pipeline: {folder} must hold a pipeline class of diffusers "
            f"{diffusers.__version__}, got {index.get('_class_name')}"
        )
    takes = inspect.signature(loader.__call__).parameters
    if source := next((name for name in ("image", "video") if name in takes), None):
        raise ValueError(
            f"vdit_ext.load_pipeline: {folder} must hold a pipeline that starts from text alone, such as "
            f"WanPipeline, got {loader.__name__}, which takes {source}; load it with diffusers"
        )
    if not is_accelerate_available():
        raise ValueError(
            "vdit_ext.load_pipeline: the package accelerate is expected to be installed, it is not; run "
            "`pip install accelerate`, which diffusers needs to load this model"
        )
    try:
        dtypes = {"default": dtype or torch.float32, "vae": torch.float32}
        return loader.from_pretrained(str(folder), dtype=dtypes, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vdit_ext.load_pipeline: {folder} could not be loaded: {reason}") from error


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(
            f"vdit_ext.load_pipeline: {folder} must be a diffusers pipeline with model_index.json, it has none"
        )
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"vdit_ext.load_pipeline: {file} must be JSON, it is not: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f"vdit_ext.load_pipeline: {file} must hold a JSON object, got {type(index).__name__}")
    return index
