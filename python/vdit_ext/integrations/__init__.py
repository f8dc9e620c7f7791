"""Plugging vdit_ext into diffusers.

Importing this package tells diffusers, where it is installed, how to load models that vdit_ext quantized; the
models themselves are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .._extras import needing

_HOMES = {
    "Explanation": ".diffusers",
    "Handle": ".diffusers",
    "MODELS": ".diffusers",
    "VditQuantConfig": ".quantizer",
    "accelerate": ".diffusers",
    "explain": ".diffusers",
    "handle_of": ".diffusers",
    "load_pipeline": ".folder",
    "save_quantized": ".quantizer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing("diffusers", f"{__name__}.{name}"):
        home = import_module(_HOMES[name], __name__)
    return getattr(home, name)


if find_spec("diffusers") is not None:
    from . import quantizer as _quantizer  # noqa: F401  enters it in the tables of diffusers
